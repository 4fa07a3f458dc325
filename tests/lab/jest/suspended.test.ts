import type { ISuspension, IUsage } from '../../../labextension/src/api';
import {
  suspendedOf,
  suspendedWords,
  withSuspended
} from '../../../labextension/src/suspended';
import { answer, kernel, trans } from './usage';

function suspension(
  pid: number,
  kernel_id: string | null,
  how: 'lock' | 'stop' = 'lock'
): ISuspension {
  const reason = "it used the GPU (3 GiB) without nbgpu's limiter";
  return { pid, kernel_id, kind: 'unlimited', how, since: 1, reason };
}

function usage(...suspended: ISuspension[]): IUsage {
  return { ...(answer(1) as IUsage), kernels: [kernel()], suspended };
}

test("a suspended process is shown at its kernel, all others at 'other'", () => {
  const used = usage(
    suspension(1, 'a'),
    suspension(2, null),
    suspension(3, 'unknown')
  );
  const shown = withSuspended(used).map(one => [
    one.kernel_id,
    suspendedOf(one, used).map(({ pid }) => pid)
  ]);
  expect(shown).toEqual([
    ['a', [1]],
    [null, [2, 3]]
  ]);
});

test("'other' is not added where it is there, or needed by nobody", () => {
  expect(withSuspended(usage(suspension(1, 'a')))).toHaveLength(1);
  const both = {
    ...usage(suspension(2, null)),
    kernels: [kernel(), kernel({ kernel_id: null })]
  };
  expect(withSuspended(both)).toHaveLength(2);
});

test('an older agent says nothing of suspended processes', () => {
  const { suspended: _, ...old } = usage();
  expect(withSuspended(old)).toHaveLength(1);
  expect(suspendedOf(kernel(), old)).toEqual([]);
});

test('the words say what waits and what to do', () => {
  expect(suspendedWords(suspension(1, 'a'), true, trans)).toBe(
    "Suspended: its calls to the GPU wait, because it used the GPU (3 GiB) without nbgpu's limiter."
  );
  expect(suspendedWords(suspension(1, 'a', 'stop'), false, trans)).toBe(
    "Suspended: it stands still, because it used the GPU (3 GiB) without nbgpu's limiter. Restart it, or ask your administrator."
  );
});
