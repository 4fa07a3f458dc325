/** One model for everything on a page that shows the slice: the extension's where it is, else one of the monitors' own. */

import { ENGLISH, type Words } from './english';
import type { ISliceModel } from './tokens';

const SHARED = Symbol.for('nbgpu.slice.model');
const WORDS = Symbol.for('nbgpu.slice.words');
type Page = { [SHARED]?: ISliceModel; [WORDS]?: Words };

/** Give the page the model and the words to use from now on. */
export function shareModel(model: ISliceModel, words: Words): void {
  Object.assign(globalThis, { [SHARED]: model, [WORDS]: words });
}

/** The page's model; null where no extension of ours runs. */
export function sharedModel(): ISliceModel | null {
  return (globalThis as Page)[SHARED] ?? null;
}

/** The words of the page's language; English where no extension of ours runs. */
export function sharedWords(): Words {
  return (globalThis as Page)[WORDS] ?? ENGLISH;
}

/** A model that lives as long as somebody follows it. */
export class OwnModel {
  constructor(private _make: () => ISliceModel) {}

  take(): ISliceModel {
    this._model ??= this._make();
    this._users += 1;
    return this._model;
  }

  giveBack(): void {
    this._users -= 1;
    if (this._users === 0) {
      this._model?.dispose();
      this._model = null;
    }
  }

  private _model: ISliceModel | null = null;
  private _users = 0;
}

/** Call `draw` with the page's model now and at each change, until the returned function is called. */
export function follow(
  own: OwnModel,
  draw: (model: ISliceModel) => void
): () => void {
  let model: ISliceModel;
  let isOwn = false;
  const redraw = () => {
    const shared = sharedModel();
    if (isOwn && shared !== null) {
      leave(); // the extension came later: its questions are enough
      enter();
      return;
    }
    draw(model);
  };
  const enter = () => {
    const shared = sharedModel();
    isOwn = shared === null;
    model = shared ?? own.take();
    model.changed.connect(redraw);
    draw(model);
  };
  const leave = () => {
    model.changed.disconnect(redraw);
    if (isOwn) {
      own.giveBack();
    }
  };
  enter();
  return leave;
}
