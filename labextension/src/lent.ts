/** What is said while others may use the GPU of an idle server (docs/idle.md). */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { ILent } from './api';
import { formatDuration, formatMemory } from './format';

/** For the status bar. */
export function lentShort(lent: ILent, trans: TranslationBundle): string {
  if (lent.phase === 'restoring') {
    return trans.__('its memory is being copied back');
  }
  return lent.wanted_seconds === null
    ? trans.__('lent to others while idle')
    : trans.__(
        'waiting to get it back (%1)',
        formatDuration(lent.wanted_seconds)
      );
}

/** For the panel: what happened and what to do. Nothing in it changes every second: a screen reader says it once. */
export function lentLong(lent: ILent, trans: TranslationBundle): string {
  const memory = formatMemory(lent.memory_bytes);
  if (lent.phase === 'restoring') {
    return trans.__(
      'This server has its GPU again. Its %1 of GPU memory are being copied back.',
      memory
    );
  }
  if (lent.wanted_seconds === null) {
    return trans.__(
      'Nothing ran here for a while, so others may use this GPU. The %1 of GPU memory in use here are kept safe. Run a cell to get the GPU and the memory back.',
      memory
    );
  }
  const ahead = (lent.position ?? 1) - 1;
  const place =
    ahead > 0
      ? trans._n(
          '%1 other server waits for it since before.',
          '%1 other servers wait for it since before.',
          ahead
        )
      : trans.__('It is the next to get it.');
  return `${trans.__('This server waits for its GPU, which others use now.')} ${place} ${trans.__('The %1 of GPU memory in use here are kept safe. A cell that waits can be interrupted; it does not run then.', memory)}`;
}
