/** What the Jupyter server's `nbgpu/api` answers; see docs/interfaces.md. */

export interface IDeviceUsage {
  uuid: string;
  index: number;
  model: string;
  memory_limit_bytes: number;
  memory_used_bytes: number;
  compute_limit_milli: number;
  compute_used_milli: number;
  utilization_percent: number;
}

export interface IKernelLimit {
  memory_bytes: number | null;
  compute_milli: number | null;
}

export interface IKernelDeviceUsage {
  uuid: string;
  memory_used_bytes: number;
  memory_peak_bytes: number;
  compute_used_milli: number;
}

/** A kernel whose GPU memory its user has moved to the host's. */
export interface IKernelAway {
  /** On its way there, there, on its way back. */
  phase: 'parking' | 'parked' | 'restoring';
  memory_bytes: number;
  /** Unix time, seconds. */
  since: number;
  /** How long it has waited for room to come back; null: nobody has used it since. */
  wanted_seconds: number | null;
}

export interface IKernelUsage {
  /** Null stands for everything else in the slice: terminals, other programs. */
  kernel_id: string | null;
  limit: IKernelLimit;
  devices: IKernelDeviceUsage[];
  refusals: number;
  launches: number;
  idle_seconds: number | null;
  /** Null: its memory is on the GPU. */
  away?: IKernelAway | null;
  name: string | null;
  path: string | null;
  type: string | null;
  state: string | null;
  /** How long it has been idle or starting, by the server's clock; null: it is neither, or nobody knows. */
  state_seconds?: number | null;
  /** "Python 3 (ipykernel)". */
  kernel_name?: string | null;
  language?: string | null;
  /** What part of the slice's time it was limited to, in thousandths, as it was written; null: nobody wrote one. */
  limit_part_milli?: number | null;
  /** Where its limit comes from; null: it has none. */
  limit_source?: 'notebook' | 'panel' | 'command' | null;
}

export interface INotice {
  id: number;
  /** Unix time, seconds. */
  time: number;
  kernel_id: string | null;
  kind: string;
  level: 'info' | 'warning' | 'error';
  message: string;
  name?: string | null;
  path?: string | null;
  /** The numbers of the message. */
  data?: { [name: string]: number | string | null };
}

/** A process that the watchdog has suspended: it is not dead, and goes on when it may. */
export interface ISuspension {
  pid: number;
  kernel_id: string | null;
  kind: string;
  /** Lock: its calls to the GPU wait, it answers else. Stop: all of it stands still. */
  how: 'lock' | 'stop';
  /** Unix time, seconds. */
  since: number;
  /** What it did. */
  reason: string;
}

/** Others may use the slice's GPU while it is idle; its memory is kept elsewhere. */
export interface ILent {
  phase: 'parking' | 'parked' | 'restoring';
  memory_bytes: number;
  /** How long the slice has been wanted back; null: it is not. */
  wanted_seconds: number | null;
  /** Among those who wait to come back to the same GPU: 1 is the next; null: it does not wait. */
  position: number | null;
}

/** The server is asked back for somebody who waits. */
export interface IAskedBack {
  /** Until its end; below 0: since then. */
  seconds: number;
  /** The hub stops it then; else its user is asked to. */
  ends: boolean;
  /** To go on from "because". */
  reason: string;
}

export interface IUsage {
  slice_id: string;
  mode: 'strict' | 'burst';
  backend: 'limiter' | 'driver';
  simulated: boolean;
  time: number;
  devices: IDeviceUsage[];
  kernels: IKernelUsage[];
  /** An older agent says nothing of these. */
  suspended?: ISuspension[];
  /** The server's user may let them go on. */
  may_resume?: boolean;
  /** There is a hub that may be asked for another size. */
  may_resize?: boolean;
  lent?: ILent | null;
  asked_back?: IAskedBack | null;
  /** Kernels' GPU memory may be moved to the host's. */
  may_suspend?: boolean;
}

/** The node agent: whether it answers, and since when that is so (Unix time, seconds). */
export interface IAgentState {
  ok: boolean;
  since: number;
}

export interface IUsageAnswer extends Partial<Omit<IUsage, 'slice_id'>> {
  slice_id: string | null;
  agent?: IAgentState;
  /** Unix time of the server, seconds. */
  now?: number;
  last_event?: number;
  events?: INotice[];
}

export interface IHistoryAnswer {
  interval_seconds: number;
  time: number[];
  devices: {
    [uuid: string]: {
      memory_used_bytes: number[];
      compute_used_milli: number[];
    };
  };
}

/**
 * Limits as a person writes them: "5 GiB", or a fraction of the slice; empty = none of its own. What was not touched goes back as the
 * number that it is.
 */
export interface IWrittenLimit {
  memory?: string;
  memory_bytes?: number | null;
  compute?: string;
  compute_milli?: number | null;
  /** The notebook's metadata says so too. */
  kept?: boolean;
}

/** Another size of the slice, in the words of the start page; what is left out stays. */
export interface IWrittenSize {
  gpu_fraction?: string;
  gpu_memory?: string;
}

export interface IResizeAnswer {
  /** Else in a moment, when the node says so. */
  in_force: boolean;
  devices: { index: number; memory_bytes: number; compute_milli: number }[];
  note: string | null;
}

/** What is free beside the slice, on each of its GPUs. */
export interface IRoom {
  devices: { index: number; free_bytes: number; free_milli: number }[];
}

/** What the model asks of the server; a test passes its own. */
export interface ISliceApi {
  usage(after: number): Promise<IUsageAnswer>;
  history(seconds: number): Promise<IHistoryAnswer>;
  setLimit(kernelId: string, limit: IWrittenLimit): Promise<void>;
  /** Move a kernel's GPU memory to the host's, or back. */
  move(kernelId: string, where: 'suspend' | 'resume'): Promise<unknown>;
  /** Let a suspended process go on. */
  resume(pid: number): Promise<void>;
  /** Ask what is free beside the slice. */
  room(): Promise<IRoom>;
  /** Ask for another size of the slice. */
  resize(asked: IWrittenSize): Promise<IResizeAnswer>;
}
