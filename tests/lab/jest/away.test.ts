import type { IKernelAway, IKernelUsage } from '../../../labextension/src/api';
import {
  awayWords,
  whereTo,
  whyNotMoved
} from '../../../labextension/src/away';

const trans = {
  __: (text: string, ...values: unknown[]) =>
    text.replace(/%(\d)/g, (_, place) => String(values[Number(place) - 1]))
} as any;

function kernel(away?: Partial<IKernelAway> | null, held = 0): IKernelUsage {
  const whole = { memory_bytes: 20 * 2 ** 30, since: 1, wanted_seconds: null };
  return {
    devices: held ? [{ memory_used_bytes: held }] : [],
    away: away ? { phase: 'parked', ...whole, ...away } : away
  } as unknown as IKernelUsage;
}

test('what is said of memory that is away', () => {
  const said = (away?: Partial<IKernelAway> | null) =>
    awayWords(kernel(away), trans);
  expect(said()).toBe('');
  expect(said(null)).toBe('');
  expect(said({})).toMatch(/^Its 20.GiB are in host memory/);
  expect(said({ phase: 'parking' })).toMatch(/on their way to host memory/);
  expect(said({ phase: 'restoring' })).toMatch(/back from host memory/);
  expect(said({ wanted_seconds: 3 })).toMatch(/waits until 20.GiB are free/);
});

test('where it may go', () => {
  expect(whereTo(kernel(null, 5), true)).toBe('suspend');
  expect(whereTo(kernel(null, 5), false)).toBeNull();
  expect(whereTo(kernel(null, 0), true)).toBeNull();
  expect(whereTo(kernel({}), false)).toBe('resume');
  expect(whereTo(undefined, true)).toBeNull();
});

test('why it cannot be moved is said for the menu', () => {
  const why = (...args: [Parameters<typeof whereTo>[0], boolean]) =>
    whyNotMoved(...args, trans);
  expect(why(kernel(null, 5), true)).toBeNull();
  expect(why(kernel({}), false)).toBeNull();
  expect(why(kernel(null, 0), true)).toBe('it holds none');
  expect(why(kernel(null, 5), false)).toBe('not offered on this server');
});
