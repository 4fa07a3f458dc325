import type {
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { ICommandPalette, IWindowResolver } from '@jupyterlab/apputils';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { IStateDB } from '@jupyterlab/statedb';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { Signal } from '@lumino/signaling';

import { actionsPlugin } from './actions';
import { monitorPlugin } from './cell';
import { sliceIcon } from './icons';
import { NotebookKeeper } from './keep';
import { SliceModel } from './model';
import { logPlugin, noticesPlugin } from './notices';
import { shareModel } from './page';
import { SlicePanel } from './panel';
import { onChange, whenPresent } from './present';
import { keepRange } from './range';
import { reopen, tabMemory } from './reopen';
import { sliceApi } from './request';
import { runningPlugin } from './running';
import { onShutDown } from './shutdown';
import { StatusItem } from './status';
import { CommandIDs, DOMAIN, ISliceModel } from './tokens';

export { ISliceModel } from './tokens';

const SCHEMA_ID = 'https://schema.nbgpu.io/slice/v1';
const MODEL_PLUGIN = 'nbgpu-lab:model';

const modelPlugin: JupyterFrontEndPlugin<ISliceModel> = {
  id: MODEL_PLUGIN,
  description: 'Follows the GPU slice of this Jupyter server.',
  autoStart: true,
  provides: ISliceModel,
  optional: [ISettingRegistry, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    settings: ISettingRegistry | null,
    translator: ITranslator | null
  ) => {
    const services = app.serviceManager;
    const model = new SliceModel({ api: sliceApi(services.serverSettings) });
    onShutDown(services.serverSettings.baseUrl, () => model.ends());
    shareModel(model, (translator ?? nullTranslator).load(DOMAIN));
    services.events.stream.connect((_, event) => {
      if ((event.schema_id as unknown) === SCHEMA_ID) {
        model.hear();
      }
    });
    void settings?.load(MODEL_PLUGIN).then(loaded => {
      const configure = () =>
        model.configure({
          warnPercent: loaded.get('warnPercent').composite as number,
          pollSeconds: loaded.get('pollSeconds').composite as number,
          showStatus: loaded.get('showStatus').composite as boolean,
          showPanel: loaded.get('showPanel').composite as boolean,
          notify: loaded.get('notify').composite as boolean
        });
      loaded.changed.connect(configure);
      configure();
      keepRange(model, loaded);
    });
    return model;
  }
};

const panelPlugin: JupyterFrontEndPlugin<void> = {
  id: 'nbgpu-lab:panel',
  description: 'A side panel with the GPU slice, its kernels and their limits.',
  autoStart: true,
  requires: [ISliceModel],
  optional: [ICommandPalette, ITranslator, IStateDB, IWindowResolver],
  activate: (
    app: JupyterFrontEnd,
    model: ISliceModel,
    palette: ICommandPalette | null,
    translator: ITranslator | null,
    state: IStateDB | null,
    workspaces: IWindowResolver | null
  ) => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    whenPresent(model, () => {
      const keeper = new NotebookKeeper(
        () => app.shell.widgets('main'),
        app.serviceManager.contents
      );
      const panel = new SlicePanel(model, trans, keeper);
      const place = () =>
        app.shell.add(panel, 'right', { rank: 700, type: 'GPU' });
      const follow = (shown: boolean) => {
        if (shown && !panel.isAttached) {
          place();
        } else if (!shown) {
          panel.parent = null;
        }
      };
      follow(model.showPanel);
      onChange(model, () => model.showPanel, follow);
      app.commands.addCommand(CommandIDs.showPanel, {
        label: trans.__('Show GPU Slice'),
        icon: sliceIcon,
        execute: () => {
          if (!panel.isAttached) {
            place(); // whoever asks for it sees it, though it is not in the side bar by itself
          }
          app.shell.activateById(panel.id);
        }
      });
      palette?.addItem({
        command: CommandIDs.showPanel,
        category: trans.__('GPU')
      });
      const memory = state && workspaces ? state : tabMemory; // without workspaces Jupyter forgets its state with the page
      void app.restored.then(() =>
        reopen(panel, memory, () => app.shell.activateById(panel.id))
      );
    });
  }
};

const statusPlugin: JupyterFrontEndPlugin<void> = {
  id: 'nbgpu-lab:status',
  description: 'GPU memory and compute of the slice in the status bar.',
  autoStart: true,
  requires: [ISliceModel],
  optional: [IStatusBar, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    model: ISliceModel,
    statusBar: IStatusBar | null,
    translator: ITranslator | null
  ) => {
    if (!statusBar) {
      return; // Notebook 7 has none
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const item = new StatusItem(
      model,
      trans,
      () => void app.commands.execute(CommandIDs.showPanel)
    );
    const activeStateChanged = new Signal<StatusItem, void>(item);
    const isActive = () => model.present && model.showStatus;
    onChange(model, isActive, () => activeStateChanged.emit());
    statusBar.registerStatusItem('nbgpu-lab:status', {
      item,
      align: 'left',
      rank: 3,
      priority: 1,
      isActive,
      activeStateChanged
    });
  }
};

const plugins: JupyterFrontEndPlugin<any>[] = [
  modelPlugin,
  actionsPlugin,
  panelPlugin,
  statusPlugin,
  monitorPlugin,
  noticesPlugin,
  logPlugin,
  runningPlugin
];

export default plugins;
