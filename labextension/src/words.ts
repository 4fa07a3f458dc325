/** Sentences about a slice, shared by status bar and panel. */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { IDeviceUsage, IKernelUsage, INotice, IUsage } from './api';
import { formatFraction, fullest, type Level, memoryLevel } from './format';

/** "1/4 GPU", "2 × 1/4 GPU", with the word "simulated" where it belongs. */
export function sliceName(usage: IUsage, trans: TranslationBundle): string {
  const share = formatFraction(usage.devices[0].compute_limit_milli);
  const part =
    usage.devices.length > 1 ? `${usage.devices.length} × ${share}` : share;
  return usage.simulated
    ? trans.__('%1 simulated GPU', part)
    : trans.__('%1 GPU', part);
}

export function modeWords(usage: IUsage, trans: TranslationBundle): string {
  return usage.mode === 'strict'
    ? trans.__('strict: never more than its share of time')
    : trans.__('burst: more time while others are idle');
}

/** Null while there is room. */
export function warningWords(
  level: Level,
  trans: TranslationBundle
): string | null {
  if (level === 'over') {
    return trans.__('GPU memory over its limit');
  }
  if (level === 'full') {
    return trans.__('GPU memory full');
  }
  return level === 'warning' ? trans.__('GPU memory almost full') : null;
}

/** The device to show and how near it is to its limit. */
export function nearest(
  usage: IUsage,
  warnPercent: number
): { device: IDeviceUsage; level: Level } {
  const device = fullest(usage.devices);
  const level = memoryLevel(
    device.memory_used_bytes,
    device.memory_limit_bytes,
    warnPercent
  );
  return { device, level };
}

export function kernelName(
  kernel: IKernelUsage,
  trans: TranslationBundle
): string {
  if (kernel.kernel_id === null) {
    return trans.__('Other processes');
  }
  return kernel.name ?? trans.__('Kernel %1', kernel.kernel_id.slice(0, 8));
}

const SHORTEST_NAME = 12;

/**
 * What a notice says, in `length` characters at most: with the notebook's name where there is room, a long name cut in its middle, else
 * without the last sentences (what to do), which the panel has.
 */
export function shortened(notice: INotice, length: number): string {
  const name = notice.name ?? '';
  const named = notice.message.includes(name)
    ? notice.message
    : `${name}: ${notice.message}`;
  const over = named.length - length;
  if (over <= 0) {
    return named;
  }
  if (name.length - over >= SHORTEST_NAME) {
    return named.replace(name, cutInTheMiddle(name, name.length - over));
  }
  const short = named.replace(name, cutInTheMiddle(name, SHORTEST_NAME * 2));
  const sentences = short.split(/(?<=\.) /);
  while (sentences.length > 1 && sentences.join(' ').length > length) {
    sentences.pop();
  }
  const text = sentences.join(' ');
  return text.length <= length
    ? text
    : `${text.slice(0, text.lastIndexOf(' ', length - 1))}…`;
}

/** "a-notebook-with-…-name.ipynb". */
function cutInTheMiddle(name: string, length: number): string {
  if (name.length <= length) {
    return name;
  }
  const end = Math.floor((length - 1) / 2);
  return `${name.slice(0, length - 1 - end)}…${name.slice(name.length - end)}`;
}

/** "14:02:31" in the reader's own way. */
export function clock(seconds: number): string {
  return new Date(seconds * 1000).toLocaleTimeString();
}
