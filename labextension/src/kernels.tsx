import type { TranslationBundle } from '@jupyterlab/translation';
import { editIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { IDeviceUsage, IKernelUsage, ISuspension, IUsage } from './api';
import { awayWords } from './away';
import {
  formatDuration,
  formatMemory,
  formatMemoryOf,
  kernelPercent,
  kernelTotals,
  overLimit,
  unseenBytes
} from './format';
import { warningIcon } from './icons';
import { KernelMenuButton } from './kernelmenu';
import { LimitForm, type SetLimit } from './limitform';
import { limitTexts } from './limittexts';
import { suspendedOf, suspendedWords, withSuspended } from './suspended';
import {
  clock,
  isolated,
  kernelName,
  kindWords,
  sourceWords,
  stateWords
} from './words';

/** A kernel that holds memory and has not used the GPU for so long is said to. */
const UNUSED_SECONDS = 60;

interface IKernelsProps {
  usage: IUsage;
  trans: TranslationBundle;
  setLimit: SetLimit;
  resume: (pid: number) => Promise<void>;
}

/** The server's kernels by notebook: what each holds, and its limits, which can be set here. */
export function Kernels(props: IKernelsProps): JSX.Element {
  const { usage, trans } = props;
  const kernels = withSuspended(usage);
  const [editing, setEditing] = React.useState<string | null>(null);
  return (
    <>
      {kernels.length === 0 ? (
        <p className="nbgpu-quiet">
          {trans.__('No kernel runs on this server.')}
        </p>
      ) : (
        <table className="nbgpu-Kernels">
          <caption className="nbgpu-hidden">
            {trans.__('Kernels of this server and what they hold')}
          </caption>
          <thead>
            <tr>
              <th scope="col">{trans.__('Memory')}</th>
              <th scope="col">{trans.__('Compute')}</th>
              <th scope="col">{trans.__('Limit')}</th>
            </tr>
          </thead>
          {kernels.map(kernel => (
            <Kernel
              key={kernel.kernel_id ?? ''}
              kernel={kernel}
              devices={usage.devices}
              suspended={suspendedOf(kernel, usage)}
              mayResume={usage.may_resume ?? false}
              trans={trans}
              editing={
                kernel.kernel_id !== null && editing === kernel.kernel_id
              }
              edit={on => setEditing(on ? kernel.kernel_id : null)}
              setLimit={props.setLimit}
              resume={props.resume}
            />
          ))}
        </table>
      )}
      <Unseen usage={usage} trans={trans} />
    </>
  );
}

/** What no row has: a program that was started without the limiter. */
function Unseen(props: {
  usage: IUsage;
  trans: TranslationBundle;
}): JSX.Element | null {
  const bytes = unseenBytes(props.usage);
  return bytes > 0 ? (
    <p className="nbgpu-Kernels-over">
      <warningIcon.react tag="span" width="14px" />
      {props.trans.__(
        "%1 more are held than the kernels account for: by a program without nbgpu's limiter (LD_PRELOAD was changed), or by code and buffers of the driver.",
        formatMemory(bytes)
      )}
    </p>
  ) : null;
}

interface IKernelProps {
  kernel: IKernelUsage;
  devices: IDeviceUsage[];
  suspended: ISuspension[];
  mayResume: boolean;
  trans: TranslationBundle;
  editing: boolean;
  edit: (on: boolean) => void;
  setLimit: SetLimit;
  resume: (pid: number) => Promise<void>;
}

function Kernel(props: IKernelProps): JSX.Element {
  const { kernel, devices, trans } = props;
  const totals = kernelTotals(kernel);
  const name = kernelName(kernel, trans);
  const over = overLimit(kernel, devices);
  const limit = limitWords(kernel, devices, trans);
  const source = sourceWords(kernel, trans);
  const unused = kernel.idle_seconds ?? 0;
  const change = React.useRef<HTMLButtonElement>(null);
  return (
    <tbody data-kernel={kernel.kernel_id ?? 'other'}>
      <tr>
        <th scope="rowgroup" colSpan={3} title={kernel.path ?? name}>
          <div className="nbgpu-Kernels-title">
            <bdi className="nbgpu-Kernels-name">{name}</bdi>
            {props.suspended.length > 0 && (
              <span className="nbgpu-Kernels-suspended">
                {trans.__('suspended')}
              </span>
            )}
            {kernel.refusals > 0 && (
              <span className="nbgpu-quiet">
                {trans._n('%1 refusal', '%1 refusals', kernel.refusals)}
              </span>
            )}
            <KernelMenuButton
              kernelId={kernel.kernel_id}
              name={name}
              trans={trans}
            />
          </div>
          <About kernel={kernel} trans={trans} />
        </th>
      </tr>
      <tr>
        <td>
          {totals.usedBytes > 0 ? formatMemory(totals.usedBytes) : '–'}
          {totals.peakBytes > totals.usedBytes && (
            <span className="nbgpu-quiet">
              {trans.__('peak %1', formatMemory(totals.peakBytes))}
            </span>
          )}
        </td>
        <td>
          {trans.__('%1 %', kernelPercent(kernel, devices))}
          {totals.usedBytes > 0 && unused >= UNUSED_SECONDS && (
            <span className="nbgpu-quiet">
              {trans.__('unused for %1', formatDuration(unused))}
            </span>
          )}
        </td>
        <td>
          {kernel.kernel_id !== null && (
            <button
              ref={change}
              className="nbgpu-Kernels-limit"
              aria-expanded={props.editing}
              aria-label={trans.__(
                'Limit of %1: %2. Change it',
                name,
                source ? `${limit} (${source})` : limit
              )}
              title={trans.__('Change the limit of %1', isolated(name))}
              onClick={() => props.edit(!props.editing)}
            >
              {limit}
              <editIcon.react tag="span" width="12px" />
            </button>
          )}
          {source && <span className="nbgpu-quiet">{source}</span>}
        </td>
      </tr>
      {kernel.away && (
        <tr>
          <td colSpan={3} role="status">
            {awayWords(kernel, trans)}
          </td>
        </tr>
      )}
      {over && (
        <tr>
          <td colSpan={3}>
            <div className="nbgpu-Kernels-over">
              <warningIcon.react tag="span" width="14px" />
              {trans.__(
                'Over its limit (%1): it keeps what it holds and is given no more until it frees some.',
                formatMemoryOf(over.usedBytes, over.limitBytes, trans)
              )}
            </div>
          </td>
        </tr>
      )}
      {props.suspended.map(one => (
        <Suspended key={one.pid} {...props} one={one} />
      ))}
      {props.editing && (
        <tr>
          <td colSpan={3}>
            <LimitForm
              kernel={kernel}
              name={name}
              devices={devices}
              trans={trans}
              setLimit={props.setLimit}
              close={() => {
                props.edit(false);
                change.current?.focus(); // else the keyboard would start again at the top of the page
              }}
            />
          </td>
        </tr>
      )}
    </tbody>
  );
}

/** What it is and does: "Python 3 (ipykernel) · busy". */
function About(props: {
  kernel: IKernelUsage;
  trans: TranslationBundle;
}): JSX.Element | null {
  const { kernel, trans } = props;
  const words =
    kernel.kernel_id === null
      ? [trans.__('Terminals and programs')]
      : [kindWords(kernel), stateWords(kernel, trans)].filter(Boolean);
  return words.length === 0 ? null : (
    <div
      className="nbgpu-Kernels-about nbgpu-quiet"
      data-state={kernel.state ?? undefined}
    >
      {words.join(' · ')}
    </div>
  );
}

/** Why a process is suspended, and where the user may: letting it go on. */
function Suspended(props: IKernelProps & { one: ISuspension }): JSX.Element {
  const { one, mayResume, trans } = props;
  const [error, setError] = React.useState('');
  return (
    <tr>
      <td colSpan={3}>
        <div className="nbgpu-Kernels-over" role="status">
          {trans.__('Process %1 since %2.', one.pid, clock(one.since))}{' '}
          {suspendedWords(one, mayResume, trans)}
          {mayResume && (
            <button
              type="button"
              className="jp-mod-styled jp-mod-reject nbgpu-Kernels-resume"
              onClick={() =>
                void props
                  .resume(one.pid)
                  .catch(reason => setError((reason as Error).message))
              }
            >
              {trans.__('Let it go on')}
            </button>
          )}
          {error && <p role="alert">{error}</p>}
        </div>
      </td>
    </tr>
  );
}

/** "5 GiB, 50 %": of its own, the time as a part of the slice's. */
function limitWords(
  kernel: IKernelUsage,
  devices: IDeviceUsage[],
  trans: TranslationBundle
): string {
  const words = Object.values(limitTexts(kernel, devices))
    .filter(Boolean)
    .map(text => text.replace(' ', '\u00a0')); // a number stays with its unit
  return words.length > 0 ? words.join(', ') : trans.__('none');
}
