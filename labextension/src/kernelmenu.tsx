import type { TranslationBundle } from '@jupyterlab/translation';
import { ellipsesIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

/** Opens the menu of a kernel below what was clicked; null on a page where nothing can be done with kernels. */
export const kernelMenu: {
  open: ((kernelId: string, anchor: HTMLElement) => void) | null;
} = { open: null };

/** The button that opens the menu of one kernel. */
export function KernelMenuButton(props: {
  kernelId: string | null;
  name: string;
  trans: TranslationBundle;
}): JSX.Element | null {
  const { kernelId, name, trans } = props;
  const words = trans.__('Actions for %1', name);
  return kernelId === null || kernelMenu.open === null ? null : (
    <button
      type="button"
      className="nbgpu-KernelMenu"
      aria-haspopup="menu"
      aria-label={words}
      title={words}
      onClick={event => kernelMenu.open?.(kernelId, event.currentTarget)}
    >
      <ellipsesIcon.react tag="span" width="14px" />
    </button>
  );
}
