import type { IAskedBack } from '../../../labextension/src/api';
import { askedLong, askedShort } from '../../../labextension/src/askback';
import { trans } from './usage';

function asked(part: Partial<IAskedBack>): IAskedBack {
  return { seconds: 300, ends: true, reason: 'group bio waits', ...part };
}

test.each([
  [{}, 'stopped in 5 min', 'Save your work: this server will be stopped in 5 min, because group bio waits.'], // prettier-ignore
  [{ seconds: 241 }, 'stopped in 5 min', 'stopped in 5 min, because'],
  [{ seconds: 60 }, 'stopped in less than a minute', 'in less than a minute'],
  [{ seconds: -4 }, 'being stopped', 'this server is being stopped'],
  [{ ends: false }, 'asked back', 'Please save your work and stop this server within 5 min, because group bio waits.'], // prettier-ignore
  [{ ends: false, seconds: -4 }, 'asked back', 'stop this server, because']
])('%j', (part, short, long) => {
  expect(askedShort(asked(part), trans)).toBe(short);
  expect(askedLong(asked(part), trans)).toContain(long);
});

test('a screen reader is told nothing new each second', () => {
  for (const [one, other] of [
    [200, 199],
    [40, 39]
  ]) {
    expect(askedLong(asked({ seconds: one }), trans)).toBe(
      askedLong(asked({ seconds: other }), trans)
    );
  }
});
