/** What is said of a kernel whose GPU memory its user has moved to the host's (docs/idle.md). */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { IKernelUsage } from './api';
import { formatMemory } from './format';

/** Where it is; empty while its memory is on the GPU. */
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
    return trans.__('Its %1 are on their way to host memory.', memory);
  }
  if (phase === 'restoring') {
    return trans.__('Its %1 are on their way back from host memory.', memory);
  }
  return wanted_seconds === null
    ? trans.__('Its %1 are in host memory.', memory)
    : trans.__('It is used and waits until %1 are free for it.', memory);
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

/** Why its memory cannot be moved now, short, for a menu; null when it can. */
export function whyNotMoved(
  kernel: IKernelUsage | undefined,
  mayMove: boolean,
  trans: TranslationBundle
): string | null {
  if (whereTo(kernel, mayMove) !== null) {
    return null;
  }
  return mayMove
    ? trans.__('it holds none')
    : trans.__('not offered on this server');
}
