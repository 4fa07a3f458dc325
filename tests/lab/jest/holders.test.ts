import type { IUsage } from '../../../labextension/src/api';
import { holders } from '../../../labextension/src/holders';
import { onChange, whenPresent } from '../../../labextension/src/present';
import { Signal } from '@lumino/signaling';
import { answer, GIB, kernel } from './usage';

function holding(kernelId: string | null, gib: number, part = {}) {
  const use = { memory_used_bytes: gib * GIB, memory_peak_bytes: 0 };
  const devices = [{ uuid: 'GPU-1', compute_used_milli: 0, ...use }];
  return kernel({ kernel_id: kernelId, devices, ...part });
}

test('who holds memory, the most first; others and the empty are left out', () => {
  const usage = {
    ...answer(100),
    kernels: [
      holding('a', 1),
      holding('b', 2.5, { type: 'console', name: 'Console 1', path: 'c' }),
      holding('c', 0),
      kernel({ kernel_id: 'd' }),
      holding(null, 9)
    ]
  } as IUsage;
  expect(holders(usage)).toEqual([
    { kernelId: 'b', name: 'Console 1', path: null, memory: '2.5 GiB' },
    {
      kernelId: 'a',
      name: 'train.ipynb',
      path: 'train.ipynb',
      memory: '1 GiB'
    }
  ]);
  expect(holders(null)).toEqual([]);
});

test('a list is drawn again when it has changed, not at every look', () => {
  const model: any = { value: 'a', present: false };
  model.changed = new Signal<any, void>(model);
  const seen: string[] = [];
  let shown = 0;
  onChange(
    model,
    () => model.value as string,
    now => seen.push(now)
  );
  whenPresent(model, () => (shown += 1));
  for (const value of ['a', 'b', 'b', 'a']) {
    model.value = value;
    model.present = value === 'b';
    model.changed.emit();
  }
  expect(seen).toEqual(['b', 'a']);
  expect(shown).toBe(1);
});
