/** The last hour of a slice for sparklines: ten minutes of it with one value a second, the rest with one in ten. */

import type { IHistoryAnswer, IUsage } from './api';

export const HISTORY_SECONDS = 600;
export const HOUR_SECONDS = 3600;
const COARSE_SECONDS = 10;
/** A time that is so much before the last one is a clock that was set back. */
const BACK_SECONDS = 5;

export interface ISample {
  /** Unix time, seconds. */
  time: number;
  memory: number;
  compute: number;
}

/** The samples of one device over some seconds, one in each interval: the most memory in it, the average compute. */
class Samples {
  constructor(
    readonly seconds: number,
    readonly interval: number
  ) {}

  all: readonly ISample[] = [];

  add(sample: ISample): void {
    let samples = this.all;
    const last = samples[samples.length - 1];
    if (last && sample.time <= last.time) {
      if (sample.time > last.time - BACK_SECONDS) {
        return;
      }
      samples = samples.filter(({ time }) => time < sample.time);
    }
    if (last && this.interval > 1 && this._slot(last) === this._slot(sample)) {
      this._count += 1;
      const compute = last.compute + (sample.compute - last.compute) / this._count; // prettier-ignore
      const memory = Math.max(last.memory, sample.memory);
      samples = [...samples.slice(0, -1), { time: sample.time, memory, compute }]; // prettier-ignore
    } else {
      this._count = 1;
      samples = [...samples, sample];
    }
    this._set(samples);
  }

  load(samples: readonly ISample[]): void {
    const last = samples[samples.length - 1]?.time ?? 0;
    this._set([...samples, ...this.all.filter(({ time }) => time > last)]);
    this._count = 1;
  }

  private _set(samples: readonly ISample[]): void {
    const from = (samples[samples.length - 1]?.time ?? 0) - this.seconds;
    this.all = samples.filter(({ time }) => time > from);
  }

  private _slot({ time }: ISample): number {
    return Math.floor(time / this.interval);
  }

  private _count = 1;
}

export class History {
  constructor(readonly seconds = HISTORY_SECONDS) {}

  /** The samples of one device in the last seconds, oldest first. */
  of(uuid: string, seconds = this.seconds): readonly ISample[] {
    const kept = this._samples.get(uuid);
    if (!kept) {
      return [];
    }
    const all = seconds > this.seconds ? kept.coarse.all : kept.fine.all;
    const from = (all[all.length - 1]?.time ?? 0) - seconds;
    return all.filter(({ time }) => time > from);
  }

  /** Take over what the server remembers. */
  load(answer: IHistoryAnswer): void {
    for (const [uuid, device] of Object.entries(answer.devices)) {
      const samples = answer.time.map((time, i) => ({
        time,
        memory: device.memory_used_bytes[i] ?? 0,
        compute: device.compute_used_milli[i] ?? 0
      }));
      const { fine, coarse } = this._of(uuid);
      (answer.interval_seconds > 1 ? coarse : fine).load(samples);
    }
  }

  /** Add what is measured now. */
  add(usage: IUsage): void {
    for (const device of usage.devices) {
      const sample = {
        time: usage.time,
        memory: device.memory_used_bytes,
        compute: device.compute_used_milli
      };
      const { fine, coarse } = this._of(device.uuid);
      fine.add(sample);
      coarse.add(sample);
    }
  }

  /** Forget all: it was another slice's. */
  clear(): void {
    this._samples.clear();
  }

  private _of(uuid: string): { fine: Samples; coarse: Samples } {
    let found = this._samples.get(uuid);
    if (!found) {
      found = {
        fine: new Samples(this.seconds, 1),
        coarse: new Samples(HOUR_SECONDS, COARSE_SECONDS)
      };
      this._samples.set(uuid, found);
    }
    return found;
  }

  private _samples = new Map<string, { fine: Samples; coarse: Samples }>();
}

/**
 * The points of an SVG line in a box of `width` by `height`: the newest value at the right edge, 0 at the bottom, `top` at the top.
 */
export function linePoints(
  values: readonly { time: number; value: number }[],
  box: { width: number; height: number; seconds: number; top: number }
): [number, number][] {
  const newest = values[values.length - 1]?.time ?? 0;
  return values.map(({ time, value }) => [
    round(box.width * (1 - (newest - time) / box.seconds)),
    round(box.height * (1 - Math.min(1, box.top > 0 ? value / box.top : 0)))
  ]);
}

function round(value: number): number {
  return Math.round(value * 10) / 10;
}
