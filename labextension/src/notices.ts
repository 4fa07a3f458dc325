import type {
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import { ILoggerRegistry } from '@jupyterlab/logconsole';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { logNotices } from './log';
import { news } from './news';
import { Notifier } from './notifier';
import { CommandIDs, DOMAIN, ISliceModel } from './tokens';

const PANEL = 'nbgpu-panel';

/** Whether the side panel is open, on whichever side. */
function panelInView(app: JupyterFrontEnd): boolean {
  return ['right', 'left'].some(area =>
    [...app.shell.widgets(area)].some(
      widget => widget.id === PANEL && widget.isVisible
    )
  );
}

export const noticesPlugin: JupyterFrontEndPlugin<void> = {
  id: 'nbgpu-lab:notices',
  description:
    'Notifications when the slice refuses memory or a process does not keep its limit.',
  autoStart: true,
  requires: [ISliceModel],
  optional: [ITranslator],
  activate: (
    app: JupyterFrontEnd,
    model: ISliceModel,
    translator: ITranslator | null
  ) => {
    new Notifier({
      model,
      notifications: Notification,
      trans: (translator ?? nullTranslator).load(DOMAIN),
      news,
      openPanel: () => void app.commands.execute(CommandIDs.showPanel),
      panelInView: () => panelInView(app)
    });
  }
};

export const logPlugin: JupyterFrontEndPlugin<void> = {
  id: 'nbgpu-lab:log',
  description: "Writes the slice's notices into the logs of their notebooks.",
  autoStart: true,
  requires: [ISliceModel],
  optional: [ILoggerRegistry, ITranslator], // Notebook 7 may have no log console
  activate: (
    _: JupyterFrontEnd,
    model: ISliceModel,
    loggers: ILoggerRegistry | null,
    translator: ITranslator | null
  ) => {
    if (loggers) {
      logNotices(model, loggers, (translator ?? nullTranslator).load(DOMAIN));
    }
  }
};
