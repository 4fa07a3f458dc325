import type { ISignal } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';

import type { IHappening } from './happenings';

/** What the open panel says of what just happened: there, because a notification would cover the form that it speaks of. */
export class News {
  get latest(): IHappening | null {
    return this._latest;
  }

  get changed(): ISignal<News, void> {
    return this._changed;
  }

  show(happening: IHappening | null): void {
    this._latest = happening;
    this._changed.emit();
  }

  private _latest: IHappening | null = null;
  private _changed = new Signal<News, void>(this);
}

/** The page has one panel. */
export const news = new News();
