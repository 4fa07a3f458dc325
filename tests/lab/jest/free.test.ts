import {
  EXPRESSION,
  frameworks,
  freedWords,
  whyNotFree
} from '../../../labextension/src/free';
import { GIB } from './usage';

const trans: any = {
  __: (text: string, ...args: unknown[]) =>
    text.replace(/%(\d)/g, (_, number) => String(args[number - 1]))
};
const words = (said: string, before: number, after: number) =>
  freedWords(said, before * GIB, after * GIB, trans);
const KEEPS =
  'What variables hold is freed when they are deleted; a restart frees all.';

test('how much was freed, and what is left', () => {
  expect(words("'torch=done'", 2, 0.8)).toBe(
    `Freed 1.2 GiB. 819.2 MiB are still in use. ${KEEPS}`
  );
  expect(words("'torch=done'", 2, 0)).toBe('Freed 2 GiB: all that it held.');
});

test('what was not possible', () => {
  expect(words("''", 2, 2)).toBe(
    `Nothing was freed: 2 GiB are still in use. This kernel uses no framework that can free its caches. ${KEEPS}`
  );
  const said = words(
    "'torch=unused cupy=AttributeError jax=done tensorflow=keeps'",
    1,
    1
  );
  for (const sentence of [
    'PyTorch has not used the GPU.',
    'CuPy could not: AttributeError.',
    'JAX has forgotten its compiled functions; the memory that it allocated it keeps.',
    'TensorFlow keeps its memory until the kernel restarts.'
  ]) {
    expect(said).toContain(sentence);
  }
});

test('a kernel that took more meanwhile freed nothing', () => {
  expect(words("'torch=done'", 1, 3)).toContain('Nothing was freed');
});

test.each(['', '<img src=x>', 'torch=', 'torch=<b>', 'numpy=done', '[1]'])(
  'junk that a kernel answers says nothing: %s',
  said => {
    expect(frameworks(said).size).toBe(0);
  }
);

test('the expression is one line of Python, whatever is in the code', () => {
  expect(EXPRESSION.split('\n').length).toBe(1);
});

test('why not now', () => {
  const free = { state: 'idle', language: 'python', lent: false };
  const why = (part: object) => whyNotFree({ ...free, ...part }, trans);
  expect(why({})).toBeNull();
  expect(why({ state: 'busy' })).toBe('the kernel is busy');
  expect(why({ state: null })).toBe('the kernel is busy');
  expect(why({ language: 'R' })).toBe('only in Python kernels');
  expect(why({ language: null })).toBe('only in Python kernels');
  expect(why({ lent: true })).toBe('its GPU is lent to others');
});
