import type { Notification } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';

import type { INotice } from './api';
import { happenings, type IHappening, isTold } from './happenings';
import type { News } from './news';
import type { ISliceModel } from './tokens';
import { shortened } from './words';

const AUTO_CLOSE_MS = 15_000;
/** JupyterLab needs so long to show one: an update that comes sooner is lost. */
const SETTLE_MS = 1500;
/** JupyterLab keeps it in its list of notifications, and shows none. */
const NOT_SHOWN = 0;
/** JupyterLab cuts longer notifications anywhere; the panel has the whole text. */
const MAX_LENGTH = 140;

/** Tells of what happens: one notification a thing, which follows it; in the panel itself while that is in view. */
export class Notifier {
  constructor(private _options: Notifier.IOptions) {
    const { model } = _options;
    model.noticed.connect((_, notice) => {
      if (model.notify) {
        this._tell(notice);
      }
    });
  }

  private _tell(notice: INotice): void {
    const happening = happenings(this._options.model.notices).find(
      one => one.latest.id === notice.id
    );
    if (!happening) {
      return; // so many came that this one is forgotten
    }
    const { thing } = happening;
    if (!isTold(notice) && !this._shown.has(thing)) {
      return;
    }
    if (this._options.panelInView()) {
      this._options.news.show(happening);
    }
    const wait = (this._shown.get(thing)?.until ?? 0) - Date.now();
    if (wait <= 0) {
      this._notify(happening);
    } else {
      if (!this._waiting.has(thing)) {
        setTimeout(() => {
          const last = this._waiting.get(thing);
          if (last) {
            this._notify(last);
          }
        }, wait);
      }
      this._waiting.set(thing, happening);
    }
  }

  /** Show a notification, in the place of the one about the same thing. */
  private _notify({ thing, latest, times }: IHappening): void {
    const { notifications, openPanel, panelInView, trans } = this._options;
    const panel = panelInView();
    const often = times > 1 ? trans.__(' (%1 times)', times) : '';
    const message = shortened(latest, MAX_LENGTH - often.length) + often;
    const back = latest.kind === 'restored';
    const type = back ? 'success' : latest.level;
    const options = {
      autoClose: panel ? NOT_SHOWN : AUTO_CLOSE_MS,
      actions: panel
        ? []
        : [{ label: trans.__('Show panel'), callback: openPanel }]
    };
    let id = this._shown.get(thing)?.id;
    if (panel && id !== undefined) {
      notifications.dismiss(id); // an update would leave it in view
    }
    if (
      panel ||
      id === undefined ||
      !notifications.update({ id, message, type, ...options })
    ) {
      id = notifications.emit(message, type, options);
    }
    this._waiting.delete(thing);
    if (back) {
      this._shown.delete(thing); // lent once more is another thing
    } else {
      this._shown.set(thing, { id, until: Date.now() + SETTLE_MS });
    }
  }

  /** The notification about each thing, and until when it is left as it is. */
  private _shown = new Map<string, { id: string; until: number }>();
  /** What is to be said of a thing then. */
  private _waiting = new Map<string, IHappening>();
}

export namespace Notifier {
  export interface IOptions {
    model: ISliceModel;
    /** JupyterLab's. */
    notifications: Pick<typeof Notification, 'emit' | 'update' | 'dismiss'>;
    trans: TranslationBundle;
    news: News;
    openPanel: () => void;
    /** Whether the person sees the panel now. */
    panelInView: () => boolean;
  }
}
