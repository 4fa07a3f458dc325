/** Keeps a kernel's limits in its notebook's metadata, where the kernel provisioner finds them at the next start. */

import type { Contents } from '@jupyterlab/services';

import type { IKernelUsage, IWrittenLimit } from './api';

export const METADATA = 'nbgpu';

export interface ILimitKeeper {
  /** Rejects where the notebook cannot be written. */
  keep(kernel: IKernelUsage, limit: IWrittenLimit): Promise<void>;
}

/** What is asked of an open document; whatever lacks it is no notebook. */
interface IOpenNotebook {
  context: {
    path: string;
    model: {
      getMetadata(key: string): unknown;
      setMetadata(key: string, value: unknown): void;
      deleteMetadata(key: string): void;
    };
    save(): Promise<void>;
  };
}

interface IKept {
  memory?: unknown;
  memory_bytes?: number;
  compute?: unknown;
  compute_milli?: number;
}

/**
 * The metadata for a limit, null where there is none to keep. Words stay words: half of a slice is half of the next one too.
 *
 * `before` is what the notebook says and what is in force: of a limit that was not touched its words stay.
 */
export function metadataOf(
  limit: IWrittenLimit,
  before: unknown = null
): IKept | null {
  const words =
    typeof before === 'object' && before !== null ? (before as IKept) : {};
  const kept: IKept = {};
  if (limit.memory?.trim()) {
    kept.memory = limit.memory.trim();
  } else if (typeof limit.memory_bytes === 'number') {
    if (words.memory) {
      kept.memory = words.memory;
    } else {
      kept.memory_bytes = limit.memory_bytes;
    }
  }
  if (limit.compute?.trim()) {
    kept.compute = limit.compute.trim();
  } else if (typeof limit.compute_milli === 'number') {
    if (words.compute) {
      kept.compute = words.compute;
    } else {
      kept.compute_milli = limit.compute_milli;
    }
  }
  return Object.keys(kept).length > 0 ? kept : null;
}

/** A notebook that is open on this page is changed there and saved; any other is changed in its file. */
export class NotebookKeeper implements ILimitKeeper {
  constructor(
    private _documents: () => Iterable<unknown>,
    private _contents: Pick<Contents.IManager, 'get' | 'save' | 'localPath'>
  ) {}

  async keep(kernel: IKernelUsage, limit: IWrittenLimit): Promise<void> {
    const path = kernel.path!;
    const own = kernel.limit_source === 'notebook';
    const open = this._open(path);
    if (open) {
      const { model } = open.context;
      const kept = metadataOf(limit, own && model.getMetadata(METADATA));
      if (kept) {
        model.setMetadata(METADATA, kept);
      } else {
        model.deleteMetadata(METADATA);
      }
      await open.context.save();
      return;
    }
    const file = await this._contents.get(path, {
      type: 'notebook',
      content: true
    });
    const { [METADATA]: before, ...metadata } = file.content.metadata ?? {};
    const kept = metadataOf(limit, own && before);
    await this._contents.save(path, {
      type: 'notebook',
      format: 'json',
      content: {
        ...file.content,
        metadata: kept ? { ...metadata, [METADATA]: kept } : metadata
      }
    });
  }

  private _open(path: string): IOpenNotebook | null {
    for (const one of this._documents()) {
      const context = (one as Partial<IOpenNotebook>).context;
      if (
        context?.model?.setMetadata &&
        this._contents.localPath(context.path) === path
      ) {
        return one as IOpenNotebook;
      }
    }
    return null;
  }
}
