import { Notification } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';

import type { INotice } from './api';
import type { ISliceModel } from './tokens';
import { shortened } from './words';

/** Notices of one kind and kernel that follow each other this fast are one notification. */
const SAME_SECONDS = 20;
const AUTO_CLOSE_MS = 15_000;
/** JupyterLab cuts longer notifications anywhere; the panel has the whole text. */
const MAX_LENGTH = 140;

interface IShown {
  id: string;
  time: number;
  count: number;
}

/** Shows each new notice; a loop of refusals becomes one notification that counts. */
export class Notifier {
  constructor(
    model: ISliceModel,
    private _trans: TranslationBundle,
    private _openPanel: () => void
  ) {
    model.noticed.connect((_, notice) => {
      if (model.notify && notice.kind === 'restored') {
        this._back(notice);
      } else if (model.notify && notice.level !== 'info') {
        this.show(notice);
      }
    });
  }

  /** The GPU that was waited for is back: in the place of the notification that said so, which is no longer true. */
  private _back(notice: INotice): void {
    const key = `wanting ${notice.kernel_id}`;
    const waited = this._shown.get(key);
    if (!waited) {
      return;
    }
    this._shown.delete(key);
    Notification.dismiss(waited.id);
    Notification.success(notice.message, { autoClose: AUTO_CLOSE_MS });
  }

  show(notice: INotice): void {
    const key = `${notice.kind} ${notice.kernel_id}`;
    const shown = this._shown.get(key);
    const again = shown && notice.time - shown.time < SAME_SECONDS;
    const count = again ? shown.count + 1 : 1;
    const times = count > 1 ? this._trans.__(' (%1 times)', count) : '';
    const message = shortened(notice, MAX_LENGTH - times.length) + times;
    const options = {
      autoClose: AUTO_CLOSE_MS,
      actions: [
        {
          label: this._trans.__('Show panel'),
          callback: this._openPanel
        }
      ]
    };
    const type = notice.level === 'error' ? 'error' : 'warning';
    let id = shown?.id ?? '';
    if (!again || !Notification.update({ id, message, type, ...options })) {
      id = Notification.emit(message, type, options);
    }
    this._shown.set(key, { id, time: notice.time, count });
  }

  private _shown = new Map<string, IShown>();
}
