/** Sentences about a slice, shared by status bar and panel. */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { IDeviceUsage, IKernelUsage, IUsage } from './api';
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

/** "14:02:31" in the reader's own way. */
export function clock(seconds: number): string {
  return new Date(seconds * 1000).toLocaleTimeString();
}
