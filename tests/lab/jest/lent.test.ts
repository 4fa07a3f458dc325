import type { ILent } from '../../../labextension/src/api';
import { lentLong, lentShort } from '../../../labextension/src/lent';
import { GIB, trans } from './usage';

function lent(part: Partial<ILent>): ILent {
  const rest = { wanted_seconds: null, position: null } as const;
  return { phase: 'parked', memory_bytes: 20 * GIB, ...rest, ...part };
}

test('while others use it: what happened and what to do', () => {
  expect(lentShort(lent({}), trans)).toBe('lent to others while idle');
  expect(lentLong(lent({}), trans)).toMatch(/20 GiB .* kept safe\. Run a cell/);
});

test('while it is waited for: for how long, and who is before', () => {
  const waits = lent({ wanted_seconds: 12.7, position: 1 });
  expect(lentShort(waits, trans)).toBe('waiting to get it back (12 s)');
  const long = lent({ wanted_seconds: 185 });
  expect(lentShort(long, trans)).toBe('waiting to get it back (3 min)');
  expect(lentLong(waits, trans)).toContain('It is the next to get it.');
  expect(lentLong({ ...waits, position: 2 }, trans)).toContain(
    '1 other server '
  );
  expect(lentLong({ ...waits, position: 3 }, trans)).toContain(
    '2 other servers '
  );
});

test('a screen reader is told nothing new each second', () => {
  const [one, other] = [1, 2].map(wanted_seconds => lent({ wanted_seconds }));
  expect(lentLong(one, trans)).toBe(lentLong(other, trans));
});

test('while it comes back', () => {
  const back = lent({ phase: 'restoring', wanted_seconds: 3 });
  expect(lentShort(back, trans)).toContain('copied back');
  expect(lentLong(back, trans)).toMatch(/has its GPU again/);
});
