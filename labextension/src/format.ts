/**
 * Numbers as people read them. The same rules as `nbgpu/quantities.py`: rounded down, one decimal at most;
 * `tests/data/memory_words.json` holds both to it.
 */

import type { IDeviceUsage, IKernelUsage, IUsage } from './api';
import type { Words } from './english';

const MIB = 1024 ** 2;
const GIB = 1024 ** 3;
/** Less is what a driver's own rounding and a moment's delay make. */
const UNSEEN_LEAST = 64 * MIB;

const FRACTIONS: { [milli: number]: string } = {
  1000: '1',
  750: '3/4',
  667: '2/3',
  666: '2/3',
  500: '1/2',
  333: '1/3',
  250: '1/4',
  125: '1/8'
};

/** One decimal, rounded down, none where it is zero: 19.5, 20. */
function tenths(value: number): string {
  const floored = Math.floor(value * 10 + 1e-9);
  return floored % 10 === 0 ? `${floored / 10}` : (floored / 10).toFixed(1);
}

/** "19.5 GiB", "512 MiB". */
export function formatMemory(bytes: number): string {
  if (bytes >= GIB) {
    return `${tenths(bytes / GIB)} GiB`;
  }
  return bytes >= MIB ? `${tenths(bytes / MIB)} MiB` : `${bytes} B`;
}

/** "3.2 of 19.5 GiB", "300 MiB of 19.5 GiB": each in its own unit, which is written once when they share it. */
export function formatMemoryOf(
  usedBytes: number,
  limitBytes: number,
  trans: Words
): string {
  const used = formatMemory(usedBytes);
  const limit = formatMemory(limitBytes);
  const [number, unit] = used.split(' ');
  return trans.__(
    '%1 of %2',
    limit.endsWith(` ${unit}`) ? number : used,
    limit
  );
}

/** A share of one GPU: "1/4", "37.5 %". */
export function formatFraction(milli: number): string {
  return FRACTIONS[milli] ?? `${tenths(milli / 10)} %`;
}

/** Seconds as a person says them: "12 s", "3 min", "5 h", "4 d"; rounded down. */
export function formatDuration(seconds: number): string {
  if (seconds < 100) {
    return `${Math.floor(Math.max(0, seconds))} s`;
  }
  const minutes = Math.floor(seconds / 60);
  if (minutes < 100) {
    return `${minutes} min`;
  }
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h` : `${Math.floor(hours / 24)} d`;
}

/** A part of a whole in percent, rounded down; 0 where there is no whole. */
export function percent(part: number, whole: number): number {
  return whole > 0 ? Math.floor((part * 100) / whole) : 0;
}

/** The device that is nearest to its memory limit: the one to show where there is room for one. */
export function fullest(devices: IDeviceUsage[]): IDeviceUsage {
  return devices.reduce((most, device) =>
    device.memory_used_bytes * most.memory_limit_bytes >
    most.memory_used_bytes * device.memory_limit_bytes
      ? device
      : most
  );
}

/** How busy the slice is on the device where it is busiest, in percent of its share there. */
export function busiestPercent(devices: IDeviceUsage[]): number {
  return Math.max(...devices.map(device => device.utilization_percent));
}

export type Level = 'ok' | 'warning' | 'full' | 'over';

/** How near memory is to its limit; more than that it holds where the limit was lowered since. */
export function memoryLevel(
  usedBytes: number,
  limitBytes: number,
  warnPercent: number
): Level {
  if (usedBytes > limitBytes) {
    return 'over';
  }
  const now = percent(usedBytes, limitBytes);
  return now >= 99 ? 'full' : now >= warnPercent ? 'warning' : 'ok';
}

/** A part of the slice's time: "50 %", "2.5 %", never "0 %" for a part that there is. */
export function formatPart(milli: number, sliceMilli: number): string {
  const part = sliceMilli > 0 ? (milli * 100) / sliceMilli : 0;
  return `${part >= 10 ? Math.round(part) : Math.max(0.1, Math.round(part * 10) / 10)} %`;
}

/** The most that a kernel holds beyond what it may on one device, null where it is within: its own limit, or the slice's. */
export function overLimit(
  kernel: IKernelUsage,
  devices: IDeviceUsage[]
): { usedBytes: number; limitBytes: number } | null {
  for (const use of kernel.devices) {
    const device = devices.find(({ uuid }) => uuid === use.uuid);
    const limitBytes = Math.min(
      kernel.limit.memory_bytes ?? Infinity,
      device?.memory_limit_bytes ?? Infinity
    );
    if (use.memory_used_bytes > limitBytes) {
      return { usedBytes: use.memory_used_bytes, limitBytes };
    }
  }
  return null;
}

/** Bytes that the driver sees the slice hold beyond what its kernels account for. */
export function unseenBytes(usage: IUsage): number {
  return usage.devices.reduce((sum, device) => {
    const told = usage.kernels
      .flatMap(kernel => kernel.devices)
      .filter(one => one.uuid === device.uuid)
      .reduce((held, one) => held + one.memory_used_bytes, 0);
    const unseen = device.memory_used_bytes - told;
    return sum + (unseen >= UNSEEN_LEAST ? unseen : 0);
  }, 0);
}

/**
 * What a kernel computes on the device where it does most, in percent of the slice's share there, as its limit is. A slice that bursts uses
 * more than its share: its kernels divide what it uses, as 100 %.
 */
export function kernelPercent(
  kernel: IKernelUsage,
  devices: IDeviceUsage[]
): number {
  const parts = kernel.devices.map(use => {
    const device = devices.find(({ uuid }) => uuid === use.uuid);
    const most = device
      ? Math.max(device.compute_limit_milli, device.compute_used_milli)
      : 0;
    return percent(use.compute_used_milli, most);
  });
  return Math.max(0, ...parts);
}

/** What a kernel holds on all devices of the slice. */
export function kernelTotals(kernel: IKernelUsage): {
  usedBytes: number;
  peakBytes: number;
} {
  const totals = { usedBytes: 0, peakBytes: 0 };
  for (const device of kernel.devices) {
    totals.usedBytes += device.memory_used_bytes;
    totals.peakBytes += device.memory_peak_bytes;
  }
  return totals;
}
