/** What is said while this server is asked back for somebody who waits (docs/quotas.md). */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { IAskedBack } from './api';

/** Never by the second: a screen reader says each change. */
function left(seconds: number, trans: TranslationBundle): string {
  return seconds > 60
    ? trans.__('%1 min', Math.ceil(seconds / 60))
    : trans.__('less than a minute');
}

/** For the status bar. */
export function askedShort(
  { ends, seconds }: IAskedBack,
  trans: TranslationBundle
): string {
  if (!ends) {
    return trans.__('asked back');
  }
  return seconds > 0
    ? trans.__('stopped in %1', left(seconds, trans))
    : trans.__('being stopped');
}

/** What happens, when, why, and what to do. */
export function askedLong(
  { ends, reason, seconds }: IAskedBack,
  trans: TranslationBundle
): string {
  const time = left(seconds, trans);
  if (ends) {
    return seconds > 0
      ? trans.__(
          'Save your work: this server will be stopped in %1, because %2.',
          time,
          reason
        )
      : trans.__(
          'Save your work: this server is being stopped, because %1.',
          reason
        );
  }
  return seconds > 0
    ? trans.__(
        'Please save your work and stop this server within %1, because %2.',
        time,
        reason
      )
    : trans.__(
        'Please save your work and stop this server, because %1.',
        reason
      );
}
