import { metadataOf, NotebookKeeper } from '../../../labextension/src/keep';
import { GIB, kernel } from './usage';

test.each([
  [{ memory: ' 5 GiB ', compute: '' }, null, { memory: '5 GiB' }],
  [{ memory: '', compute: '1/2' }, null, { compute: '1/2' }],
  [{}, { memory: '5 GiB' }, null],
  [{ memory_bytes: null, compute_milli: null }, null, null],
  // what was not touched keeps its words, where they are what is in force
  [{ memory_bytes: 5 * GIB }, { memory: '1/4' }, { memory: '1/4' }],
  [{ memory_bytes: 5 * GIB }, false, { memory_bytes: 5 * GIB }],
  [{ memory_bytes: 5 * GIB }, 'junk', { memory_bytes: 5 * GIB }],
  [{ memory: '6 GiB' }, { memory: '1/4' }, { memory: '6 GiB' }],
  [
    { memory_bytes: GIB, compute_milli: 125 },
    { compute: 0.5 },
    { memory_bytes: GIB, compute: 0.5 }
  ]
])('%j over %j is kept as %j', (limit, before, kept) => {
  expect(metadataOf(limit, before)).toEqual(kept);
});

class FakeContents {
  saved: any = null;
  file = { content: { cells: [1], metadata: { nbgpu: 'junk', other: 1 } } };
  localPath = (path: string) => path.replace(/^RTC:/, '');
  get = async () => this.file as any;
  save = async (path: string, options: any) => (this.saved = { path, ...options }); // prettier-ignore
}

class FakeDocument {
  metadata = new Map<string, unknown>();
  saves = 0;
  context: any;
  constructor(path: string) {
    this.context = {
      path,
      model: {
        getMetadata: (key: string) => this.metadata.get(key),
        setMetadata: (key: string, value: unknown) =>
          this.metadata.set(key, value),
        deleteMetadata: (key: string) => this.metadata.delete(key)
      },
      save: async () => (this.saves += 1)
    };
  }
}

const terminal = { context: undefined };
const text = { context: { path: 'train.ipynb', model: {} } };

test('a notebook that is not open is changed in its file; all else in it stays', async () => {
  const contents = new FakeContents();
  const other = new FakeDocument('deep/train.ipynb');
  const keeper = new NotebookKeeper(() => [terminal, text, other], contents);
  await keeper.keep(kernel(), { memory: '5 GiB' });
  expect(contents.saved.path).toBe('train.ipynb');
  expect(contents.saved.content).toEqual({
    cells: [1],
    metadata: { other: 1, nbgpu: { memory: '5 GiB' } }
  });
  await keeper.keep(kernel(), {});
  expect(contents.saved.content.metadata).toEqual({ other: 1 });
  expect(other.metadata.size).toBe(0);
});

test('one that is open is changed there, and saved', async () => {
  const contents = new FakeContents();
  const open = new FakeDocument('RTC:train.ipynb');
  const keeper = new NotebookKeeper(() => [terminal, open], contents);
  await keeper.keep(kernel(), { memory: '1/2' });
  expect([open.metadata.get('nbgpu'), open.saves]).toEqual([
    { memory: '1/2' },
    1
  ]);
  await keeper.keep(kernel({ limit_source: 'notebook' }), {
    memory_bytes: 10 * GIB,
    compute: '1/2'
  });
  expect(open.metadata.get('nbgpu')).toEqual({ memory: '1/2', compute: '1/2' });
  await keeper.keep(kernel(), {});
  expect([open.metadata.has('nbgpu'), open.saves]).toEqual([false, 3]);
  expect(contents.saved).toBeNull();
});
