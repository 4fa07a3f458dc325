import type {
  INotice,
  ISliceApi,
  IUsageAnswer
} from '../../../labextension/src/api';
import { SliceModel } from '../../../labextension/src/model';
import { answer } from './usage';

class FakeApi implements ISliceApi {
  next: IUsageAnswer = answer(100);
  asked: string[] = [];

  async usage(after: number): Promise<IUsageAnswer> {
    this.asked.push(`usage ${after}`);
    return this.next;
  }

  async history(seconds: number) {
    this.asked.push(seconds > 600 ? 'hour' : 'history');
    return { interval_seconds: 1, time: [], devices: {} };
  }

  async move(): Promise<void> {}

  async resume(pid: number): Promise<void> {
    throw new Error(`process ${pid} is not suspended`);
  }

  async resize(): Promise<never> {
    throw new Error('Your quota is half a GPU.');
  }

  async setLimit(kernelId: string): Promise<void> {
    throw new Error(`${kernelId} is above the slice`);
  }
}

const notice = (id: number): INotice => ({
  id,
  time: id,
  kernel_id: 'a',
  kind: 'refused',
  level: 'warning',
  message: `refusal ${id}`
});

const later = (ms: number) => new Promise(resolve => setTimeout(resolve, ms));

let api: FakeApi;
let model: SliceModel;
let noticed: number[];

beforeEach(() => {
  api = new FakeApi();
  model = new SliceModel({ api, auto: false });
  noticed = [];
  model.noticed.connect((_, { id }) => noticed.push(id));
});

afterEach(() => model.dispose());

test('is not present before the first answer, nor without a slice', async () => {
  expect(model.present).toBe(false);
  api.next = { slice_id: null };
  await model.tick();
  expect(model.present).toBe(false);
});

test('is present but empty while the agent was never heard of', async () => {
  api.next = { slice_id: null, agent: { ok: false, since: 5 } };
  await model.tick();
  expect([model.present, model.usage, model.agent.ok]).toEqual([
    true,
    null,
    false
  ]);
});

test('one request a tick: usage first, the history once, then usage again', async () => {
  for (let i = 0; i < 5; i++) {
    api.next = answer(100 + i);
    await model.tick();
  }
  expect(api.asked).toEqual([
    'usage 0',
    'history',
    'usage 0',
    'usage 0',
    'usage 0'
  ]);
});

test('a hole, as after a hidden page, is filled once', async () => {
  await model.tick();
  await model.tick();
  api.asked = [];
  jest.useFakeTimers({ now: Date.now() + 60_000 });
  for (const time of [160, 161, 162, 163]) {
    api.next = answer(time);
    await model.tick();
  }
  jest.useRealTimers();
  expect(api.asked).toEqual(['usage 0', 'history', 'usage 0', 'usage 0']);
});

test('the last values stay while the agent is away, and make no history', async () => {
  await model.tick();
  api.next = { ...answer(100), agent: { ok: false, since: 101 } };
  await model.tick();
  await model.tick();
  expect(model.usage?.devices.length).toBe(1);
  expect(model.agent).toEqual({ ok: false, since: 101 });
  expect(model.history.of('GPU-1').length).toBe(1);
});

test('notices of the time before the page opened are listed, not told', async () => {
  api.next = { ...answer(100), events: [notice(1), notice(2)], last_event: 2 };
  await model.tick();
  expect(noticed).toEqual([]);
  expect(model.notices.map(({ id }) => id)).toEqual([1, 2]);
});

test('a page that is opened while the server is asked back tells of that, and of nothing else before it', async () => {
  const asked = { seconds: 90, ends: true, reason: 'group bio waits' };
  const told = { ...notice(2), kind: 'asked-back' };
  const events = [notice(1), told, { ...told, id: 3 }, notice(4)];
  api.next = { ...answer(100), events, last_event: 4, asked_back: asked };
  await model.tick();
  expect(noticed).toEqual([3]);
});

test('one that is not asked back any more tells nothing', async () => {
  const told = { ...notice(2), kind: 'asked-back' };
  api.next = { ...answer(100), events: [told], last_event: 2 };
  await model.tick();
  expect(noticed).toEqual([]);
});

test('the event stream says that there is news; what it is, the server says', async () => {
  await model.tick();
  await model.tick();
  api.next = { ...answer(101), events: [notice(7)], last_event: 7 };
  model.hear();
  expect(noticed).toEqual([]);
  await later(1100);
  expect(noticed).toEqual([7]);
  await model.tick();
  expect(noticed).toEqual([7]);
});

test('a flood in the event stream is one question a second, beside which none is asked', async () => {
  await model.tick();
  await model.tick();
  api.asked = [];
  for (let i = 0; i < 1000; i++) {
    model.hear();
  }
  await later(1100);
  for (let i = 0; i < 1000; i++) {
    model.hear();
  }
  await model.poll.refresh(); // the poll's own turn, just after
  await model.poll.tick;
  expect(api.asked).toEqual(['usage 0']);
  await later(1100);
  expect(api.asked).toEqual(['usage 0', 'usage 0']);
});

test('what a person waits for is asked at once, just after news too', async () => {
  await model.tick();
  await model.tick();
  model.hear();
  await later(1100);
  api.asked = [];
  await model.refresh();
  expect(api.asked).toEqual(['usage 0']);
});

test('news is asked for before a hole in the history', async () => {
  await model.tick();
  model.hear();
  await later(1100);
  expect(api.asked).toEqual(['usage 0', 'usage 0']);
});

test('a server that was started anew with a clock behind is asked for all that it has', async () => {
  api.next = { ...answer(100), events: [notice(9000)], last_event: 9000 };
  await model.tick();
  await model.tick();
  api.asked = [];
  api.next = { ...answer(101), last_event: 12 };
  await model.tick();
  api.next = { ...answer(102), events: [notice(12)], last_event: 12 };
  await model.tick();
  expect(api.asked).toEqual(['usage 9000', 'usage 0']);
  expect(noticed).toEqual([12]);
  expect(model.notices.map(({ id }) => id)).toContain(12);
});

test('asks for what came after the last answer', async () => {
  api.next = { ...answer(100), last_event: 42 };
  await model.tick();
  await model.tick();
  await model.tick();
  expect(api.asked).toEqual(['usage 0', 'history', 'usage 42']);
});

test("a refused limit rejects with the server's words", async () => {
  await expect(model.setLimit('a', { memory: '100 GiB' })).rejects.toThrow(
    'a is above the slice'
  );
});

test('the hour is asked for when it is shown, in place of a question', async () => {
  const ticks = async (count: number) => {
    for (let i = 0; i < count; i++) {
      await model.tick();
    }
  };
  await ticks(3);
  api.asked = [];
  model.showHistory(3600);
  await ticks(3);
  expect(api.asked).toEqual(['hour', 'usage 0', 'usage 0']);
});

test('a history that is refused is not asked for again at once, and is no trouble', async () => {
  api.history = async () => {
    api.asked.push('history');
    throw new Error('seconds must be from 1 to 600');
  };
  for (let i = 0; i < 4; i++) {
    await model.tick();
  }
  expect(api.asked).toEqual(['usage 0', 'history', 'usage 0', 'usage 0']);
  expect(model.stale).toBeNull();
});

test('a slow server is asked once at a time', async () => {
  let answers: (() => void)[] = [];
  api.usage = after =>
    new Promise(resolve => {
      api.asked.push(`usage ${after}`);
      answers.push(() => resolve(api.next));
    });
  const both = [model.tick(), model.tick(), model.tick()];
  expect(api.asked).toEqual(['usage 0']);
  answers.forEach(done => done());
  await Promise.all(both);
  answers = [];
  void model.tick();
  expect(api.asked.length).toBe(2);
});

test('a server that does not answer is said, with the last values and since when', async () => {
  await model.tick();
  const before = Date.now() / 1000;
  api.usage = async () => {
    throw new Error('no network');
  };
  await model.tick().catch(() => null); // the history, which may fail
  await expect(model.tick()).rejects.toThrow('no network');
  expect(model.stale?.who).toBe('server');
  expect(model.stale!.since).toBeGreaterThan(before - 5);
  expect(model.usage?.devices.length).toBe(1);
});

test('a page whose login is over and a server that was stopped are told apart from one that is away', async () => {
  await model.tick();
  await model.tick();
  for (const [status, who] of [
    [403, 'nobody'],
    [503, 'server'],
    [424, 'stopped']
  ]) {
    api.usage = async () => {
      throw Object.assign(new Error('no'), { status });
    };
    await expect(model.tick()).rejects.toThrow('no');
    expect(model.stale?.who).toBe(who);
  }
});

test('a server that this page has asked to end is said to be stopped, until another one answers', async () => {
  jest.useFakeTimers({ now: 1_000_000 });
  try {
    const answers = api.usage;
    await model.tick();
    await model.tick();
    model.ends();
    await model.tick(); // it still answers
    api.usage = async () => {
      throw Object.assign(new Error('no'), { status: 503 });
    };
    await expect(model.tick()).rejects.toThrow('no');
    expect(model.stale?.who).toBe('stopped');
    api.usage = answers;
    jest.setSystemTime(1_030_000);
    await model.tick();
    expect(model.stale).toBeNull();
    api.usage = async () => {
      throw new Error('no network');
    };
    await expect(model.tick()).rejects.toThrow('no network');
    expect(model.stale?.who).toBe('server');
  } finally {
    jest.useRealTimers();
  }
});

test('times are told by this clock, whatever the server has', async () => {
  const now = Date.now() / 1000;
  const server = now - 7200;
  api.next = {
    ...answer(server),
    now: server,
    agent: { ok: false, since: server - 60 },
    events: [{ ...notice(1), time: server - 30 }]
  };
  await model.tick();
  expect(model.agent.since).toBeCloseTo(now - 60, 0);
  expect(model.stale).toEqual({ who: 'agent', since: model.agent.since });
  expect(model.notices[0].time).toBeCloseTo(now - 30, 0);
});

test('a server that was started anew, with another slice or none', async () => {
  await model.tick();
  expect(model.history.of('GPU-1').length).toBe(1);
  api.next = { ...answer(50), slice_id: 'another' };
  await model.tick(); // the history
  await model.tick();
  expect(model.history.of('GPU-1').map(({ time }) => time)).toEqual([50]);
  api.next = { slice_id: null };
  await model.tick(); // its history
  await model.tick();
  expect([model.absent, model.usage]).toEqual([true, null]);
  api.next = answer(60);
  await model.tick();
  expect([model.absent, model.usage?.time]).toEqual([false, 60]);
});

const SETTINGS = {
  warnPercent: 80,
  pollSeconds: 10,
  showStatus: false,
  showPanel: true,
  notify: false
};

test('settings are followed, and whoever looks seldom has no holes by that', async () => {
  let changed = 0;
  model.changed.connect(() => (changed += 1));
  model.configure(SETTINGS);
  expect(model).toMatchObject({ warnPercent: 80, showStatus: false });
  expect([model.showPanel, model.notify, changed]).toEqual([true, false, 1]);
  expect((model.poll as any).frequency.interval).toBe(10_000);
  await model.tick();
  await model.tick();
  api.asked = [];
  jest.useFakeTimers({ now: Date.now() + 60_000 });
  for (const time of [110, 120, 160, 170]) {
    api.next = answer(time);
    await model.tick();
  }
  jest.useRealTimers();
  expect(api.asked).toEqual(['usage 0', 'usage 0', 'usage 0', 'history']);
});
