import { Token } from '@lumino/coreutils';
import type { IDisposable } from '@lumino/disposable';
import type { ISignal } from '@lumino/signaling';

import type {
  IAgentState,
  INotice,
  IResizeAnswer,
  IRoom,
  IUsage,
  IWrittenLimit,
  IWrittenSize
} from './api';
import type { History } from './history';

export interface IStale {
  /** Nobody: the server answers, but not this page, whose login is over. Stopped: JupyterHub says that the server does not run. */
  who: 'server' | 'agent' | 'nobody' | 'stopped';
  /** Unix time, seconds. */
  since: number;
}

/** The GPU slice of this Jupyter server, for every widget that shows it. */
export interface ISliceModel extends IDisposable {
  /** The last known use; null before the first answer. */
  readonly usage: IUsage | null;
  readonly agent: IAgentState;
  /** Whether this server has a slice; nothing is shown where it has none. */
  readonly present: boolean;
  /** Whether the server has said that it has none. */
  readonly absent: boolean;
  /** Why the last question to the server failed; empty when it did not. */
  readonly trouble: string;
  /** Who does not answer and since when, by this browser's clock: what is shown is from then. Null: it is of now. */
  readonly stale: IStale | null;
  /** The last hour. */
  readonly history: History;
  /** How much of it is shown, seconds. */
  readonly historySeconds: number;
  /** The last notices, oldest first. */
  readonly notices: readonly INotice[];
  /** Part of the memory, in percent, from which to warn. */
  readonly warnPercent: number;
  readonly showStatus: boolean;
  readonly showPanel: boolean;
  /** Whether notices are shown as notifications. */
  readonly notify: boolean;
  readonly changed: ISignal<ISliceModel, void>;
  /** A notice that nobody has seen. */
  readonly noticed: ISignal<ISliceModel, INotice>;
  /** Show so much of the history. */
  showHistory(seconds: number): void;
  /** Ask the server now. */
  refresh(): Promise<void>;
  /** Limit a kernel; rejects with the server's words. */
  setLimit(kernelId: string, limit: IWrittenLimit): Promise<void>;
  /** Let a suspended process go on; rejects with the server's words. */
  resume(pid: number): Promise<void>;
  /** Ask what is free beside the slice; rejects with the hub's or the pool's words. */
  room(): Promise<IRoom>;
  /** Ask for another size of the slice; rejects with the hub's or the pool's words. */
  resize(asked: IWrittenSize): Promise<IResizeAnswer>;
}

export const ISliceModel = new Token<ISliceModel>(
  'nbgpu-lab:ISliceModel',
  'The use of the GPU slice that this Jupyter server holds.'
);

/** Of the message catalogue (`nbgpu_lab/locale`). */
export const DOMAIN = 'nbgpu_lab';

export namespace CommandIDs {
  export const showPanel = 'nbgpu:show-panel';
}
