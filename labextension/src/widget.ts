/**
 * The front end of `nbgpu_lab.widget.SliceMonitor`, bundled into one file for anywidget: for pages of a Jupyter server that do not have our
 * extension. The page asks the server, never the kernel.
 */

import type { ISliceApi } from './api';
import { drawInView } from './inview';
import { SliceModel } from './model';
import { drawMonitor, monitorRoot } from './monitor';
import { follow, OwnModel, sharedWords } from './page';
import type { ISliceModel } from './tokens';

/** Where the page's Jupyter server is and how to be let in, for pages without our extension (nor its words: they are English). */
function pageApi(): ISliceApi {
  let config: { baseUrl?: string; token?: string } = {};
  try {
    const told = document.getElementById('jupyter-config-data')?.textContent;
    config = JSON.parse(told ?? '{}');
  } catch {
    // a page of its own making: its base URL is what is left
  }
  const path = config.baseUrl || document.body.dataset.baseUrl || '/';
  const base = new URL(path, document.baseURI).href;
  const headers: { [name: string]: string } = {};
  if (config.token) {
    headers.Authorization = `token ${config.token}`;
  }
  const ask = async (route: string): Promise<any> => {
    const url = new URL(`nbgpu/api/${route}`, base).href;
    const init = { headers, credentials: 'same-origin', cache: 'no-store' };
    const answer = await fetch(url, init as RequestInit);
    if (!answer.ok) {
      throw new Error(
        answer.status === 404
          ? 'this Jupyter server has no nbgpu'
          : `the Jupyter server answers ${answer.status}`
      );
    }
    return answer.json();
  };
  return {
    usage: after => ask(`usage?after=${after}`),
    history: seconds => ask(`history?seconds=${seconds}`),
    setLimit: () => Promise.reject(new Error('only the panel sets limits')),
    move: () => Promise.reject(new Error('only the panel moves kernels')),
    resume: () => Promise.reject(new Error('only the panel resumes')),
    room: () => Promise.reject(new Error('only the panel resizes')),
    resize: () => Promise.reject(new Error('only the panel resizes'))
  };
}

const own = new OwnModel(() => new SliceModel({ api: pageApi() }));

interface IRendered {
  model: { get(name: 'kernel_id'): string };
  el: HTMLElement;
}

export default {
  render({ model, el }: IRendered): () => void {
    const root = monitorRoot(sharedWords());
    el.append(root);
    let slice: ISliceModel;
    const drawn = drawInView(root, () =>
      drawMonitor(root, slice, model.get('kernel_id'), sharedWords())
    );
    const leave = follow(own, now => {
      slice = now;
      drawn.redraw();
    });
    return () => {
      leave();
      drawn.forget();
    };
  }
};
