import { Signal } from '@lumino/signaling';

import type { INotice } from '../../../labextension/src/api';
import { News } from '../../../labextension/src/news';
import { Notifier } from '../../../labextension/src/notifier';

interface IShown {
  message: string;
  type: string;
  autoClose: number;
  actions: unknown[];
}

/** JupyterLab's notifications, as far as the notifier knows them. */
const shown = new Map<string, IShown>();
let emitted = 0;

const notifications: any = {
  emit: (message: string, type: string, options: object) => {
    emitted += 1;
    const id = `n${emitted}`;
    shown.set(id, { message, type, ...options } as IShown);
    return id;
  },
  update: ({ id, ...rest }: { id: string } & IShown) =>
    shown.has(id) && Boolean(shown.set(id, rest)),
  dismiss: (id: string) => shown.delete(id)
};

const trans = {
  __: (text: string, ...args: unknown[]) =>
    text.replace(/%(\d)/g, (_, number) => String(args[number - 1]))
};

let notices: INotice[];
let inView: boolean;
let news: News;
let model: any;

beforeEach(() => {
  jest.useFakeTimers();
  shown.clear();
  emitted = 0;
  notices = [];
  inView = false;
  news = new News();
  model = { notify: true };
  Object.defineProperty(model, 'notices', { get: () => notices });
  model.noticed = new Signal<any, INotice>(model);
  new Notifier({
    model,
    notifications,
    trans: trans as any,
    news,
    openPanel: () => undefined,
    panelInView: () => inView
  });
});

afterEach(() => jest.useRealTimers());

/** Something happens, and its notification is there. */
function happen(kind: string, part: Partial<INotice> = {}): void {
  happenAtOnce(kind, part);
  jest.advanceTimersByTime(2000);
}

function happenAtOnce(kind: string, part: Partial<INotice> = {}): void {
  const id = notices.length + 1;
  const blank = {
    time: id,
    kernel_id: 'a',
    message: `${kind}.`,
    name: 'x.ipynb'
  };
  const notice = { id, kind, level: 'warning' as const, ...blank, ...part };
  notices = [...notices, notice];
  model.noticed.emit(notice);
}

const messages = () => [...shown.values()].map(({ message }) => message);

test('one thing is one notification, which follows it', () => {
  const data = { pid: 4711 };
  happen('over-limit', { data });
  happen('suspended', { data });
  expect(messages()).toEqual(['x.ipynb: suspended.']);
  happen('resumed', { data, level: 'info' });
  expect(messages()).toEqual(['x.ipynb: resumed.']);
  happen('suspended', { data: { pid: 4712 } });
  expect(messages()).toEqual(['x.ipynb: resumed.', 'x.ipynb: suspended.']);
});

test('a loop of refusals is one notification that counts', () => {
  happen('refused');
  happen('refused', { data: { count: 5 } });
  expect([messages(), emitted]).toEqual([['x.ipynb: refused. (6 times)'], 1]);
});

test('what was dismissed and happens again is told again', () => {
  happen('refused');
  shown.clear();
  happen('refused');
  expect([messages().length, emitted]).toEqual([1, 2]);
});

test('a server that is asked back: it stays in view, with the time that is left, until that is over', () => {
  const asked = { seconds: 90, ends: true, reason: 'group bio waits' };
  model.usage = { asked_back: asked };
  const server = { kernel_id: null, name: null };
  happen('asked-back', server);
  expect([...shown.values()]).toMatchObject([
    {
      message:
        'Save your work: this server will be stopped in 2 min, because group bio waits.',
      autoClose: false
    }
  ]);
  model.usage = { asked_back: null };
  happen('asked-back', { ...server, level: 'info', time: 900 });
  expect([...shown.values()]).toMatchObject([
    { message: 'asked-back.', type: 'info' }
  ]);
  expect(shown.get('n1')?.autoClose).toBeGreaterThan(0);
});

test('what is only to be listed is not told', () => {
  happen('limit-changed', { level: 'info' });
  happen('restored', { level: 'info' });
  expect(emitted).toBe(0);
});

test('the GPU that was waited for is back, in the place of the wait, however long', () => {
  happen('wanting');
  happen('restored', { level: 'info', time: 5000 });
  expect([...shown.values()].map(({ type }) => type)).toEqual(['success']);
  happen('wanting', { time: 6000 });
  expect(messages()).toEqual(['x.ipynb: restored.', 'x.ipynb: wanting.']);
});

test('with the panel in view it is said there, and nothing covers it', () => {
  happen('refused');
  expect(news.latest).toBeNull();
  expect(shown.get('n1')?.autoClose).toBeGreaterThan(0);
  inView = true;
  happen('refused');
  expect(news.latest?.latest.id).toBe(2);
  expect(shown.has('n1')).toBe(false);
  expect(shown.get('n2')).toMatchObject({ autoClose: 0, actions: [] });
});

test('switched off, nothing is told', () => {
  model.notify = false;
  inView = true;
  happen('refused');
  expect([emitted, news.latest]).toEqual([0, null]);
});

test('a notification that JupyterLab has not shown yet is left alone, and follows then', () => {
  happenAtOnce('refused');
  happenAtOnce('refused', { data: { count: 41 } });
  happenAtOnce('refused');
  expect(messages()).toEqual(['x.ipynb: refused.']);
  jest.advanceTimersByTime(1400);
  expect(messages()).toEqual(['x.ipynb: refused.']);
  jest.advanceTimersByTime(200);
  expect([messages(), emitted]).toEqual([['x.ipynb: refused. (43 times)'], 1]);
  jest.advanceTimersByTime(10_000);
  expect(emitted).toBe(1);
});

test('ninety kernels that are refused memory at once are four notifications, of which one counts', () => {
  for (let number = 0; number < 90; number += 1) {
    const kernel_id = `made-up-${number}`;
    happenAtOnce('refused', { kernel_id, name: null, time: 1 });
  }
  jest.advanceTimersByTime(2000);
  expect([emitted, messages()[3]]).toEqual([4, '87 more like this. refused.']);
  // one of the first goes on by itself, another kind is told by itself, and one of the many again
  happen('refused', { kernel_id: 'made-up-0', name: null, time: 2 });
  happen('suspended');
  happen('refused', { kernel_id: 'made-up-50', name: null, time: 3 });
  expect([emitted, messages()]).toEqual([
    5,
    [
      'refused. (2 times)',
      'refused.',
      'refused.',
      '87 more like this. refused.',
      'x.ipynb: suspended.'
    ]
  ]);
});

test('things that do not follow fast are told apart', () => {
  for (let number = 0; number < 6; number += 1) {
    happen('refused', { kernel_id: `kernel-${number}`, time: number });
    jest.advanceTimersByTime(30_000);
  }
  expect([emitted, messages()]).toEqual([
    6,
    Array(6).fill('x.ipynb: refused.')
  ]);
});
