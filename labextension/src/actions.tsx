import type {
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { Dialog, showDialog } from '@jupyterlab/apputils';
import type { Kernel } from '@jupyterlab/services';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { TranslationBundle } from '@jupyterlab/translation';
import { MenuSvg } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { IKernelUsage } from './api';
import { whereTo, whyNotMoved } from './away';
import { formatMemory, kernelTotals } from './format';
import { CALLS, EXPRESSION, freedWords, whyNotFree } from './free';
import { kernelMenu } from './kernelmenu';
import { news } from './news';
import { sliceApi } from './request';
import { DOMAIN, ISliceModel } from './tokens';
import { isolated, kernelName } from './words';

const FREE = 'nbgpu:free-caches';
const MOVE = 'nbgpu:move-kernel';
const RESTART = 'nbgpu:restart-kernel';
const ANSWER_MS = 20_000;
/** Of what a kernel says of an error, so many characters are shown. */
const MOST_WORDS = 200;
/** The server shows what is used at most this old. */
const SEEN_SECONDS = 1.1;

/** What can be done with one of this server's kernels, with the user's consent. */
class Actions {
  constructor(
    private _services: JupyterFrontEnd['serviceManager'],
    private _model: ISliceModel,
    private _trans: TranslationBundle
  ) {}

  find(kernelId: unknown): IKernelUsage | undefined {
    return this._model.usage?.kernels.find(
      kernel => kernel.kernel_id !== null && kernel.kernel_id === kernelId
    );
  }

  /** Why its caches cannot be freed now; null when they can. */
  whyNot(kernelId: unknown): string | null {
    const kernel = this.find(kernelId);
    const name = this._running(kernelId)?.name ?? '';
    const specs = this._services.kernelspecs.specs?.kernelspecs;
    const state = kernel?.state ?? null;
    const language = specs?.[name]?.language ?? null;
    const lent = Boolean(this._model.usage?.lent);
    return whyNotFree({ state, language, lent }, this._trans);
  }

  async free(kernelId: unknown): Promise<void> {
    const kernel = this.find(kernelId);
    const trans = this._trans;
    if (!kernel) {
      return;
    }
    const name = isolated(kernelName(kernel, trans));
    const { button } = await showDialog({
      title: trans.__('Free caches of %1?', name),
      body: (
        <div className="nbgpu-Consent-body">
          <p>
            {trans.__(
              'Frameworks keep GPU memory that they do not use now. This runs in the kernel, for what it has imported, and leaves your variables alone:'
            )}
          </p>
          <pre className="nbgpu-Consent">{CALLS.join('\n')}</pre>
        </div>
      ),
      buttons: [
        Dialog.cancelButton(),
        Dialog.okButton({ label: trans.__('Free caches') })
      ]
    });
    if (!button.accept) {
      return;
    }
    const before = this._held(kernelId);
    try {
      const said = await this._run(kernelId);
      await this._seen();
      const after = this._held(kernelId);
      this._say(kernel, 'info', freedWords(said, before, after, trans));
    } catch (error) {
      const words = (error as Error).message;
      this._say(
        kernel,
        'warning',
        trans.__('Caches were not freed: %1', words)
      );
    }
  }

  async restart(kernelId: unknown): Promise<void> {
    const kernel = this.find(kernelId);
    const trans = this._trans;
    if (!kernel) {
      return;
    }
    const { button } = await showDialog({
      title: trans.__(
        'Restart the kernel of %1?',
        isolated(kernelName(kernel, trans))
      ),
      body: trans.__(
        'All variables are lost. The %1 of GPU memory that it holds are freed.',
        formatMemory(this._held(kernelId))
      ),
      buttons: [
        Dialog.cancelButton(),
        Dialog.warnButton({ label: trans.__('Restart') })
      ]
    });
    if (!button.accept) {
      return;
    }
    try {
      const connection = this._connect(kernelId);
      await connection.restart().finally(() => connection.dispose());
      void this._model.refresh();
    } catch (error) {
      const words = (error as Error).message;
      this._say(kernel, 'warning', trans.__('Not restarted: %1', words));
    }
  }

  /** Whether its GPU memory may be moved to the host's, or back; null: neither. */
  whereTo(kernelId: unknown): 'suspend' | 'resume' | null {
    return whereTo(this.find(kernelId), this._mayMoveAny);
  }

  /** Why neither; null where one is. */
  whyNotMoved(kernelId: unknown): string | null {
    return whyNotMoved(this.find(kernelId), this._mayMoveAny, this._trans);
  }

  async move(kernelId: unknown): Promise<void> {
    const kernel = this.find(kernelId);
    const where = this.whereTo(kernelId);
    if (!kernel || !where) {
      return;
    }
    if (where === 'suspend' && !(await this._mayMove(kernel))) {
      return;
    }
    try {
      const api = sliceApi(this._services.serverSettings);
      await api.move(String(kernelId), where);
      void this._model.refresh();
    } catch (error) {
      this._say(kernel, 'warning', (error as Error).message);
    }
  }

  private get _mayMoveAny(): boolean {
    return this._model.usage?.may_suspend ?? false;
  }

  private async _mayMove(kernel: IKernelUsage): Promise<boolean> {
    const trans = this._trans;
    const { button } = await showDialog({
      title: trans.__(
        'Move the GPU memory of %1 to host memory?',
        isolated(kernelName(kernel, trans))
      ),
      body: trans.__(
        "Its %1 are then free for this server's other notebooks. Nothing is lost: they come back when it is used again, as soon as there is room for them.",
        formatMemory(kernelTotals(kernel).usedBytes)
      ),
      buttons: [
        Dialog.cancelButton(),
        Dialog.okButton({ label: trans.__('Move') })
      ]
    });
    return button.accept;
  }

  private _running(kernelId: unknown): Kernel.IModel | undefined {
    return [...this._services.kernels.running()].find(
      ({ id }) => id === kernelId
    );
  }

  private _connect(kernelId: unknown): Kernel.IKernelConnection {
    const model = this._running(kernelId);
    if (!model) {
      throw new Error(this._trans.__('it is no kernel of this server.'));
    }
    return this._services.kernels.connectTo({ model });
  }

  private _held(kernelId: unknown): number {
    const kernel = this.find(kernelId);
    return kernel ? kernelTotals(kernel).usedBytes : 0;
  }

  /** Run the code, silently; return what it says. */
  private async _run(kernelId: unknown): Promise<string> {
    const connection = this._connect(kernelId);
    let timer = 0;
    const late = new Promise<never>((_, reject) => {
      const words = this._trans.__(
        'the kernel does not answer. It frees them once it does.'
      );
      timer = window.setTimeout(() => reject(new Error(words)), ANSWER_MS);
    });
    try {
      const future = connection.requestExecute({
        code: '',
        silent: true,
        store_history: false,
        allow_stdin: false,
        stop_on_error: false,
        user_expressions: { said: EXPRESSION }
      });
      const { content } = await Promise.race([future.done, late]);
      const said = (content as any).user_expressions?.said;
      if (said?.status !== 'ok') {
        throw new Error(
          String(said?.evalue ?? this._trans.__('it was refused.')).slice(
            0,
            MOST_WORDS
          )
        );
      }
      return String(said.data['text/plain']);
    } finally {
      window.clearTimeout(timer);
      connection.dispose();
    }
  }

  /** Wait until the model shows what is used now. */
  private async _seen(): Promise<void> {
    const start = this._model.usage?.time ?? 0;
    for (let tries = 0; tries < 5; tries++) {
      await new Promise(resolve => setTimeout(resolve, SEEN_SECONDS * 1000));
      await this._model.refresh();
      if ((this._model.usage?.time ?? 0) >= start + SEEN_SECONDS) {
        return;
      }
    }
  }

  private _say(
    kernel: IKernelUsage,
    level: 'info' | 'warning',
    message: string
  ): void {
    const { kernel_id, name, path } = kernel;
    const time = Date.now() / 1000;
    const about = { kernel_id, name, path, kind: 'freed', level, message };
    const latest = { id: -time, time, ...about };
    news.show({ id: latest.id, thing: 'freed', latest, times: 1 });
  }
}

export const actionsPlugin: JupyterFrontEndPlugin<void> = {
  id: 'nbgpu-lab:actions',
  description: 'Frees GPU memory of one kernel: caches, or all by a restart.',
  autoStart: true,
  requires: [ISliceModel],
  optional: [ITranslator],
  activate: (
    app: JupyterFrontEnd,
    model: ISliceModel,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const actions = new Actions(app.serviceManager, model, trans);
    app.commands.addCommand(FREE, {
      label: ({ kernelId }) => {
        const why = actions.whyNot(kernelId);
        return why
          ? trans.__('Free Caches (%1)', why)
          : trans.__('Free Caches…');
      },
      isEnabled: ({ kernelId }) => actions.whyNot(kernelId) === null,
      execute: ({ kernelId }) => actions.free(kernelId)
    });
    app.commands.addCommand(MOVE, {
      label: ({ kernelId }) => {
        if (actions.whereTo(kernelId) === 'resume') {
          return trans.__('Bring Back to the GPU');
        }
        const why = actions.whyNotMoved(kernelId);
        return why
          ? trans.__('Move to Host Memory (%1)', why)
          : trans.__('Move to Host Memory…');
      },
      isEnabled: ({ kernelId }) => actions.whereTo(kernelId) !== null,
      execute: ({ kernelId }) => actions.move(kernelId)
    });
    app.commands.addCommand(RESTART, {
      label: trans.__('Restart Kernel…'),
      isEnabled: ({ kernelId }) => actions.find(kernelId) !== undefined,
      execute: ({ kernelId }) => actions.restart(kernelId)
    });
    kernelMenu.open = (kernelId, anchor) => {
      const menu = new MenuSvg({ commands: app.commands });
      menu.addItem({ command: FREE, args: { kernelId } });
      menu.addItem({ command: MOVE, args: { kernelId } });
      menu.addItem({ command: RESTART, args: { kernelId } });
      const { left, bottom } = anchor.getBoundingClientRect();
      menu.aboutToClose.connect(() => {
        anchor.focus();
        requestAnimationFrame(() => menu.dispose());
      });
      menu.open(left, bottom);
    };
  }
};
