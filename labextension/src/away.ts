/** What is said of a kernel whose GPU memory its user has moved to the host's (docs/idle.md). */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { IKernelUsage } from './api';
import { formatMemory } from './format';

/** Beside what it is and does; empty while its memory is on the GPU. */
export function awayWords(
  kernel: IKernelUsage,
  trans: TranslationBundle
): string {
  if (!kernel.away) {
    return '';
  }
  const { phase, memory_bytes, wanted_seconds } = kernel.away;
  const memory = formatMemory(memory_bytes);
  if (phase === 'parking') {
    return trans.__('%1 on their way to host memory', memory);
  }
  if (phase === 'restoring') {
    return trans.__('%1 on their way back from host memory', memory);
  }
  return wanted_seconds === null
    ? trans.__('%1 in host memory', memory)
    : trans.__('waits until %1 are free for it', memory);
}

/** Where its memory may go; null where nothing may be moved. */
export function whereTo(
  kernel: IKernelUsage | undefined,
  mayMove: boolean
): 'suspend' | 'resume' | null {
  if (kernel?.away) {
    return 'resume';
  }
  const holds = kernel?.devices.some(one => one.memory_used_bytes > 0);
  return mayMove && holds ? 'suspend' : null;
}
