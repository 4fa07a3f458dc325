/** Sentences about a slice, shared by status bar and panel. */

import type { TranslationBundle } from '@jupyterlab/translation';

import type {
  IDeviceUsage,
  IKernelUsage,
  INotice,
  IResizeAnswer,
  IRoom,
  IUsage
} from './api';
import type { Words } from './english';
import {
  formatDuration,
  formatFraction,
  formatMemory,
  fullest,
  type Level,
  memoryLevel
} from './format';
import { HISTORY_SECONDS, HOUR_SECONDS } from './history';
import type { IStale } from './tokens';

/** "1/4 GPU", "2 × 1/4 GPU", with the word "simulated" where it belongs. */
export function sliceName(usage: IUsage, trans: Words): string {
  const share = formatFraction(usage.devices[0].compute_limit_milli);
  const part =
    usage.devices.length > 1 ? `${usage.devices.length} × ${share}` : share;
  return usage.simulated
    ? trans.__('%1 simulated GPU', part)
    : trans.__('%1 GPU', part);
}

export function modeWords(usage: IUsage, trans: TranslationBundle): string {
  return usage.mode === 'strict'
    ? trans.__('strict: never more than its share of time')
    : trans.__('burst: more time while others are idle');
}

/** "40 % of 1/4 GPU"; of a slice that may burst also how far it does. */
export function computeWords(
  device: IDeviceUsage,
  mode: IUsage['mode'],
  trans: Words
): string {
  const over = device.compute_used_milli - device.compute_limit_milli;
  const part = trans.__(
    '%1 % of %2 GPU',
    device.utilization_percent,
    formatFraction(device.compute_limit_milli)
  );
  // a few milli-GPU above the share are rounding; a strict slice has at most its share, though not of each second
  return mode === 'burst' && over > 20
    ? trans.__(
        '%1, bursting to %2',
        part,
        formatFraction(device.compute_used_milli)
      )
    : part;
}

/** Null while there is room. */
export function warningWords(level: Level, trans: Words): string | null {
  if (level === 'over') {
    return trans.__('GPU memory over its limit');
  }
  if (level === 'full') {
    return trans.__('GPU memory full');
  }
  return level === 'warning' ? trans.__('GPU memory almost full') : null;
}

/** The device to show and how near it is to its limit. */
export function nearest(
  usage: IUsage,
  warnPercent: number
): { device: IDeviceUsage; level: Level } {
  const device = fullest(usage.devices);
  const level = memoryLevel(
    device.memory_used_bytes,
    device.memory_limit_bytes,
    warnPercent
  );
  return { device, level };
}

export function kernelName(kernel: IKernelUsage, trans: Words): string {
  if (kernel.kernel_id === null) {
    return trans.__('Other processes');
  }
  return kernel.name ?? trans.__('Kernel %1', kernel.kernel_id.slice(0, 8));
}

const OTHER_DIRECTION =
  /[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufefc]/;

/** A name inside other words: one that is written from right to left leaves the order of what is around it alone. */
export function isolated(name: string): string {
  return OTHER_DIRECTION.test(name) ? `\u2068${name}\u2069` : name;
}

const UNUSED_SECONDS = 60;

/** "busy", "idle for 12 min"; empty where the server does not know the kernel. */
export function stateWords(
  kernel: IKernelUsage,
  trans: TranslationBundle
): string {
  const seconds = kernel.state_seconds ?? null;
  switch (kernel.state) {
    case null:
      return '';
    case 'idle':
      return seconds === null
        ? trans.__('idle')
        : trans.__('idle for %1', formatDuration(seconds));
    case 'busy':
      return trans.__('busy');
    case 'starting':
      // the server learns of a kernel's state when it is first used
      return (seconds ?? 0) < UNUSED_SECONDS
        ? trans.__('starting')
        : trans.__('not used yet');
    case 'restarting':
      return trans.__('restarting');
    case 'dead':
      return trans.__('dead');
    default:
      return kernel.state;
  }
}

/** "Python 3 (ipykernel)", "Data science (R)": with the language where the name does not say it. */
export function kindWords(kernel: IKernelUsage): string {
  const { kernel_name, language } = kernel;
  if (!kernel_name || !language) {
    return kernel_name ?? '';
  }
  const said = kernel_name.toLowerCase().includes(language.toLowerCase());
  return said ? kernel_name : `${kernel_name} (${language})`;
}

/** Where a kernel's limit comes from; empty where it has none. */
export function sourceWords(
  kernel: IKernelUsage,
  trans: TranslationBundle
): string {
  switch (kernel.limit_source) {
    case 'notebook':
      return trans.__('from the notebook');
    case 'panel':
      return trans.__('set here');
    case 'command':
      return trans.__('set by a command');
    default:
      return '';
  }
}

export const RANGES = [60, HISTORY_SECONDS, HOUR_SECONDS];

/** What a part of the history is called: "1 min", "10 min", "1 h". */
export function rangeName(seconds: number, trans: TranslationBundle): string {
  return seconds < HOUR_SECONDS
    ? trans.__('%1 min', seconds / 60)
    : trans.__('%1 h', seconds / 3600);
}

/** Who does not answer, and that what is shown is old. */
export function staleWords(stale: IStale, trans: Words): string {
  const since = clock(stale.since);
  switch (stale.who) {
    case 'agent':
      return trans.__(
        'The node agent has not answered since %1. Limits stay in force; what is shown is from then.',
        since
      );
    case 'server':
      return trans.__(
        'The Jupyter server has not answered since %1. What is shown is from then.',
        since
      );
    case 'stopped':
      return trans.__(
        'This server was stopped. What is shown is from %1.',
        since
      );
    case 'nobody':
      return trans.__(
        'The Jupyter server has told this page nothing since %1: it was started anew, or your login is over. Reload the page.',
        since
      );
  }
}

const SHORTEST_NAME = 12;

/**
 * What a notice says, in `length` characters at most: with the notebook's name where there is room, a long name cut in its middle, else
 * without the last sentences (what to do), which the panel has.
 */
export function shortened(notice: INotice, length: number): string {
  const name = notice.name ?? '';
  const named = notice.message.includes(name)
    ? notice.message
    : `${isolated(name)}: ${notice.message}`;
  const over = named.length - length;
  if (over <= 0) {
    return named;
  }
  if (name.length - over >= SHORTEST_NAME) {
    const cut = cutInTheMiddle(name, name.length - over);
    return named.replace(name, () => cut);
  }
  const cut = cutInTheMiddle(name, SHORTEST_NAME * 2);
  const short = named.replace(name, () => cut);
  const sentences = short.split(/(?<=\.) /);
  while (sentences.length > 1 && sentences.join(' ').length > length) {
    sentences.pop();
  }
  const text = sentences.join(' ');
  return text.length <= length
    ? text
    : `${text.slice(0, text.lastIndexOf(' ', length - 1))}…`;
}

/** "a-notebook-with-…-name.ipynb"; a letter of two halves is never cut in two. */
function cutInTheMiddle(name: string, length: number): string {
  if (name.length <= length) {
    return name;
  }
  const end = Math.floor((length - 1) / 2);
  const begins = name
    .slice(0, length - 1 - end)
    .replace(/[\ud800-\udbff]$/, '');
  const ends = name.slice(name.length - end).replace(/^[\udc00-\udfff]/, '');
  return `${begins}…${ends}`;
}

/** "14:02:31" in the reader's own way. */
export function clock(seconds: number): string {
  return new Date(seconds * 1000).toLocaleTimeString();
}

/** What is free beside the slice: "Free on GPU 0 now: 1/2 of its time, 39 GiB of its memory." */
export function roomWords(room: IRoom, trans: TranslationBundle): string[] {
  return room.devices.map(({ index, free_milli, free_bytes }) =>
    trans.__(
      'Free on GPU %1 now: %2 of its time, %3 of its memory.',
      index,
      formatFraction(free_milli),
      formatMemory(free_bytes)
    )
  );
}

/** The limits in force, to compare with others. */
export function limitsOf(usage: IUsage): string {
  return JSON.stringify(
    usage.devices.map(({ memory_limit_bytes, compute_limit_milli }) => [
      memory_limit_bytes,
      compute_limit_milli
    ])
  );
}

export function isShown({ devices }: IResizeAnswer, usage: IUsage): boolean {
  const [asked] = devices;
  const [now] = usage.devices;
  return (
    asked?.compute_milli === now.compute_limit_milli &&
    asked.memory_bytes === now.memory_limit_bytes
  );
}

/** What became of a wish, in words: "Granted: 1/2 GPU with 39 GiB of memory." */
export function answerWords(
  answer: IResizeAnswer,
  usage: IUsage,
  trans: TranslationBundle
): string {
  const [device] = answer.devices;
  const size = device
    ? trans.__(
        '%1 GPU with %2 of memory',
        formatFraction(device.compute_milli),
        formatMemory(device.memory_bytes)
      )
    : trans.__('as asked');
  const what =
    answer.in_force || isShown(answer, usage)
      ? trans.__('Granted: %1.', size)
      : trans.__('Granted: %1. It is in force once it is shown above.', size);
  return answer.note ? `${what} ${answer.note}` : what;
}
