/** The words of a page that has no catalogue: a monitor in a cell, where the extension is not. */

import type { TranslationBundle } from '@jupyterlab/translation';

/** As much of a catalogue as sentences without a plural need. */
export type Words = Pick<TranslationBundle, '__'>;

export const ENGLISH: Words = {
  __: (text, ...args) =>
    text.replace(/%(\d+)/g, (_, number) => String(args[number - 1]))
};
