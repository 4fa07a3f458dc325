import { Poll } from '@lumino/polling';
import type { IPoll } from '@lumino/polling';
import { Signal } from '@lumino/signaling';
import type { ISignal } from '@lumino/signaling';

import type {
  IAgentState,
  INotice,
  IResizeAnswer,
  IRoom,
  ISliceApi,
  IUsage,
  IUsageAnswer,
  IWrittenLimit,
  IWrittenSize
} from './api';
import { ServerClock } from './clock';
import { isOpenAsk } from './happenings';
import { HISTORY_SECONDS, History, HOUR_SECONDS } from './history';
import type { ISliceModel, IStale } from './tokens';

const KEPT_NOTICES = 100;
/** A hole in the history that is worth a request: the page was hidden, or the server away. */
const GAP_SECONDS = 5;
/** Between a question and one for news. */
const LEAST_MS = 1000;
/** A server that does not answer is asked this seldom in the end. */
const MOST_MS = 10_000;
/** So long a server that ends may go on answering. */
const ENDING_MS = 10_000;

/** What it means where a question is answered like this. */
const SILENT: { [status: number]: IStale['who'] } = {
  401: 'nobody',
  403: 'nobody',
  424: 'stopped' // JupyterHub's, of a server that it has stopped
};

/** The one place that asks the server: one request a second at most, none while the page is hidden. */
export class SliceModel implements ISliceModel {
  constructor(options: SliceModel.IOptions) {
    this._api = options.api;
    this._poll = new Poll({
      name: 'nbgpu-lab:usage',
      auto: options.auto ?? true,
      factory: () => this._turn(),
      frequency: { interval: 1000, backoff: true, max: MOST_MS },
      standby: 'when-hidden'
    });
  }

  readonly history = new History();
  warnPercent = 90;
  showStatus = true;
  showPanel = true;
  notify = true;

  get usage(): IUsage | null {
    return this._usage;
  }

  get agent(): IAgentState {
    return this._agent;
  }

  get present(): boolean {
    return this._present;
  }

  get absent(): boolean {
    return this._absent;
  }

  get trouble(): string {
    return this._trouble;
  }

  get stale(): IStale | null {
    if (this._trouble) {
      const silent = this._endsAt > 0 ? 'stopped' : 'server';
      return { who: SILENT[this._status] ?? silent, since: this._heardAt };
    }
    return this._agent.ok ? null : { who: 'agent', since: this._agent.since };
  }

  get historySeconds(): number {
    return this._historySeconds;
  }

  showHistory(seconds: number): void {
    this._historySeconds = seconds;
    this._changed.emit();
  }

  get notices(): readonly INotice[] {
    return this._notices;
  }

  get changed(): ISignal<ISliceModel, void> {
    return this._changed;
  }

  get noticed(): ISignal<ISliceModel, INotice> {
    return this._noticed;
  }

  get poll(): IPoll<void, unknown, 'standby'> {
    return this._poll;
  }

  get isDisposed(): boolean {
    return this._poll.isDisposed;
  }

  dispose(): void {
    clearTimeout(this._soon);
    this._poll.dispose();
    Signal.clearData(this);
  }

  async refresh(): Promise<void> {
    await this._askNow();
    await this._poll.tick;
  }

  async setLimit(kernelId: string, limit: IWrittenLimit): Promise<void> {
    await this._api.setLimit(kernelId, limit);
    void this._askNow();
  }

  async resume(pid: number): Promise<void> {
    await this._api.resume(pid);
    void this._askNow();
  }

  room(): Promise<IRoom> {
    return this._api.room();
  }

  async resize(asked: IWrittenSize): Promise<IResizeAnswer> {
    const answer = await this._api.resize(asked);
    void this._askNow();
    return answer;
  }

  /**
   * The server's event stream says that there is news. What it is the server is asked, once a second at most: whoever has the server's
   * token may write to that stream, a kernel too, and not into the server's own list.
   */
  hear(): void {
    this._newsWaits = true;
    this._soon ??= setTimeout(
      () => {
        this._soon = undefined;
        if (this._newsWaits) {
          void this.tick()
            .catch(() => null) // the poll says that nobody answers
            .then(() => this._newsWaits && this.hear()); // it came after a question that is answered now
        }
      },
      Math.max(0, this._askedAt + LEAST_MS - Date.now())
    );
  }

  /** The server has said that it ends. */
  ends(): void {
    this._endsAt = Date.now();
    this._changed.emit();
  }

  /** Settings changed. */
  configure(settings: SliceModel.ISettings): void {
    const { pollSeconds, ...shown } = settings;
    Object.assign(this, shown);
    this._gapSeconds = Math.max(GAP_SECONDS, 2.5 * pollSeconds);
    this._poll.frequency = {
      ...this._poll.frequency,
      interval: pollSeconds * 1000,
      max: Math.max(MOST_MS, pollSeconds * 1000)
    };
    this._changed.emit();
  }

  /** One request: usage, or the history where it has a hole. Joins the one that is on its way: a slow server is asked no more often. */
  tick(): Promise<void> {
    this._asking ??= this._tick().finally(() => (this._asking = null));
    return this._asking;
  }

  private _askNow(): Promise<void> {
    this._newsAt = 0;
    return this._poll.refresh();
  }

  /** The poll's question, unless news was asked for just before. */
  private async _turn(): Promise<void> {
    if (Date.now() - this._newsAt > LEAST_MS / 2) {
      await this.tick();
    }
  }

  private async _tick(): Promise<void> {
    this._askedAt = Date.now();
    try {
      await this._ask();
      this._trouble = '';
      if (Date.now() - this._endsAt > ENDING_MS) {
        this._endsAt = 0; // it is another one
      }
      this._heardAt = Date.now() / 1000;
    } catch (error) {
      this._trouble = (error as Error).message;
      this._status = (error as { status?: number }).status ?? 0;
      this._changed.emit();
      throw error;
    }
  }

  private async _ask(): Promise<void> {
    if (this._newsWaits) {
      this._newsWaits = false;
      this._newsAt = Date.now();
    } else if (this._usage && this._agent.ok) {
      const seconds = this._holeInHistory();
      if (seconds > 0) {
        await this._fillHistory(seconds);
        return;
      }
    }
    const sent = Date.now() / 1000;
    const answer = await this._api.usage(this._lastEvent);
    if (answer.now !== undefined) {
      this._clock.hear(answer.now, sent, Date.now() / 1000);
    }
    this._take(answer);
  }

  /** How many seconds of the history are to be asked for; 0: what is shown is there. */
  private _holeInHistory(): number {
    const hole = this._lastTime - this._timeBefore > this._gapSeconds;
    if (hole) {
      this._holes = new Set([HISTORY_SECONDS, HOUR_SECONDS]);
      this._timeBefore = this._lastTime;
    }
    const needed = [HISTORY_SECONDS];
    if (this._historySeconds > HISTORY_SECONDS) {
      needed.push(HOUR_SECONDS);
    }
    for (const seconds of needed) {
      const asked = this._historyAsked.get(seconds) ?? 0;
      if (
        this._holes.has(seconds) &&
        Date.now() - asked > this._gapSeconds * 1000
      ) {
        this._holes.delete(seconds);
        return seconds;
      }
    }
    return 0;
  }

  private async _fillHistory(seconds: number): Promise<void> {
    this._historyAsked.set(seconds, Date.now());
    try {
      this.history.load(await this._api.history(seconds));
      this._changed.emit();
    } catch {
      this._holes.add(seconds); // later: a line with a hole is no reason to say that nobody answers
    }
  }

  private _take(answer: IUsageAnswer): void {
    this._absent = answer.slice_id === null && !answer.agent;
    if (this._absent) {
      // there will be none in the life of this server; where there was one, it is another server, which may get one again
      if (!this._present) {
        void this._poll.stop();
      }
      this._usage = null;
      this._agent = { ok: true, since: 0 };
      this._changed.emit();
      return;
    }
    const first = !this._present;
    this._present = true;
    if (answer.agent) {
      const since = this._clock.local(answer.agent.since);
      this._agent = { ...answer.agent, since };
    }
    if (answer.slice_id !== null) {
      if (this._usage && this._usage.slice_id !== answer.slice_id) {
        this._forgetHistory();
      }
      const suspended = answer.suspended?.map(one => ({
        ...one,
        since: this._clock.local(one.since)
      }));
      this._usage = { ...(answer as IUsage), suspended };
      if (this._agent.ok) {
        this._timeBefore = this._lastTime || this._usage.time;
        this._lastTime = this._usage.time;
        this.history.add(this._usage);
      }
    }
    const fresh = this._keep(answer.events ?? []);
    const last = answer.last_event ?? this._lastEvent;
    // below: another server, whose clock is behind the last one's
    this._lastEvent = last < this._lastEvent ? 0 : last;
    // what was before this page is listed, not told; but for what goes on
    const told = first ? this._goesOn(fresh) : fresh;
    told.forEach(notice => this._noticed.emit(notice));
    this._changed.emit();
  }

  private _goesOn(notices: INotice[]): INotice[] {
    return this._usage?.asked_back ? notices.filter(isOpenAsk).slice(-1) : [];
  }

  /** The server was started anew, with another slice. */
  private _forgetHistory(): void {
    this.history.clear();
    this._holes = new Set([HISTORY_SECONDS, HOUR_SECONDS]);
    this._historyAsked.clear();
    this._lastTime = 0;
    this._timeBefore = 0;
  }

  /** Keep the notices that are new, with their time by this browser's clock; return them. */
  private _keep(notices: INotice[]): INotice[] {
    const known = new Set(this._notices.map(notice => notice.id));
    const fresh = notices
      .filter(notice => !known.has(notice.id))
      .map(notice => ({ ...notice, time: this._clock.local(notice.time) }));
    if (fresh.length > 0) {
      const all = [...this._notices, ...fresh].sort((a, b) => a.id - b.id);
      this._notices = all.slice(-KEPT_NOTICES);
    }
    return fresh;
  }

  private _api: ISliceApi;
  private _poll: Poll<void, unknown, 'standby'>;
  private _usage: IUsage | null = null;
  private _agent: IAgentState = { ok: true, since: 0 };
  private _present = false;
  private _absent = false;
  private _trouble = '';
  /** When the server said that it ends; 0: it has not. */
  private _endsAt = 0;
  /** Of the answer that was none; 0: there was no answer. */
  private _status = 0;
  private _notices: INotice[] = [];
  private _lastEvent = 0;
  private _newsWaits = false;
  private _newsAt = 0;
  private _askedAt = 0;
  private _soon: ReturnType<typeof setTimeout> | undefined;
  private _lastTime = 0;
  private _timeBefore = 0;
  private _historySeconds = HISTORY_SECONDS;
  private _historyAsked = new Map<number, number>();
  private _holes = new Set([HISTORY_SECONDS, HOUR_SECONDS]);
  private _heardAt = Date.now() / 1000;
  private _asking: Promise<void> | null = null;
  private _clock = new ServerClock();
  private _gapSeconds = GAP_SECONDS;
  private _changed = new Signal<ISliceModel, void>(this);
  private _noticed = new Signal<ISliceModel, INotice>(this);
}

export namespace SliceModel {
  /** What the settings editor offers (`schema/model.json`). */
  export interface ISettings {
    warnPercent: number;
    pollSeconds: number;
    showStatus: boolean;
    showPanel: boolean;
    notify: boolean;
  }

  export interface IOptions {
    api: ISliceApi;
    /** Start polling at once; a test ticks by hand. */
    auto?: boolean;
  }
}
