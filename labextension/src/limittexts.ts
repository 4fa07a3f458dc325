/** A kernel's limits in words. */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { IDeviceUsage, IKernelUsage } from './api';
import { formatMemory, formatPart } from './format';

/** A kernel's limits as texts that the form takes back; empty: none of its own. */
export function limitTexts(
  kernel: IKernelUsage,
  devices: IDeviceUsage[]
): { memory: string; compute: string } {
  const { memory_bytes, compute_milli } = kernel.limit;
  const part = writtenPart(kernel, devices);
  const compute =
    part !== null
      ? formatPart(part, 1000)
      : compute_milli !== null
        ? formatPart(compute_milli, sliceMilli(devices))
        : '';
  return {
    memory: memory_bytes !== null ? formatMemory(memory_bytes) : '',
    compute
  };
}

/** That a little less than what was written holds; empty where all of it does. */
export function roundedWords(
  kernel: IKernelUsage,
  devices: IDeviceUsage[],
  trans: TranslationBundle
): string {
  const part = writtenPart(kernel, devices);
  const whole = sliceMilli(devices);
  const holds = kernel.limit.compute_milli ?? 0;
  return part === null || holds * 1000 === part * whole
    ? ''
    : trans.__(
        "Time is dealt out in whole thousandths of a GPU: %1 of this slice's %2 are in force.",
        holds,
        whole
      );
}

/**
 * The part of the slice's time that was written, in thousandths; null where something else holds. In a slice that has another size since
 * it is as much as whole thousandths of the GPU allow: a hundredth of the slice more or less, at most.
 */
function writtenPart(
  kernel: IKernelUsage,
  devices: IDeviceUsage[]
): number | null {
  const part = kernel.limit_part_milli ?? null;
  const holds = kernel.limit.compute_milli;
  if (part === null || holds === null) {
    return null;
  }
  const whole = sliceMilli(devices);
  const off = Math.abs(holds - (whole * part) / 1000);
  return off <= Math.max(1, whole / 100) ? part : null;
}

function sliceMilli(devices: IDeviceUsage[]): number {
  return Math.min(...devices.map(d => d.compute_limit_milli));
}
