/**
 * What `nbgpu.SliceMonitor()` shows in a cell. The numbers and names are the page's model's; of what the notebook has only the kernel's id
 * is taken, to compare it with. All of it is set as text.
 */

import type { IDeviceUsage, IKernelUsage, IUsage } from './api';
import type { Words } from './english';
import {
  formatMemory,
  formatMemoryOf,
  kernelTotals,
  type Level,
  memoryLevel,
  overLimit,
  percent
} from './format';
import { suspendedOf, withSuspended } from './suspended';
import { HISTORY_SECONDS, type ISample, linePoints } from './history';
import type { ISliceModel } from './tokens';
import {
  clock,
  computeWords,
  isolated,
  kernelName,
  sliceName,
  staleWords,
  warningWords
} from './words';

/** What a cell's output has of the monitor: `{"kernel_id": "…"}`, the kernel to mark as this notebook's. */
export const MONITOR_MIME = 'application/vnd.nbgpu.monitor+json';

const WARN_PERCENT = 90;
const BOX = { width: 600, height: 40, seconds: HISTORY_SECONDS };

/** The kernel that an output names; empty where what it has is not ours: a notebook may come from anybody. */
export function kernelIdIn(data: unknown): string {
  const { kernel_id } = Object(data) as { kernel_id?: unknown };
  return typeof kernel_id === 'string' ? kernel_id : '';
}

/** What the monitor is drawn in. */
export function monitorRoot(trans: Words): HTMLElement {
  const root = element('div', 'nbgpu-monitor');
  root.setAttribute('role', 'group');
  root.setAttribute('aria-label', trans.__('GPU slice'));
  return root;
}

/** Draw what the model has now. */
export function drawMonitor(
  root: HTMLElement,
  model: ISliceModel,
  ownId: string,
  trans: Words
): void {
  const parts: Element[] = [];
  root.dataset.stale = model.stale || !model.agent.ok ? 'true' : 'false';
  const note = (text: string) =>
    parts.push(element('p', 'nbgpu-monitor-note', text));
  if (model.stale?.who === 'stopped') {
    note(staleWords(model.stale, trans));
  } else if (model.trouble) {
    note(trans.__('No news: %1.', model.trouble));
  } else if (model.absent) {
    note(
      trans.__(
        'This server has no GPU slice. On a hub, stop it (File › Hub Control Panel) and choose a fraction of a GPU at its start.'
      )
    );
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
  kind: 'memory' | 'compute',
  level: Level = 'ok'
): HTMLElement {
  const row = element('div', 'nbgpu-monitor-row');
  row.dataset.level = level;
  const track = element('div', `nbgpu-monitor-track nbgpu-monitor-${kind}`);
  const now = String(Math.max(0, Math.min(100, filled)));
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
  mode: IUsage['mode'],
  samples: readonly ISample[],
  trans: Words
): Element[] {
  const used = device.memory_used_bytes;
  const limit = device.memory_limit_bytes;
  const busy = device.utilization_percent;
  const level = memoryLevel(used, limit, WARN_PERCENT);
  return [
    element(
      'div',
      'nbgpu-monitor-quiet',
      `${trans.__('GPU %1', device.index)} · ${device.model}`
    ),
    bar(
      trans.__('Memory'),
      [formatMemoryOf(used, limit, trans), warningWords(level, trans)]
        .filter(Boolean)
        .join(' · '),
      percent(used, limit),
      'memory',
      level
    ),
    bar(
      trans.__('Compute'),
      computeWords(device, mode, trans),
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
  const name = isolated(kernelName(kernel, trans));
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
      deviceRows(device, usage.mode, model.history.of(device.uuid), trans)
    ),
    list
  ];
}
