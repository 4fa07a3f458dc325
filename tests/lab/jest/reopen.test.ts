import { Message, MessageLoop } from '@lumino/messaging';

import { reopen } from '../../../labextension/src/reopen';

/** A widget in a side bar, as far as messages tell: there is no page here. */
class Panel {
  isAttached = true;
  isVisible = false;

  processMessage(): void {}

  show(): void {
    this.isVisible = true;
    MessageLoop.sendMessage(this, new Message('after-show'));
  }

  hide(): void {
    MessageLoop.sendMessage(this, new Message('before-hide'));
    this.isVisible = false;
  }
}

let kept: Map<string, any>;
let panel: any;
let shown: number;

const state: any = {
  fetch: (key: string) => Promise.resolve(kept.get(key)),
  save: (key: string, value: unknown) => {
    kept.set(key, value);
    return Promise.resolve();
  }
};

const begin = () => {
  panel = new Panel();
  shown = 0;
  return reopen(panel, state, () => {
    shown++;
    panel.show();
  });
};

beforeEach(() => {
  kept = new Map();
});

test('who never opened it does not find it open', async () => {
  await begin();
  expect(shown).toBe(0);
});

test('it is open again after it was open, and closed after it was closed', async () => {
  await begin();
  panel.show();
  await begin();
  expect(shown).toBe(1);
  panel.hide();
  await begin();
  expect(shown).toBe(0);
});

test.each([null, 'open', { open: 'yes' }])(
  'junk that was kept, such as %j, opens nothing',
  async junk => {
    await begin();
    panel.show();
    kept = new Map([...kept.keys()].map(key => [key, junk]));
    await begin();
    expect(shown).toBe(0);
  }
);

test('a state that cannot be read or written is no error', async () => {
  const gone = () => Promise.reject(new Error('gone'));
  panel = new Panel();
  shown = 0;
  await reopen(panel, { fetch: gone, save: gone } as any, () => shown++);
  panel.show();
  await new Promise(done => setTimeout(done));
  expect(shown).toBe(0);
});
