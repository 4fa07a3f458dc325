import type { ILoggerRegistry } from '@jupyterlab/logconsole';
import type { TranslationBundle } from '@jupyterlab/translation';

import type { INotice, IUsage } from './api';
import type { ISliceModel } from './tokens';

/** The notebooks that a notice is of: its own, or all where it is of the whole slice. */
export function notebooksOf(notice: INotice, usage: IUsage | null): string[] {
  if (notice.path) {
    return [notice.path];
  }
  if (notice.kernel_id !== null) {
    return []; // a kernel without a notebook
  }
  const paths = (usage?.kernels ?? [])
    .filter(kernel => kernel.type === 'notebook')
    .map(kernel => kernel.path);
  return [...new Set(paths)].filter(path => path !== null);
}

/** Write each new notice into the log of its notebook (View › Show Log Console), as text. */
export function logNotices(
  model: ISliceModel,
  loggers: ILoggerRegistry,
  trans: TranslationBundle
): void {
  model.noticed.connect((_, notice) => {
    for (const path of notebooksOf(notice, model.usage)) {
      loggers.getLogger(path).log({
        type: 'text',
        level: notice.level,
        data: trans.__('GPU: %1', notice.message)
      });
    }
  });
}
