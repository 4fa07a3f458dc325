/** The last minutes of a slice, one value a second, for sparklines. */

import type { IHistoryAnswer, IUsage } from './api';

export const HISTORY_SECONDS = 600;

export interface ISample {
  /** Unix time, seconds. */
  time: number;
  memory: number;
  compute: number;
}

export class History {
  constructor(readonly seconds = HISTORY_SECONDS) {}

  /** The samples of one device, oldest first. */
  of(uuid: string): readonly ISample[] {
    return this._samples.get(uuid) ?? [];
  }

  /** Time of the newest sample of any device, 0 when there is none. */
  get newest(): number {
    return Math.max(
      0,
      ...[...this._samples.values()].map(all => all[all.length - 1]?.time ?? 0)
    );
  }

  /** Take over what the server remembers. */
  load(answer: IHistoryAnswer): void {
    for (const [uuid, device] of Object.entries(answer.devices)) {
      const samples = answer.time.map((time, i) => ({
        time,
        memory: device.memory_used_bytes[i] ?? 0,
        compute: device.compute_used_milli[i] ?? 0
      }));
      const last = samples[samples.length - 1]?.time ?? 0;
      const newer = this.of(uuid).filter(sample => sample.time > last);
      this._samples.set(uuid, this._trim([...samples, ...newer]));
    }
  }

  /** Add what is measured now. */
  add(usage: IUsage): void {
    for (const device of usage.devices) {
      const samples = [...this.of(device.uuid)];
      if (usage.time <= (samples[samples.length - 1]?.time ?? 0)) {
        continue;
      }
      samples.push({
        time: usage.time,
        memory: device.memory_used_bytes,
        compute: device.compute_used_milli
      });
      this._samples.set(device.uuid, this._trim(samples));
    }
  }

  private _trim(samples: ISample[]): ISample[] {
    const from = (samples[samples.length - 1]?.time ?? 0) - this.seconds;
    return samples.filter(sample => sample.time > from);
  }

  private _samples = new Map<string, ISample[]>();
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
