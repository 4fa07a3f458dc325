import { answerWords, roomWords } from '../../../labextension/src/words';
import { answer, GIB, trans } from './usage';

const devices = [{ index: 0, memory_bytes: 39 * GIB, compute_milli: 500 }];

test.each([
  [
    { in_force: true, devices, note: null },
    'Granted: 1/2 GPU with 39 GiB of memory.'
  ],
  [
    { in_force: false, devices, note: 'It moves.' },
    'Granted: 1/2 GPU with 39 GiB of memory. It is in force once it is shown above. It moves.'
  ],
  [{ in_force: true, devices: [], note: null }, 'Granted: as asked.']
])('%j reads as %s', (told, words) => {
  expect(answerWords(told, answer(0), trans)).toBe(words);
});

test('what is granted is in force once it is shown', () => {
  const told = { in_force: false, devices, note: null };
  const after = answer(0);
  after.devices[0].memory_limit_bytes = 39 * GIB;
  after.devices[0].compute_limit_milli = 500;
  expect(answerWords(told, after, trans)).toBe(
    'Granted: 1/2 GPU with 39 GiB of memory.'
  );
});

test('what is free is said of each GPU', () => {
  const free = { free_milli: 250, free_bytes: 19.5 * GIB };
  const none = { free_milli: 0, free_bytes: 0 };
  const room = {
    devices: [
      { index: 0, ...free },
      { index: 3, ...none }
    ]
  };
  expect(roomWords(room, trans)).toEqual([
    'Free on GPU 0 now: 1/4 of its time, 19.5 GiB of its memory.',
    'Free on GPU 3 now: 0 % of its time, 0 B of its memory.'
  ]);
});
