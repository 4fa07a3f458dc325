import type { Notification } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';

import type { INotice } from './api';
import { happenings, type IHappening, isTold } from './happenings';
import type { News } from './news';
import type { ISliceModel } from './tokens';
import { shortened } from './words';

const AUTO_CLOSE_MS = 15_000;
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
    const id = this._shown.get(happening.thing);
    if (!isTold(notice) && id === undefined) {
      return;
    }
    const panel = this._options.panelInView();
    if (panel) {
      this._options.news.show(happening);
    }
    this._notify(happening, id, panel);
    if (notice.kind === 'restored') {
      this._shown.delete(happening.thing); // lent once more is another thing
    }
  }

  /** Show a notification, in the place of the one about the same thing. */
  private _notify(
    { thing, latest, times }: IHappening,
    id: string | undefined,
    panel: boolean
  ): void {
    const { notifications, trans, openPanel } = this._options;
    const often = times > 1 ? trans.__(' (%1 times)', times) : '';
    const message = shortened(latest, MAX_LENGTH - often.length) + often;
    const type =
      latest.kind === 'restored'
        ? 'success'
        : latest.level === 'info'
          ? 'info'
          : latest.level;
    const options = {
      autoClose: panel ? NOT_SHOWN : AUTO_CLOSE_MS,
      actions: panel
        ? []
        : [{ label: trans.__('Show panel'), callback: openPanel }]
    };
    if (panel && id !== undefined) {
      notifications.dismiss(id); // an update would leave it in view
    }
    if (
      panel ||
      id === undefined ||
      !notifications.update({ id, message, type, ...options })
    ) {
      this._shown.set(thing, notifications.emit(message, type, options));
    }
  }

  /** The notification about each thing. */
  private _shown = new Map<string, string>();
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
