import { ENGLISH } from '../../../labextension/src/english';
import {
  formatDuration,
  formatFraction,
  formatMemory,
  formatMemoryOf,
  fullest,
  busiestPercent,
  kernelPercent,
  kernelTotals,
  formatPart,
  memoryLevel,
  overLimit,
  percent,
  unseenBytes
} from '../../../labextension/src/format';
import words from '../../data/memory_words.json';
import { answer, GIB, kernel } from './usage';

test.each(words.memory as [number, string][])(
  '%d bytes read as %s, never rounded up',
  (bytes, text) => {
    expect(formatMemory(bytes)).toBe(text);
  }
);

test.each(words.memory_of as [number, number, string][])(
  '%d of %d bytes read as %s',
  (used, limit, text) => {
    expect(formatMemoryOf(used, limit, ENGLISH)).toBe(text);
  }
);

test('shares of a GPU read as fractions where they are ones', () => {
  expect([1000, 333, 250, 125, 375].map(formatFraction)).toEqual([
    '1',
    '1/3',
    '1/4',
    '1/8',
    '37.5 %'
  ]);
});

test.each([
  [-3, '0 s'],
  [99.9, '99 s'],
  [100, '1 min'],
  [5999, '99 min'],
  [6000, '1 h'],
  [47 * 3600, '47 h'],
  [50 * 3600, '2 d']
])('%d seconds are %s', (seconds, text) => {
  expect(formatDuration(seconds)).toBe(text);
});

test('percent has no division by zero', () => {
  expect(percent(5, 0)).toBe(0);
  expect(percent(199, 200)).toBe(99);
});

test('warns from its threshold, says full at the end, and over beyond it', () => {
  const level = (used: number) => memoryLevel(used, 1000, 90);
  expect([899, 900, 989, 990, 1000, 1001].map(level)).toEqual([
    'ok',
    'warning',
    'warning',
    'full',
    'full',
    'over'
  ]);
});

test.each([
  [125, 250, '50 %'],
  [62, 250, '25 %'],
  [5, 250, '2 %'],
  [1, 1000, '0.1 %'],
  [1, 0, '0.1 %']
])('%s of %s milli-GPU is %s of the slice', (milli, slice, text) => {
  expect(formatPart(milli, slice)).toBe(text);
});

test("a kernel is over its own limit, or the slice's where that is lower", () => {
  const { devices } = answer(1);
  const holds = (gib: number, limitGib: number | null) =>
    kernel({
      limit: {
        memory_bytes: limitGib && limitGib * GIB,
        compute_milli: null
      },
      devices: [
        {
          uuid: 'GPU-1',
          memory_used_bytes: gib * GIB,
          memory_peak_bytes: gib * GIB,
          compute_used_milli: 0
        }
      ]
    });
  expect(overLimit(holds(5, 5), devices!)).toBeNull();
  expect(overLimit(holds(6, 5), devices!)).toEqual({
    usedBytes: 6 * GIB,
    limitBytes: 5 * GIB
  });
  expect(overLimit(holds(19, null), devices!)).toBeNull();
  expect(overLimit(holds(21, 30), devices!)?.limitBytes).toBe(20 * GIB);
});

test('shows the device that is nearest to its limit, not the one that holds most', () => {
  const [device] = answer(1).devices!;
  const small = {
    ...device,
    uuid: 'small',
    memory_limit_bytes: GIB,
    memory_used_bytes: 0.9 * GIB
  };
  expect(fullest([device, small]).uuid).toBe('small');
  expect(fullest([small, device]).uuid).toBe('small');
});

test('a kernel on two devices holds the sum', () => {
  const one = {
    uuid: 'x',
    memory_used_bytes: 1,
    memory_peak_bytes: 2,
    compute_used_milli: 3
  };
  expect(kernelTotals(kernel({ devices: [one, one] }))).toEqual({
    usedBytes: 2,
    peakBytes: 4
  });
});

test('what is computed is that of the device where it is most, in percent of the share there', () => {
  const [first] = answer(0).devices;
  const second = { ...first, uuid: 'GPU-2', utilization_percent: 100 };
  const use = (uuid: string, compute_used_milli: number) => ({
    uuid,
    memory_used_bytes: 0,
    memory_peak_bytes: 0,
    compute_used_milli
  });
  const devices = [first, second];
  const one = kernel({ devices: [use('GPU-1', 0), use('GPU-2', 125)] });
  expect(kernelPercent(one, devices)).toBe(50);
  expect(busiestPercent(devices)).toBe(100);
  const bursting = [{ ...first, compute_used_milli: 500 }];
  expect(
    kernelPercent(kernel({ devices: [use('GPU-1', 500)] }), bursting)
  ).toBe(100);
  expect(kernelPercent(kernel(), devices)).toBe(0);
});

test('what the driver sees beyond the kernels is unseen, unless it is as little as a moment makes', () => {
  const one = answer(0);
  const device = one.devices[0];
  const held = (bytes: number) =>
    kernel({
      devices: [
        {
          uuid: device.uuid,
          memory_used_bytes: bytes,
          memory_peak_bytes: bytes,
          compute_used_milli: 0
        }
      ]
    });
  const seen = (used: number, ...told: number[]) =>
    unseenBytes({
      ...one,
      devices: [{ ...device, memory_used_bytes: used }],
      kernels: told.map(held)
    });
  expect(seen(5 * GIB, 2 * GIB, GIB)).toBe(2 * GIB);
  expect(seen(3 * GIB)).toBe(3 * GIB);
  expect(seen(3 * GIB + 1024 ** 2, 2 * GIB, GIB)).toBe(0);
  expect(seen(2 * GIB, 3 * GIB)).toBe(0);
});
