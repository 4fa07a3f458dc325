/** Freeing what a framework keeps for later, in a running Python kernel: the code that is run, and what became of it in words. */

import type { TranslationBundle } from '@jupyterlab/translation';

import { formatMemory } from './format';

/** What is run, with consent, of what the kernel has imported already; it imports nothing, and leaves no name behind. */
export const CODE = `
import gc, sys
said = []
def attempt(name, work):
    module = sys.modules.get(name)
    if module is not None:
        try:
            said.append(name + '=' + (work(module) or 'done'))
        except Exception as error:
            said.append(name + '=' + type(error).__name__)
def torch(module):
    if not module.cuda.is_initialized():
        return 'unused'
    module.cuda.empty_cache()
def cupy(module):
    module.get_default_memory_pool().free_all_blocks()
    module.get_default_pinned_memory_pool().free_all_blocks()
def jax(module):
    module.clear_caches()
def tensorflow(module):
    return 'keeps'
gc.collect()
attempt('torch', torch)
attempt('cupy', cupy)
attempt('jax', jax)
attempt('tensorflow', tensorflow)
said = ' '.join(said)
`;

/** For people: what of the code does something. */
export const CALLS = [
  'gc.collect()',
  'torch.cuda.empty_cache()',
  'cupy.get_default_memory_pool().free_all_blocks()',
  'cupy.get_default_pinned_memory_pool().free_all_blocks()',
  'jax.clear_caches()'
];

/** The code as one Python expression that runs beside the notebook's names and says what became of it. */
export const EXPRESSION = `(lambda names: (exec(${JSON.stringify(CODE)}, names), names['said'])[1])({})`;

const NAMES: { [module: string]: string } = {
  torch: 'PyTorch',
  cupy: 'CuPy',
  jax: 'JAX',
  tensorflow: 'TensorFlow'
};

/** What each framework did: "done", "unused", "keeps", or the name of an error. Junk says nothing. */
export function frameworks(said: string): Map<string, string> {
  const found = said.matchAll(
    /\b(torch|cupy|jax|tensorflow)=([A-Za-z_]\w{0,60})/g
  );
  return new Map([...found].map(([, module, result]) => [module, result]));
}

/** What came of it, by the agent's numbers, and why not more. */
export function freedWords(
  said: string,
  beforeBytes: number,
  afterBytes: number,
  trans: TranslationBundle
): string {
  const freed = beforeBytes - afterBytes;
  const found = frameworks(said);
  const left = formatMemory(afterBytes);
  const sentences: string[] = [];
  if (afterBytes === 0) {
    sentences.push(
      freed > 0
        ? trans.__('Freed %1: all that it held.', formatMemory(freed))
        : trans.__('It holds no GPU memory.')
    );
  } else {
    sentences.push(
      freed > 0
        ? trans.__('Freed %1. %2 are still in use.', formatMemory(freed), left)
        : trans.__('Nothing was freed: %1 are still in use.', left)
    );
  }
  if (found.size === 0) {
    sentences.push(
      trans.__('This kernel uses no framework that can free its caches.')
    );
  }
  for (const [module, result] of found) {
    const words = frameworkWords(module, result, trans);
    if (words) {
      sentences.push(words);
    }
  }
  if (afterBytes > 0) {
    sentences.push(
      trans.__(
        'What variables hold is freed when they are deleted; a restart frees all.'
      )
    );
  }
  return sentences.join(' ');
}

function frameworkWords(
  module: string,
  result: string,
  trans: TranslationBundle
): string | null {
  const name = NAMES[module];
  switch (result) {
    case 'done':
      return module === 'jax'
        ? trans.__(
            'JAX has forgotten its compiled functions; the memory that it allocated it keeps.'
          )
        : null;
    case 'unused':
      return trans.__('%1 has not used the GPU.', name);
    case 'keeps':
      return trans.__('%1 keeps its memory until the kernel restarts.', name);
    default:
      return trans.__('%1 could not: %2.', name, result);
  }
}

/** Why caches cannot be freed now, short, for a menu; null when they can. */
export function whyNotFree(
  kernel: { state: string | null; language: string | null; lent: boolean },
  trans: TranslationBundle
): string | null {
  if (kernel.language !== 'python') {
    return trans.__('only in Python kernels');
  }
  if (kernel.lent) {
    return trans.__('its GPU is lent to others');
  }
  return kernel.state === 'idle' ? null : trans.__('the kernel is busy');
}
