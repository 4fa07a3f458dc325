/** Keeps how much of the history the panel shows in the user's settings: what is chosen in one page is there after a reload. */

import type { ISettingRegistry } from '@jupyterlab/settingregistry';

import { onChange } from './present';
import type { ISliceModel } from './tokens';

const HISTORY = 'historySeconds';

type Kept = Pick<ISettingRegistry.ISettings, 'get' | 'set' | 'changed'>;

/** Show what is kept, and keep what is chosen from now on. */
export function keepRange(model: ISliceModel, settings: Kept): void {
  let last = model.historySeconds;
  let saving = 0;
  const show = () => {
    const kept = settings.get(HISTORY).composite as number;
    // while one choice is being saved the settings tell of it, and another may have been made since
    if (saving === 0 && kept !== last) {
      last = kept;
      model.showHistory(kept);
    }
  };
  onChange(
    model,
    () => model.historySeconds,
    seconds => {
      if (seconds === last) {
        return;
      }
      last = seconds;
      saving += 1;
      settings
        .set(HISTORY, seconds)
        .catch(reason =>
          console.warn('nbgpu: the chosen history is not kept:', reason)
        )
        .finally(() => (saving -= 1));
    }
  );
  settings.changed.connect(show);
  show();
}
