import { Poll } from '@lumino/polling';
import type { IPoll } from '@lumino/polling';
import { Signal } from '@lumino/signaling';
import type { ISignal } from '@lumino/signaling';

import type {
  IAgentState,
  INotice,
  ISliceApi,
  IUsage,
  IUsageAnswer,
  IWrittenLimit
} from './api';
import { HISTORY_SECONDS, History } from './history';
import type { ISliceModel } from './tokens';

const KEPT_NOTICES = 100;
/** A hole in the history that is worth a request: the page was hidden, or the server away. */
const GAP_SECONDS = 5;
/** A server that does not answer is asked this seldom in the end. */
const MOST_MS = 30_000;

/** The one place that asks the server: one request a second at most, none while the page is hidden. */
export class SliceModel implements ISliceModel {
  constructor(options: SliceModel.IOptions) {
    this._api = options.api;
    this._poll = new Poll({
      name: 'nbgpu-lab:usage',
      auto: options.auto ?? true,
      factory: () => this.tick(),
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
    this._poll.dispose();
    Signal.clearData(this);
  }

  async refresh(): Promise<void> {
    await this._poll.refresh();
    await this._poll.tick;
  }

  async setLimit(kernelId: string, limit: IWrittenLimit): Promise<void> {
    await this._api.setLimit(kernelId, limit);
    void this._poll.refresh();
  }

  async resume(pid: number): Promise<void> {
    await this._api.resume(pid);
    void this._poll.refresh();
  }

  /** Tell of a notice that came with the server's event stream: sooner than the next poll. */
  hear(notice: INotice): void {
    if (this._keep([notice]).length > 0) {
      this._noticed.emit(notice);
      this._changed.emit();
    }
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

  /** One request: usage, or the history where it has a hole. */
  async tick(): Promise<void> {
    try {
      await this._ask();
      this._trouble = '';
    } catch (error) {
      this._trouble = (error as Error).message;
      this._changed.emit();
      throw error;
    }
  }

  private async _ask(): Promise<void> {
    if (this._usage && this._agent.ok && this._holeInHistory()) {
      this._historyAsked = Date.now();
      this.history.load(await this._api.history(HISTORY_SECONDS));
      this._changed.emit();
      return;
    }
    this._take(await this._api.usage(this._lastEvent));
  }

  private _holeInHistory(): boolean {
    const never = this._historyAsked === 0;
    const hole = this._lastTime - this._timeBefore > this._gapSeconds;
    return (
      never ||
      (hole && Date.now() - this._historyAsked > this._gapSeconds * 1000)
    );
  }

  private _take(answer: IUsageAnswer): void {
    if (answer.slice_id === null && !answer.agent) {
      // no slice, and there will be none in the life of this server
      void this._poll.stop();
      this._absent = true;
      this._changed.emit();
      return;
    }
    const first = !this._present;
    this._present = true;
    this._agent = answer.agent ?? this._agent;
    if (answer.slice_id !== null) {
      this._usage = answer as IUsage;
      if (this._agent.ok) {
        this._timeBefore = this._lastTime || this._usage.time;
        this._lastTime = this._usage.time;
        this.history.add(this._usage);
      }
    }
    const fresh = this._keep(answer.events ?? []);
    this._lastEvent = Math.max(this._lastEvent, answer.last_event ?? 0);
    if (!first) {
      fresh.forEach(notice => this._noticed.emit(notice));
    }
    this._changed.emit();
  }

  /** Keep the notices that are new; return them. */
  private _keep(notices: INotice[]): INotice[] {
    const known = new Set(this._notices.map(notice => notice.id));
    const fresh = notices.filter(notice => !known.has(notice.id));
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
  private _notices: INotice[] = [];
  private _lastEvent = 0;
  private _lastTime = 0;
  private _timeBefore = 0;
  private _historyAsked = 0;
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
