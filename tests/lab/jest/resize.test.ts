import { answerWords } from '../../../labextension/src/words';
import { GIB, trans } from './usage';

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
])('%j reads as %s', (answer, words) => {
  expect(answerWords(answer, trans)).toBe(words);
});
