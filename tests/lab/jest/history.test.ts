import type { IUsage } from '../../../labextension/src/api';
import { History, linePoints } from '../../../labextension/src/history';
import { answer, GIB } from './usage';

const add = (history: History, time: number, usedGiB: number) =>
  history.add(answer(time, usedGiB) as IUsage);

const remembered = (time: number[], memory: number[]) => ({
  interval_seconds: 1,
  time,
  devices: {
    'GPU-1': {
      memory_used_bytes: memory,
      compute_used_milli: memory.map(() => 0)
    }
  }
});

test('keeps its seconds and no more', () => {
  const history = new History(10);
  for (let time = 1; time <= 100; time++) {
    add(history, time, time % 20);
  }
  expect(history.of('GPU-1').map(sample => sample.time)).toEqual([
    91, 92, 93, 94, 95, 96, 97, 98, 99, 100
  ]);
});

test('the same answer twice counts once', () => {
  const history = new History();
  add(history, 5, 1);
  add(history, 5, 2);
  add(history, 4, 3);
  expect(history.of('GPU-1').map(sample => sample.memory)).toEqual([GIB]);
});

test('what the server remembers fills the hole, newer samples stay', () => {
  const history = new History();
  add(history, 10, 1);
  add(history, 30, 3);
  history.load(remembered([10, 20], [GIB, 2 * GIB]));
  expect(
    history.of('GPU-1').map(({ time, memory }) => [time, memory / GIB])
  ).toEqual([
    [10, 1],
    [20, 2],
    [30, 3]
  ]);
});

test('a line ends at the right edge and stays in its box', () => {
  const box = { width: 100, height: 40, seconds: 10, top: 4 };
  const values = [
    { time: 0, value: 0 },
    { time: 5, value: 2 },
    { time: 10, value: 99 }
  ];
  expect(linePoints(values, box)).toEqual([
    [0, 40],
    [50, 20],
    [100, 0]
  ]);
  expect(linePoints([], box)).toEqual([]);
  expect(linePoints(values.slice(0, 1), { ...box, top: 0 })).toEqual([
    [100, 40]
  ]);
});
