/** The kernels that hold GPU memory, for lists that show nothing else of the slice. */

import type { IUsage } from './api';
import { formatMemory, kernelTotals } from './format';

export interface IHolder {
  kernelId: string;
  name: string | null;
  /** Of its notebook; null where it has none that can be opened. */
  path: string | null;
  memory: string;
}

/** Who holds memory, the most first. */
export function holders(usage: IUsage | null): IHolder[] {
  return (usage?.kernels ?? [])
    .map(kernel => ({ kernel, bytes: kernelTotals(kernel).usedBytes }))
    .filter(({ kernel, bytes }) => kernel.kernel_id !== null && bytes > 0)
    .sort((a, b) => b.bytes - a.bytes)
    .map(({ kernel, bytes }) => ({
      kernelId: kernel.kernel_id!,
      name: kernel.name,
      path: kernel.type === 'notebook' ? kernel.path : null,
      memory: formatMemory(bytes)
    }));
}
