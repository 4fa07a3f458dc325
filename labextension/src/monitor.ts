/** The front end of `nbgpu.SliceMonitor()`, bundled into one file for anywidget. The page asks its Jupyter server, never the kernel. */

import type { IDeviceUsage, IKernelUsage, ISliceApi, IUsage } from './api';
import type { Words } from './english';
import {
  formatFraction,
  formatMemory,
  formatMemoryOf,
  kernelTotals,
  overLimit,
  percent
} from './format';
import { suspendedOf, withSuspended } from './suspended';
import { HISTORY_SECONDS, type ISample, linePoints } from './history';
import { SliceModel } from './model';
import { follow, OwnModel, sharedWords } from './page';
import type { ISliceModel } from './tokens';
import { clock, kernelName, sliceName } from './words';

const WARN_PERCENT = 90;
const BOX = { width: 600, height: 40, seconds: HISTORY_SECONDS };

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
    resume: () => Promise.reject(new Error('only the panel resumes')),
    resize: () => Promise.reject(new Error('only the panel resizes'))
  };
}

const own = new OwnModel(() => new SliceModel({ api: pageApi() }));

function element(tag: string, className = '', text?: string): HTMLElement {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) {
    made.textContent = text;
  }
  return made;
}

function bar(
  name: string,
  words: string,
  filled: number,
  kind: 'memory' | 'compute'
): HTMLElement {
  const row = element('div', 'nbgpu-monitor-row');
  row.dataset.level =
    kind === 'memory' && filled >= WARN_PERCENT ? 'warning' : 'ok';
  const track = element('div', `nbgpu-monitor-track nbgpu-monitor-${kind}`);
  const now = String(Math.min(100, filled));
  track.setAttribute('role', 'meter');
  track.setAttribute('aria-label', name);
  track.setAttribute('aria-valuemin', '0');
  track.setAttribute('aria-valuemax', '100');
  track.setAttribute('aria-valuenow', now);
  track.setAttribute('aria-valuetext', words);
  const fill = element('div');
  fill.style.width = `${now}%`;
  track.append(fill);
  row.append(element('span', '', name), track, element('span', '', words));
  return row;
}

function sparkline(
  samples: readonly ISample[],
  top: number,
  trans: Words
): SVGElement {
  const space = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(space, 'svg');
  svg.setAttribute('viewBox', `0 0 ${BOX.width} ${BOX.height}`);
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', trans.__('Memory in the last 10 minutes'));
  const values = samples.map(({ time, memory }) => ({ time, value: memory }));
  const line = document.createElementNS(space, 'polyline');
  const points = linePoints(values, { ...BOX, top });
  line.setAttribute('points', points.map(point => point.join(',')).join(' '));
  svg.append(line);
  return svg;
}

function deviceRows(
  device: IDeviceUsage,
  samples: readonly ISample[],
  trans: Words
): Element[] {
  const used = device.memory_used_bytes;
  const limit = device.memory_limit_bytes;
  const busy = device.utilization_percent;
  const share = formatFraction(device.compute_limit_milli);
  return [
    element(
      'div',
      'nbgpu-monitor-quiet',
      `${trans.__('GPU %1', device.index)} · ${device.model}`
    ),
    bar(
      trans.__('Memory'),
      formatMemoryOf(used, limit, trans),
      percent(used, limit),
      'memory'
    ),
    bar(
      trans.__('Compute'),
      trans.__('%1 % of %2 GPU', busy, share),
      busy,
      'compute'
    ),
    sparkline(samples, limit, trans)
  ];
}

function kernelLine(
  kernel: IKernelUsage,
  usage: IUsage,
  ownId: string,
  trans: Words
): string {
  const used = formatMemory(kernelTotals(kernel).usedBytes);
  const cap = kernel.limit.memory_bytes;
  const name = kernelName(kernel, trans);
  const who =
    kernel.kernel_id === ownId ? trans.__('%1 (this notebook)', name) : name;
  const held =
    cap === null
      ? used
      : trans.__('%1 of its own limit of %2', used, formatMemory(cap));
  const words = [held];
  if (overLimit(kernel, usage.devices)) {
    words.push(trans.__('over'));
  }
  if (suspendedOf(kernel, usage).length > 0) {
    words.push(trans.__('suspended'));
  }
  return `${who}: ${words.join(', ')}`;
}

function sliceParts(
  usage: IUsage,
  model: ISliceModel,
  ownId: string,
  trans: Words
): Element[] {
  const name = sliceName(usage, trans);
  const title =
    usage.mode === 'strict'
      ? trans.__('%1, strict', name)
      : trans.__('%1, burst', name);
  const list = element('ul');
  withSuspended(usage)
    .filter(
      kernel =>
        kernel.devices.length ||
        kernel.kernel_id === ownId ||
        suspendedOf(kernel, usage).length
    )
    .forEach(kernel =>
      list.append(element('li', '', kernelLine(kernel, usage, ownId, trans)))
    );
  return [
    element('div', 'nbgpu-monitor-title', title),
    ...usage.devices.flatMap(device =>
      deviceRows(device, model.history.of(device.uuid), trans)
    ),
    list
  ];
}

function draw(root: HTMLElement, model: ISliceModel, ownId: string): void {
  const trans = sharedWords();
  const parts: Element[] = [];
  const note = (text: string) =>
    parts.push(element('p', 'nbgpu-monitor-note', text));
  if (model.trouble) {
    note(trans.__('No news: %1.', model.trouble));
  } else if (model.absent) {
    note(trans.__('This server has no GPU slice.'));
  } else if (!model.agent.ok) {
    const since = clock(model.agent.since);
    note(trans.__('No news from the node agent since %1.', since));
  }
  if (model.usage?.lent) {
    note(
      trans.__(
        'Others may use this GPU while the server is idle. Run a cell to get it back.'
      )
    );
  }
  if (model.usage) {
    parts.push(...sliceParts(model.usage, model, ownId, trans));
  }
  root.replaceChildren(...parts);
}

interface IRendered {
  model: { get(name: 'kernel_id'): string };
  el: HTMLElement;
}

export default {
  render({ model, el }: IRendered): () => void {
    const root = element('div', 'nbgpu-monitor');
    root.setAttribute('role', 'group');
    root.setAttribute('aria-label', sharedWords().__('GPU slice'));
    el.append(root);
    return follow(own, slice => draw(root, slice, model.get('kernel_id')));
  }
};
