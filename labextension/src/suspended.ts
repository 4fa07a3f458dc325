/** Which suspended processes are a kernel's, and what is said of them. */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { IKernelUsage, ISuspension, IUsage } from './api';

const OTHER: IKernelUsage = {
  kernel_id: null,
  limit: { memory_bytes: null, compute_milli: null },
  devices: [],
  refusals: 0,
  launches: 0,
  idle_seconds: null,
  name: null,
  path: null,
  type: null,
  state: null
};

/** A kernel's suspended processes; "other" has those of no kernel that is known. */
export function suspendedOf(
  kernel: IKernelUsage,
  usage: IUsage
): ISuspension[] {
  const known = new Set(usage.kernels.map(one => one.kernel_id));
  return (usage.suspended ?? []).filter(({ kernel_id }) =>
    kernel.kernel_id === null
      ? kernel_id === null || !known.has(kernel_id)
      : kernel_id === kernel.kernel_id
  );
}

/** The kernels, with "other" among them where a suspended process is of none of them. */
export function withSuspended(usage: IUsage): IKernelUsage[] {
  const needed =
    usage.kernels.every(kernel => kernel.kernel_id !== null) &&
    suspendedOf(OTHER, usage).length > 0;
  return needed ? [...usage.kernels, OTHER] : usage.kernels;
}

/** What happened and what to do. */
export function suspendedWords(
  one: ISuspension,
  mayResume: boolean,
  trans: TranslationBundle
): string {
  const what =
    one.how === 'lock'
      ? trans.__(
          'Suspended: its calls to the GPU wait, because %1.',
          one.reason
        )
      : trans.__('Suspended: it stands still, because %1.', one.reason);
  return mayResume
    ? what
    : `${what} ${trans.__('Restart it, or ask your administrator.')}`;
}
