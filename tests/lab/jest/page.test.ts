import type { ISliceApi } from '../../../labextension/src/api';
import { SliceModel } from '../../../labextension/src/model';
import { ENGLISH } from '../../../labextension/src/english';
import { follow, OwnModel, shareModel } from '../../../labextension/src/page';
import { answer } from './usage';

let asked: number;
let made: SliceModel[];
let drawn: SliceModel[];

function model(): SliceModel {
  const api: ISliceApi = {
    usage: async () => {
      asked += 1;
      return answer(100 + asked);
    },
    history: async () => ({ interval_seconds: 1, time: [], devices: {} }),
    setLimit: async () => undefined,
    move: async () => undefined,
    resume: async () => undefined
  };
  const one = new SliceModel({ api, auto: false });
  made.push(one);
  return one;
}

const share = (one: SliceModel | undefined) =>
  shareModel(one as SliceModel, ENGLISH);
const draw = (one: unknown) => drawn.push(one as SliceModel);

beforeEach(() => {
  asked = 0;
  made = [];
  drawn = [];
});

afterEach(() => {
  share(undefined);
  made.forEach(one => one.dispose());
});

test('monitors follow the model of the extension and make none', async () => {
  const shared = model();
  share(shared);
  const own = new OwnModel(model);
  const leave = [follow(own, draw), follow(own, draw)];
  await shared.tick();
  expect(made).toEqual([shared]);
  expect(asked).toBe(1);
  expect(drawn.length).toBe(4);
  leave.forEach(one => one());
  await shared.tick();
  expect(drawn.length).toBe(4);
  expect(shared.isDisposed).toBe(false);
});

test('without the extension all monitors have one model, which ends with the last', async () => {
  const own = new OwnModel(model);
  const leave = [follow(own, draw), follow(own, draw)];
  expect(made.length).toBe(1);
  await made[0].tick();
  expect(drawn.length).toBe(4);
  leave[0]();
  expect(made[0].isDisposed).toBe(false);
  leave[1]();
  expect(made[0].isDisposed).toBe(true);
});

test('an extension that comes later takes over, and the own model asks no more', async () => {
  const own = new OwnModel(model);
  const leave = follow(own, draw);
  const shared = model();
  share(shared);
  await made[0].tick();
  expect(made[0].isDisposed).toBe(true);
  await shared.tick();
  expect(drawn[drawn.length - 1]).toBe(shared);
  leave();
});
