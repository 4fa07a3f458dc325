import { Signal } from '@lumino/signaling';

import { SliceModel } from '../../../labextension/src/model';
import { keepRange } from '../../../labextension/src/range';

let kept: number;
let saved: number[];
let save: () => void;
let model: SliceModel;

/** Settings whose server takes its time: what is set is there, and told, once `save` is called. */
class FakeSettings {
  changed = new Signal<this, void>(this);
  get = () => ({ composite: kept, user: kept });

  set(_: string, seconds: number): Promise<void> {
    saved.push(seconds);
    return new Promise(done => {
      const before = save;
      save = () => {
        before();
        kept = seconds;
        this.changed.emit();
        done();
      };
    });
  }
}

let settings: any;

beforeEach(() => {
  kept = 3600;
  saved = [];
  save = () => undefined;
  settings = new FakeSettings();
  model = new SliceModel({ api: {} as any, auto: false });
  keepRange(model, settings);
});

afterEach(() => model.dispose());

test('what is kept is shown, and not saved once more', () => {
  expect([model.historySeconds, saved]).toEqual([3600, []]);
});

test('what is chosen is kept', () => {
  model.showHistory(60);
  expect(saved).toEqual([60]);
});

test('what is chosen while the choice before it is saved stays', async () => {
  model.showHistory(60);
  model.showHistory(600);
  save();
  await new Promise(setImmediate);
  expect([model.historySeconds, kept, saved]).toEqual([600, 600, [60, 600]]);
});

test('what is chosen, and then not, is as it was', async () => {
  model.showHistory(60);
  model.showHistory(3600);
  save();
  await new Promise(setImmediate);
  expect([model.historySeconds, kept]).toEqual([3600, 3600]);
});

test('what is changed in the settings editor is shown', () => {
  kept = 60;
  settings.changed.emit();
  expect([model.historySeconds, saved]).toEqual([60, []]);
});

test('settings that cannot be written cost nothing but the next page', async () => {
  const warned = jest.spyOn(console, 'warn').mockImplementation();
  settings.set = async () => Promise.reject(new Error('read-only'));
  model.showHistory(60);
  await new Promise(setImmediate);
  expect(model.historySeconds).toBe(60);
  expect(warned).toHaveBeenCalledTimes(1);
  warned.mockRestore();
});
