import { limitTexts, roundedWords } from '../../../labextension/src/limittexts';
import { answer, kernel, trans } from './usage';

const [quarter] = answer(1).devices!;
const eighth = [{ ...quarter, compute_limit_milli: 125 }];

function limited(compute_milli: number, limit_part_milli: number | null) {
  return kernel({
    limit: { memory_bytes: null, compute_milli },
    limit_part_milli
  });
}

test('a part of the time is shown as it was written, and what holds of it', () => {
  const ten = limited(12, 100);
  expect(limitTexts(ten, eighth).compute).toBe('10 %');
  expect(roundedWords(ten, eighth, trans)).toBe(
    "Time is dealt out in whole thousandths of a GPU: 12 of this slice's 125 are in force."
  );
});

test('where all of it holds there is nothing to say', () => {
  expect(roundedWords(limited(25, 100), [quarter], trans)).toBe('');
});

test('where nobody wrote it down it is what holds', () => {
  const unknown = limited(12, null);
  expect(limitTexts(unknown, eighth).compute).toBe('9.6 %');
  expect(roundedWords(unknown, eighth, trans)).toBe('');
});

test('it is as it was written, too, where the slice has another size since', () => {
  const half = limited(50, 500);
  const tenth = [{ ...quarter, compute_limit_milli: 100 }];
  expect(limitTexts(half, tenth).compute).toBe('50 %');
  const ten = limited(48, 100); // 12 of 125 once
  const twice = [{ ...quarter, compute_limit_milli: 500 }];
  expect(limitTexts(ten, twice).compute).toBe('10 %');
  expect(roundedWords(ten, twice, trans)).toContain('48 of this slice');
});

test('it is what holds, where an agent that is older leaves it', () => {
  const before = limited(12, 100);
  expect(limitTexts(before, [quarter]).compute).toBe('4.8 %');
  expect(roundedWords(before, [quarter], trans)).toBe('');
});
