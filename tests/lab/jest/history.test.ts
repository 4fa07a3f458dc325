import type { IUsage } from '../../../labextension/src/api';
import { History, linePoints } from '../../../labextension/src/history';
import { answer, GIB } from './usage';

const add = (history: History, time: number, usedGiB: number) =>
  history.add(answer(time, usedGiB) as IUsage);

const remembered = (time: number[], memory: number[], interval = 1) => ({
  interval_seconds: interval,
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

test('an hour in points of ten seconds: the most memory, the average compute', () => {
  const history = new History();
  for (let time = 0; time < 2 * 3600; time++) {
    const usage = answer(time, time % 20) as IUsage;
    usage.devices[0].compute_used_milli = 100 * (time % 10);
    history.add(usage);
  }
  const hour = history.of('GPU-1', 3600);
  expect(hour.length).toBe(360);
  expect(hour.slice(0, 2).map(({ time }) => time)).toEqual([3609, 3619]);
  expect(hour.slice(0, 2).map(({ memory }) => memory / GIB)).toEqual([9, 19]);
  expect(new Set(hour.map(({ compute }) => Math.round(compute)))).toEqual(
    new Set([450])
  );
  expect(history.of('GPU-1', 60).length).toBe(60);
  expect(history.of('GPU-1').length).toBe(600);
});

test('what the server remembers of the hour goes on with what is measured', () => {
  const history = new History();
  history.load(remembered([3590, 3595], [GIB, 2 * GIB], 10));
  add(history, 3597, 3);
  add(history, 3600, 4);
  expect(
    history.of('GPU-1', 3600).map(({ time, memory }) => [time, memory / GIB])
  ).toEqual([
    [3590, 1],
    [3597, 3],
    [3600, 4]
  ]);
  expect(history.of('GPU-1').length).toBe(2);
});

test("a server's clock that is set back stops no line", () => {
  const history = new History();
  [5000, 5001, 100, 101].forEach(time => add(history, time, 1));
  expect(history.of('GPU-1').map(({ time }) => time)).toEqual([100, 101]);
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
