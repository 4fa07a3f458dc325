import type { TranslationBundle } from '@jupyterlab/translation';

import type { IKernelUsage, IUsageAnswer } from '../../../labextension/src/api';

export const GIB = 1024 ** 3;

const fill = (text: string, words: unknown[]) =>
  text.replace(/%(\d)/g, (_, number: string) =>
    String(words[Number(number) - 1])
  );

/** English, untranslated. */
export const trans = {
  __: (text: string, ...words: unknown[]) => fill(text, words),
  _n: (one: string, many: string, n: number) => fill(n === 1 ? one : many, [n])
} as unknown as TranslationBundle;

export function kernel(part: Partial<IKernelUsage> = {}): IKernelUsage {
  return {
    kernel_id: 'a',
    limit: { memory_bytes: null, compute_milli: null },
    devices: [],
    refusals: 0,
    launches: 0,
    idle_seconds: null,
    name: 'train.ipynb',
    path: 'train.ipynb',
    type: 'notebook',
    state: 'idle',
    ...part
  };
}

/** A slice of 20 GiB and a quarter of the time, at a time in seconds. */
export function answer(time: number, usedGiB = 3): IUsageAnswer {
  return {
    slice_id: 'slice',
    mode: 'burst',
    backend: 'limiter',
    simulated: true,
    time,
    devices: [
      {
        uuid: 'GPU-1',
        index: 0,
        model: 'Simulated H100 80GB',
        memory_limit_bytes: 20 * GIB,
        memory_used_bytes: usedGiB * GIB,
        compute_limit_milli: 250,
        compute_used_milli: 100,
        utilization_percent: 40
      }
    ],
    kernels: [kernel()],
    agent: { ok: true, since: 0 },
    last_event: 0,
    events: []
  };
}
