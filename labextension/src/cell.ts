/** `nbgpu.SliceMonitor()` in a cell of JupyterLab and Notebook 7. */

import type { JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import type { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { Widget } from '@lumino/widgets';

import type { Words } from './english';
import { drawMonitor, kernelIdIn, MONITOR_MIME, monitorRoot } from './monitor';
import { DOMAIN, ISliceModel } from './tokens';

/** Follows the page's model while it is in the page: it asks nobody itself. */
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
    this._draw();
  }

  protected onAfterAttach(): void {
    this._model.changed.connect(this._draw, this);
    this._draw();
  }

  protected onBeforeDetach(): void {
    this._model.changed.disconnect(this._draw, this);
  }

  private _draw(): void {
    drawMonitor(this._root, this._model, this._kernelId, this._trans);
  }

  private _root: HTMLElement;
  private _kernelId = '';
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
