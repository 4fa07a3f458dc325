import { ServerClock } from '../../../labextension/src/clock';

test('an hour apart, and what happened just now is shown as of now', () => {
  const clock = new ServerClock();
  expect(clock.local(5)).toBe(5);
  clock.hear(1000, 4600, 4601);
  expect(clock.local(999)).toBeCloseTo(4599.5);
});

test('small differences and slow answers change nothing: a time that is shown stays', () => {
  const clock = new ServerClock();
  clock.hear(1000, 1001, 1001);
  clock.hear(1000, 1000, 1020);
  expect(clock.local(7)).toBe(7);
  clock.hear(1000, 4600, 4600);
  const shown = clock.local(7);
  clock.hear(2000, 5601, 5601.4);
  expect(clock.local(7)).toBe(shown);
});
