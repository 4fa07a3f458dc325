import {
  computeWords,
  isolated,
  kindWords,
  shortened,
  sourceWords,
  stateWords
} from '../../../labextension/src/words';
import { answer, kernel, trans } from './usage';
import type { INotice } from '../../../labextension/src/api';

const REFUSED =
  "was refused 9.7 GiB (12 times): this server's slice of 19.5 GiB has 3.1 GiB left. Free memory, restart a kernel that holds some, or stop this server and start it with a larger share.";

test.each([
  ['idle', 750, 'idle for 12 min'],
  ['idle', null, 'idle'],
  ['busy', null, 'busy'],
  ['starting', 5, 'starting'],
  ['starting', 500, 'not used yet'],
  ['something new', null, 'something new'],
  [null, null, '']
])('a kernel that is %s for %s reads as %s', (state, seconds, text) => {
  const one = kernel({ state, state_seconds: seconds });
  expect(stateWords(one, trans)).toBe(text);
});

test('a kernel is named with its language where its name does not say it', () => {
  const named = (kernel_name: string | null, language: string | null) =>
    kindWords(kernel({ kernel_name, language }));
  expect(named('Python 3 (ipykernel)', 'python')).toBe('Python 3 (ipykernel)');
  expect(named('Statistics', 'R')).toBe('Statistics (R)');
  expect(named('Julia 1.11', null)).toBe('Julia 1.11');
  expect(named(null, 'R')).toBe('');
});

test('a name from right to left leaves the words around it in their order', () => {
  expect(isolated('מחברת')).toBe('\u2068מחברת\u2069');
  expect(isolated('a\u202eb')).toBe('\u2068a\u202eb\u2069');
  for (const name of ['train.ipynb', 'ノート.ipynb', 'тетрадь.ipynb']) {
    expect(isolated(name)).toBe(name);
  }
});

test('says where a limit comes from', () => {
  const from = (limit_source: 'notebook' | 'panel' | 'command' | null) =>
    sourceWords(kernel({ limit_source }), trans);
  expect(from('notebook')).toBe('from the notebook');
  expect(from('panel')).toBe('set here');
  expect(from('command')).toBe('set by a command');
  expect(from(null)).toBe('');
  expect(sourceWords(kernel(), trans)).toBe('');
});

function notice(name: string | null, message: string): INotice {
  const rest = { kernel_id: 'a', kind: 'refused', level: 'warning' } as const;
  return { id: 1, time: 1, name, message, ...rest };
}

test('a short notice is as it is, with its notebook', () => {
  expect(shortened(notice('a.ipynb', 'a.ipynb was refused.'), 140)).toBe(
    'a.ipynb was refused.'
  );
  expect(shortened(notice('a.ipynb', 'Refused.'), 140)).toBe(
    'a.ipynb: Refused.'
  );
  expect(shortened(notice(null, 'Refused.'), 140)).toBe('Refused.');
});

test('a long name gives way first', () => {
  const name = 'a-notebook-with-a-very-long-name-indeed.ipynb';
  const text = shortened(notice(name, `${name} was refused 2 GiB.`), 50);
  expect(text).toBe('a-notebook-with…me-indeed.ipynb was refused 2 GiB.');
  expect(text.length).toBeLessThanOrEqual(50);
});

test('a name is cut between its letters', () => {
  const name = `${'📈'.repeat(40)}.ipynb`;
  for (const length of [60, 61, 62, 63]) {
    const text = shortened(notice(name, `${name} was refused 2 GiB.`), length);
    expect(text.length).toBeLessThanOrEqual(length);
    expect(text).toMatch(/^(📈)+…(📈)+\.ipynb was refused 2 GiB\.$/u);
  }
});

test('then the last sentences, never the first', () => {
  for (const name of ['a.ipynb', `${'long-'.repeat(30)}.ipynb`]) {
    const text = shortened(notice(name, `${name} ${REFUSED}`), 140);
    expect(text.length).toBeLessThanOrEqual(140);
    expect(text).toMatch(/was refused 9.7 GiB .* has 3.1 GiB left\.$/);
  }
});

test('one endless sentence ends between words', () => {
  const text = shortened(notice(null, 'word '.repeat(100)), 140);
  expect(text.length).toBeLessThanOrEqual(140);
  expect(text).toMatch(/word…$/);
});

test('a burst slice bursts; a strict one is never said to', () => {
  const [device] = answer(0).devices;
  const busy = { ...device, compute_used_milli: 450, utilization_percent: 100 };
  expect(computeWords(busy, 'burst', trans)).toBe(
    '100 % of 1/4 GPU, bursting to 45 %'
  );
  expect(computeWords(busy, 'strict', trans)).toBe('100 % of 1/4 GPU');
});
