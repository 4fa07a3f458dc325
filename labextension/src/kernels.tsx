import type { TranslationBundle } from '@jupyterlab/translation';
import { closeIcon, editIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

import type {
  IDeviceUsage,
  IKernelUsage,
  ISuspension,
  IUsage,
  IWrittenLimit
} from './api';
import {
  formatMemory,
  formatMemoryOf,
  formatPart,
  kernelTotals,
  overLimit,
  percent
} from './format';
import { KernelMenuButton } from './kernelmenu';
import { suspendedOf, suspendedWords, withSuspended } from './suspended';
import { clock, kernelName } from './words';

interface IKernelsProps {
  usage: IUsage;
  trans: TranslationBundle;
  setLimit: (kernelId: string, limit: IWrittenLimit) => Promise<void>;
  resume: (pid: number) => Promise<void>;
}

/** The server's kernels by notebook: what each holds, and its limits, which can be set here. */
export function Kernels(props: IKernelsProps): JSX.Element {
  const { usage, trans } = props;
  const kernels = withSuspended(usage);
  const [editing, setEditing] = React.useState<string | null>(null);
  if (kernels.length === 0) {
    return (
      <p className="nbgpu-quiet">
        {trans.__('No kernel runs on this server.')}
      </p>
    );
  }
  return (
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
          editing={kernel.kernel_id !== null && editing === kernel.kernel_id}
          edit={on => setEditing(on ? kernel.kernel_id : null)}
          setLimit={props.setLimit}
          resume={props.resume}
        />
      ))}
    </table>
  );
}

interface IKernelProps {
  kernel: IKernelUsage;
  devices: IDeviceUsage[];
  suspended: ISuspension[];
  mayResume: boolean;
  trans: TranslationBundle;
  editing: boolean;
  edit: (on: boolean) => void;
  setLimit: (kernelId: string, limit: IWrittenLimit) => Promise<void>;
  resume: (pid: number) => Promise<void>;
}

function Kernel(props: IKernelProps): JSX.Element {
  const { kernel, devices, trans } = props;
  const totals = kernelTotals(kernel);
  // a slice that bursts uses more than its share: its kernels divide what it uses, as 100 %
  const sliceMilli = devices.reduce(
    (sum, d) => sum + Math.max(d.compute_limit_milli, d.compute_used_milli),
    0
  );
  const name = kernelName(kernel, trans);
  const over = overLimit(kernel, devices);
  const limit = limitWords(kernel, devices, trans);
  return (
    <tbody data-kernel={kernel.kernel_id ?? 'other'}>
      <tr>
        <th scope="rowgroup" colSpan={3} title={kernel.path ?? name}>
          <div className="nbgpu-Kernels-title">
            <span className="nbgpu-Kernels-name">{name}</span>
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
        <td>{trans.__('%1 %', percent(totals.computeMilli, sliceMilli))}</td>
        <td>
          {kernel.kernel_id !== null && (
            <button
              className="nbgpu-Kernels-limit"
              aria-expanded={props.editing}
              aria-label={trans.__('Limit of %1: %2. Change it', name, limit)}
              title={trans.__('Change the limit of %1', name)}
              onClick={() => props.edit(!props.editing)}
            >
              {limit}
              <editIcon.react tag="span" width="12px" />
            </button>
          )}
        </td>
      </tr>
      {over && (
        <tr>
          <td colSpan={3}>
            <div className="nbgpu-Kernels-over">
              {trans.__(
                'Over its limit (%1): it keeps what it holds and is given no more until it frees some.',
                formatMemoryOf(over.usedBytes, over.limitBytes)
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
            <LimitForm {...props} name={name} />
          </td>
        </tr>
      )}
    </tbody>
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

/** A kernel's limits as texts that the form takes back; empty: none of its own. */
function limitTexts(
  kernel: IKernelUsage,
  devices: IDeviceUsage[]
): { memory: string; compute: string } {
  const { memory_bytes, compute_milli } = kernel.limit;
  const sliceMilli = Math.min(...devices.map(d => d.compute_limit_milli));
  return {
    memory: memory_bytes !== null ? formatMemory(memory_bytes) : '',
    compute: compute_milli !== null ? formatPart(compute_milli, sliceMilli) : ''
  };
}

/** The limits of one kernel as text; the server checks them and says what is wrong. */
function LimitForm(props: IKernelProps & { name: string }): JSX.Element {
  const { kernel, trans } = props;
  const [before] = React.useState(() => limitTexts(kernel, props.devices));
  const [memory, setMemory] = React.useState(before.memory);
  const [compute, setCompute] = React.useState(before.compute);
  const [error, setError] = React.useState('');
  const first = React.useRef<HTMLInputElement>(null);
  React.useEffect(() => first.current?.focus(), []);

  const save = async (limit: IWrittenLimit): Promise<void> => {
    try {
      await props.setLimit(kernel.kernel_id!, limit);
      props.edit(false);
    } catch (reason) {
      setError((reason as Error).message);
    }
  };
  return (
    <form
      className="nbgpu-LimitForm"
      aria-label={trans.__('Limit of %1', props.name)}
      onSubmit={event => {
        event.preventDefault();
        void save({
          ...(memory === before.memory
            ? { memory_bytes: kernel.limit.memory_bytes }
            : { memory }),
          ...(compute === before.compute
            ? { compute_milli: kernel.limit.compute_milli }
            : { compute })
        });
      }}
      onKeyDown={event => event.key === 'Escape' && props.edit(false)}
    >
      <button
        type="button"
        className="nbgpu-LimitForm-close"
        aria-label={trans.__('Close')}
        onClick={() => props.edit(false)}
      >
        <closeIcon.react tag="span" width="14px" />
      </button>
      <label>
        {trans.__('Memory limit')}
        <input
          ref={first}
          className="jp-mod-styled"
          value={memory}
          placeholder={trans.__('such as 5 GiB or 1/2')}
          onChange={event => setMemory(event.target.value)}
        />
      </label>
      <label>
        {trans.__('Compute limit')}
        <input
          className="jp-mod-styled"
          value={compute}
          placeholder={trans.__('such as 1/2 or 25 %')}
          onChange={event => setCompute(event.target.value)}
        />
      </label>
      <p className="nbgpu-quiet">
        {trans.__('A fraction is of this slice. Empty: no limit of its own.')}
      </p>
      {error && <p role="alert">{error}</p>}
      <div className="nbgpu-LimitForm-buttons">
        {(before.memory || before.compute) && (
          <button
            type="button"
            className="jp-mod-styled jp-mod-reject"
            onClick={() => void save({})}
          >
            {trans.__('Remove')}
          </button>
        )}
        <button type="submit" className="jp-mod-styled jp-mod-accept">
          {trans.__('Set limit')}
        </button>
      </div>
    </form>
  );
}
