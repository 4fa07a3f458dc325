import type { IStateDB } from '@jupyterlab/statedb';
import { MessageLoop } from '@lumino/messaging';
import type { Widget } from '@lumino/widgets';

const KEY = 'nbgpu-lab:panel';

/** What outlives a page. */
export type Memory = Pick<IStateDB, 'fetch' | 'save'>;

/** The browser's tab: in Notebook 7, which has a tab for each notebook, and whose own state ends with the page. */
export const tabMemory: Memory = {
  fetch: async id => JSON.parse(sessionStorage.getItem(id) ?? '{}'),
  save: async (id, value) => sessionStorage.setItem(id, JSON.stringify(value))
};

/**
 * Open a side panel again that was open when the page was left.
 *
 * JupyterLab's own restorer comes too early for it: the panel is there only once the server has said that it has a slice.
 */
export async function reopen(
  panel: Widget,
  state: Memory,
  show: () => void
): Promise<void> {
  const last = (await state.fetch(KEY).catch(() => undefined)) as
    { open?: unknown } | undefined;
  MessageLoop.installMessageHook(panel, (_, message) => {
    if (message.type === 'after-show' || message.type === 'before-hide') {
      const open = message.type === 'after-show';
      state.save(KEY, { open }).catch(() => undefined); // it is a comfort, and no more
    }
    return true;
  });
  if (last?.open === true && panel.isAttached && !panel.isVisible) {
    show();
  }
}
