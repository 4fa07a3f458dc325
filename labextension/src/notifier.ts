import type { Notification } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';

import type { INotice } from './api';
import { askedLong } from './askback';
import { happenings, type IHappening, isOpenAsk, isTold } from './happenings';
import type { News } from './news';
import type { ISliceModel } from './tokens';
import { shortened } from './words';

const AUTO_CLOSE_MS = 15_000;
/** JupyterLab needs so long to show one: an update that comes sooner is lost. */
const SETTLE_MS = 1500;
/** JupyterLab keeps it in its list of notifications, and shows none. */
const NOT_SHOWN = 0;
/** So many things of one kind have a notification each; those that follow fast share one, which counts. */
const APART = 3;
const TOGETHER_MS = 20_000;
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
    const shared = this._sharing(happening);
    const key = shared > 0 ? `more ${notice.kind}` : thing;
    const text = this._text(happening, shared);
    const wait = (this._shown.get(key)?.until ?? 0) - Date.now();
    if (wait <= 0) {
      this._notify(key, notice, text);
    } else {
      if (!this._waiting.has(key)) {
        setTimeout(() => this._waiting.get(key)?.(), wait);
      }
      this._waiting.set(key, () => this._notify(key, notice, text));
    }
  }

  /** How many things share one notification with this one, itself too; 0: it has its own. */
  private _sharing({ thing, latest }: IHappening): number {
    if (this._shown.has(thing)) {
      return 0;
    }
    const now = Date.now();
    const before = this._crowds.get(latest.kind);
    const things =
      before && now - before.at <= TOGETHER_MS
        ? before.things
        : new Set<string>();
    things.add(thing);
    this._crowds.set(latest.kind, { at: now, things });
    return [...things].indexOf(thing) < APART ? 0 : things.size - APART;
  }

  private _text(happening: IHappening, shared: number): string {
    const { model, trans } = this._options;
    const { times } = happening;
    let { latest } = happening;
    const asked = model.usage?.asked_back;
    if (asked && isOpenAsk(latest)) {
      latest = { ...latest, message: askedLong(asked, trans) }; // the time that is left now: it may have been said long ago
    }
    if (shared > 1) {
      const more = trans.__('%1 more like this. ', shared);
      return more + shortened(latest, MAX_LENGTH - more.length);
    }
    const often = times > 1 ? trans.__(' (%1 times)', times) : '';
    return shortened(latest, MAX_LENGTH - often.length) + often;
  }

  /** Show a notification, in the place of the one before it with the same key. */
  private _notify(key: string, latest: INotice, message: string): void {
    const { notifications, openPanel, panelInView, trans } = this._options;
    const panel = panelInView();
    const back = latest.kind === 'restored';
    const type = back ? 'success' : latest.level;
    const options = {
      autoClose: panel ? NOT_SHOWN : !isOpenAsk(latest) && AUTO_CLOSE_MS,
      actions: panel
        ? []
        : [{ label: trans.__('Show panel'), callback: openPanel }]
    };
    let id = this._shown.get(key)?.id;
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
    this._waiting.delete(key);
    if (back) {
      this._shown.delete(key); // lent once more is another thing
    } else {
      this._shown.set(key, { id, until: Date.now() + SETTLE_MS });
    }
  }

  /** The notification of each key, a thing or what many share, and until when it is left as it is. */
  private _shown = new Map<string, { id: string; until: number }>();
  /** Says the last of it then. */
  private _waiting = new Map<string, () => void>();
  /** The things of each kind that followed each other fast, and when the last was told. */
  private _crowds = new Map<string, { at: number; things: Set<string> }>();
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
