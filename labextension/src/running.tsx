import type {
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { IRunningSessionManagers } from '@jupyterlab/running';
import type { IRunningSessions } from '@jupyterlab/running';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { TranslationBundle } from '@jupyterlab/translation';
import { Signal } from '@lumino/signaling';
import * as React from 'react';

import { holders, type IHolder } from './holders';
import { sliceIcon } from './icons';
import { onChange, whenPresent } from './present';
import { CommandIDs, DOMAIN, ISliceModel } from './tokens';
import { isolated } from './words';

/** The section of the Running panel with the kernels that hold GPU memory. */
class GpuKernels implements IRunningSessions.IManager {
  constructor(
    private _app: JupyterFrontEnd,
    private _model: ISliceModel,
    private _trans: TranslationBundle
  ) {
    const read = () => JSON.stringify(this._holders());
    onChange(_model, read, () => this._changed.emit());
    this.name = this._trans.__('GPU Memory');
    this.shutdownLabel = this._trans.__('Shut Down Kernel');
    this.shutdownAllLabel = this._trans.__('Shut Down All');
    this.shutdownAllConfirmationText = this._trans.__(
      'Shut down all kernels that hold GPU memory? All their variables are lost.'
    );
  }

  readonly name: string;
  readonly shutdownLabel: string;
  readonly shutdownAllLabel: string;
  readonly shutdownAllConfirmationText: string;

  get runningChanged(): Signal<GpuKernels, void> {
    return this._changed;
  }

  running(): IRunningSessions.IRunningItem[] {
    return this._holders().map(holder => this._item(holder));
  }

  refreshRunning(): void {
    void this._model.refresh();
  }

  shutdownAll(): void {
    this._holders().forEach(holder => this._shutdown(holder));
  }

  /** None where what the server said is not understood: JupyterLab's panel with all its other sections would not be drawn. */
  private _holders(): IHolder[] {
    try {
      return holders(this._model.usage);
    } catch (error) {
      console.error('nbgpu: who holds GPU memory is not known:', error);
      return [];
    }
  }

  private _item(holder: IHolder): IRunningSessions.IRunningItem {
    const { kernelId, memory, name, path } = holder;
    const words = name ?? this._trans.__('Kernel %1', kernelId.slice(0, 8));
    return {
      icon: () => sliceIcon,
      label: () => (
        <span className="nbgpu-Running">
          <span>{memory} · </span>
          <bdi>{words}</bdi>
        </span>
      ),
      labelTitle: () =>
        this._trans.__(
          '%1 holds %2 of GPU memory',
          isolated(path ?? words),
          memory
        ),
      open: () => this._open(path),
      shutdown: () => this._shutdown(holder)
    };
  }

  private _open(path: string | null): void {
    const open = 'docmanager:open';
    if (path !== null && this._app.commands.hasCommand(open)) {
      void this._app.commands.execute(open, { path });
    } else if (this._app.commands.hasCommand(CommandIDs.showPanel)) {
      void this._app.commands.execute(CommandIDs.showPanel);
    }
  }

  private _shutdown({ kernelId }: IHolder): void {
    void this._app.serviceManager.kernels
      .shutdown(kernelId)
      .then(() => this._model.refresh());
  }

  private _changed = new Signal<GpuKernels, void>(this);
}

export const runningPlugin: JupyterFrontEndPlugin<void> = {
  id: 'nbgpu-lab:running',
  description: 'Lists the kernels that hold GPU memory in the Running panel.',
  autoStart: true,
  requires: [ISliceModel],
  optional: [IRunningSessionManagers, ITranslator], // a page of Notebook 7 may have no Running panel
  activate: (
    app: JupyterFrontEnd,
    model: ISliceModel,
    managers: IRunningSessionManagers | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    if (managers) {
      whenPresent(model, () => managers.add(new GpuKernels(app, model, trans)));
    }
  }
};
