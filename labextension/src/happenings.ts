/** What happened: notices that are about one thing are one, however many there are. */

import type { INotice } from './api';

/** Notices about one thing that follow each other this fast are one happening. */
const TOGETHER_SECONDS = 20;

export interface IHappening {
  /** Of its first notice: stays the same while others join. */
  id: number;
  thing: string;
  /** What is true now. */
  latest: INotice;
  /** How often the latest kind of it happened. */
  times: number;
}

/**
 * What a notice is about. A limit that is set below what is held is told twice by the agent (changed, and over), and so is a process
 * that the watchdog has caught (what it did, and what was done): each is one thing to a person. Each change of a limit begins another.
 */
export function thingOf(notice: INotice): string {
  const kernel = notice.kernel_id ?? '';
  switch (notice.kind) {
    case 'parked':
    case 'wanting':
    case 'restored':
      return 'lent';
    case 'lost':
      return `lost ${notice.id}`; // nothing that comes later makes it good
    default:
      break;
  }
  if (typeof notice.data?.pid === 'number') {
    return `process ${notice.data.pid}`;
  }
  return notice.kind === 'limit-changed' || notice.kind === 'over-limit'
    ? `limit ${kernel}`
    : `${notice.kind} ${kernel}`;
}

/** The happenings among notices that come oldest first; the newest is the first. */
export function happenings(notices: readonly INotice[]): IHappening[] {
  const found: IHappening[] = [];
  const open = new Map<string, IHappening>();
  for (const notice of notices) {
    const thing = thingOf(notice);
    const times = Math.max(1, Number(notice.data?.count) || 1);
    const before = open.get(thing);
    const near = before && notice.time - before.latest.time <= TOGETHER_SECONDS;
    if (before && near && notice.kind !== 'limit-changed') {
      const same = before.latest.kind === notice.kind;
      before.times = same ? before.times + times : times;
      before.latest = notice;
    } else {
      const fresh = { id: notice.id, thing, latest: notice, times };
      open.set(thing, fresh);
      found.push(fresh);
    }
  }
  return found.sort((a, b) => b.latest.id - a.latest.id);
}

/** Whether a person is told at once; the list has all. */
export function isTold(notice: INotice): boolean {
  return notice.level !== 'info' || notice.kind === 'throttled';
}

/** Whether it says that this server is asked back, and not that this is over. */
export function isOpenAsk(notice: INotice): boolean {
  return notice.kind === 'asked-back' && notice.level !== 'info';
}

/** When it was, in the reader's own way; with the day, unless it was today. */
export function moment(seconds: number, now = Date.now()): string {
  const time = new Date(seconds * 1000);
  return time.toDateString() === new Date(now).toDateString()
    ? time.toLocaleTimeString()
    : time.toLocaleString();
}
