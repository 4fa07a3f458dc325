/** `nbgpu.SliceMonitor()` in a cell of JupyterLab and Notebook 7. */

import type { JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import type { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { Widget } from '@lumino/widgets';

import type { Words } from './english';
import { drawInView, type IDrawn } from './inview';
import { drawMonitor, kernelIdIn, MONITOR_MIME, monitorRoot } from './monitor';
import { DOMAIN, ISliceModel } from './tokens';

/** Follows the page's model while it is in the page, and draws while it is in view: it asks nobody itself. */
class Monitor extends Widget implements IRenderMime.IRenderer {
  constructor(
    private _model: ISliceModel,
    private _trans: Words
  ) {
    super();
    this._root = monitorRoot(_trans);
    this.node.append(this._root);
  }

  async renderModel({ data }: IRenderMime.IMimeModel): Promise<void> {
    this._kernelId = kernelIdIn(data[MONITOR_MIME]);
    this._redraw();
  }

  protected onAfterAttach(): void {
    this._drawn = drawInView(this._root, () =>
      drawMonitor(this._root, this._model, this._kernelId, this._trans)
    );
    this._model.changed.connect(this._redraw, this);
  }

  protected onBeforeDetach(): void {
    this._model.changed.disconnect(this._redraw, this);
    this._drawn?.forget();
    this._drawn = null;
  }

  private _redraw(): void {
    this._drawn?.redraw();
  }

  private _root: HTMLElement;
  private _kernelId = '';
  private _drawn: IDrawn | null = null;
}

export const monitorPlugin: JupyterFrontEndPlugin<void> = {
  id: 'nbgpu-lab:monitor',
  description: 'The GPU slice, live, in a cell.',
  autoStart: true,
  requires: [ISliceModel, IRenderMimeRegistry],
  optional: [ITranslator],
  activate: (
    _,
    model: ISliceModel,
    rendermime: IRenderMimeRegistry,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    rendermime.addFactory({
      safe: true, // in notebooks that are not trusted too: nothing that a notebook has is shown or executed
      mimeTypes: [MONITOR_MIME],
      createRenderer: () => new Monitor(model, trans)
    });
  }
};
