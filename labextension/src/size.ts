import type { IDeviceUsage, IWrittenSize } from './api';
import { formatFraction, formatMemory } from './format';

/** The two fields of the form for another size; empty memory follows the share. */
export interface ISizeFields {
  share: string;
  memory: string;
}

/** What the slice has, in the words of the form. */
export function fieldsOf(device: IDeviceUsage): ISizeFields {
  return {
    share: formatFraction(device.compute_limit_milli),
    memory: formatMemory(device.memory_limit_bytes)
  };
}

/** The form once another share is written: memory that nobody has written follows it, and is seen to. */
export function withShare(
  fields: ISizeFields,
  share: string,
  had: ISizeFields
): ISizeFields {
  const { memory } = fields;
  return { share, memory: memory === had.memory ? '' : memory };
}

/** What to ask the pool for, null where nothing was changed: a share that stands as it was is left out, so that it stays. */
export function sizeAsked(
  fields: ISizeFields,
  had: ISizeFields
): IWrittenSize | null {
  const share = fields.share.trim();
  const memory = fields.memory.trim();
  if (memory === had.memory && (share === had.share || !share)) {
    return null;
  }
  const onlyMemory = share === had.share && memory !== '';
  return {
    ...(share && !onlyMemory ? { gpu_fraction: share } : {}),
    ...(memory ? { gpu_memory: memory } : {})
  };
}
