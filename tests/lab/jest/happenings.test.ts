import type { INotice } from '../../../labextension/src/api';
import {
  happenings,
  isTold,
  moment,
  thingOf
} from '../../../labextension/src/happenings';
import { notebooksOf } from '../../../labextension/src/log';
import { answer, kernel } from './usage';
import type { IUsage } from '../../../labextension/src/api';

let lastId = 0;

function notice(kind: string, part: Partial<INotice> = {}): INotice {
  lastId += 1;
  const level = kind === 'limit-changed' ? 'info' : 'warning';
  const blank = { time: 100, kernel_id: 'a', message: `${kind} ${lastId}` };
  return { id: lastId, kind, level, ...blank, ...part };
}

/** What is listed, the newest first: kind of the latest notice, and how often. */
function listed(...notices: INotice[]): [string, number][] {
  return happenings(notices).map(one => [one.latest.kind, one.times]);
}

test('a limit below what is held is one thing, though it is told twice', () => {
  expect(listed(notice('limit-changed'), notice('over-limit'))).toEqual([
    ['over-limit', 1]
  ]);
});

test('a limit that is changed three times was changed three times', () => {
  const changes = ['1/2', '1/8', '1/4'].map(message =>
    notice('limit-changed', { message })
  );
  expect(happenings(changes).map(one => one.latest.message)).toEqual([
    '1/4',
    '1/8',
    '1/2'
  ]);
});

test('what a process did and what was done with it are one thing', () => {
  const data = { pid: 4711 };
  const done = notice('suspended', { data, time: 110 });
  expect(listed(notice('unlimited', { data }), done)).toEqual([
    ['suspended', 1]
  ]);
  expect(thingOf(done)).not.toBe(
    thingOf(notice('suspended', { data: { pid: 4712 } }))
  );
});

test('what a newer agent tells of is shown as it says it', () => {
  const novel = notice('of-tomorrow', { message: 'Something new.' });
  expect(listed(novel, notice('refused'))).toEqual([
    ['refused', 1],
    ['of-tomorrow', 1]
  ]);
  expect(happenings([novel])[0].latest.message).toBe('Something new.');
});

test('a loop of refusals counts, with those that one notice stands for', () => {
  const many = notice('refused', { data: { count: 41 }, time: 119 });
  expect(listed(notice('refused'), many)).toEqual([['refused', 42]]);
});

test.each([
  ['another kernel', { kernel_id: 'b' }],
  ['later', { time: 121 }]
])('two things are two: %s', (_, part) => {
  expect(listed(notice('refused'), notice('refused', part))).toEqual([
    ['refused', 1],
    ['refused', 1]
  ]);
});

test('a process that was lost is not made good by the return of the others', () => {
  expect(listed(notice('wanting'), notice('lost'), notice('restored'))).toEqual(
    [
      ['restored', 1],
      ['lost', 1]
    ]
  );
});

test.each([[undefined], [{}], [{ count: 'junk', pid: 'x' }], [{ count: -5 }]])(
  'numbers that are none count once: %j',
  data => {
    expect(listed(notice('refused', { data }))).toEqual([['refused', 1]]);
  }
);

test('the newest is the first, and keeps its name while it grows', () => {
  const first = notice('refused');
  const other = notice('limit-changed');
  const [before] = happenings([first]);
  const [newest, second] = happenings([first, other, notice('refused')]);
  expect([newest.id, newest.thing]).toEqual([before.id, 'refused a']);
  expect(second.id).toBe(other.id);
});

test('told at once is what hinders; the rest is listed', () => {
  const told = ['refused', 'limit-changed'].map(kind => isTold(notice(kind)));
  expect(told).toEqual([true, false]);
  expect(isTold(notice('throttled', { level: 'info' }))).toBe(true);
});

test('a moment has its day where that is not today', () => {
  const now = new Date(2026, 5, 2, 12).getTime();
  const time = new Date(2026, 5, 2, 11);
  expect(moment(time.getTime() / 1000, now)).toBe(time.toLocaleTimeString());
  time.setDate(1);
  expect(moment(time.getTime() / 1000, now)).toBe(time.toLocaleString());
});

test('a notice goes into the log of its notebook, one of the slice into all', () => {
  const usage = {
    ...answer(100),
    kernels: [
      kernel({ path: 'a.ipynb' }),
      kernel({ kernel_id: 'b', path: 'a.ipynb' }),
      kernel({ kernel_id: 'c', path: 'b.ipynb' }),
      kernel({ kernel_id: 'd', type: 'console', path: 'console-1' }),
      kernel({ kernel_id: null, type: null, path: null })
    ]
  } as IUsage;
  const of = (part: Partial<INotice>) =>
    notebooksOf(notice('refused', part), usage);
  expect(of({ path: 'gone.ipynb' })).toEqual(['gone.ipynb']);
  expect(of({ kernel_id: 'without-notebook' })).toEqual([]);
  expect(of({ kernel_id: null })).toEqual(['a.ipynb', 'b.ipynb']);
  expect(notebooksOf(notice('refused', { kernel_id: null }), null)).toEqual([]);
});
