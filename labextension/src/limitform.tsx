import type { TranslationBundle } from '@jupyterlab/translation';
import { closeIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { IDeviceUsage, IKernelUsage, IWrittenLimit } from './api';
import { Field } from './field';
import { limitTexts, roundedWords } from './limittexts';

/** Limit a kernel, and where `keep` say so in its notebook too; rejects with words for the user. */
export type SetLimit = (
  kernel: IKernelUsage,
  limit: IWrittenLimit,
  keep: boolean
) => Promise<void>;

interface ILimitFormProps {
  kernel: IKernelUsage;
  name: string;
  devices: IDeviceUsage[];
  trans: TranslationBundle;
  setLimit: SetLimit;
  close: () => void;
}

/** The limits of one kernel as text; the server checks them and says what is wrong. */
export function LimitForm(props: ILimitFormProps): JSX.Element {
  const { kernel, trans } = props;
  const canKeep = kernel.type === 'notebook' && kernel.path !== null;
  const [keep, setKeep] = React.useState(
    () =>
      canKeep && (!kernel.limit_source || kernel.limit_source === 'notebook')
  );
  const [before] = React.useState(() => limitTexts(kernel, props.devices));
  const [memory, setMemory] = React.useState(before.memory);
  const [compute, setCompute] = React.useState(before.compute);
  const [error, setError] = React.useState('');
  const first = React.useRef<HTMLInputElement>(null);
  React.useEffect(() => {
    first.current?.form?.scrollIntoView({ block: 'nearest' });
    first.current?.focus();
  }, []);
  React.useEffect(() => {
    first.current?.form?.scrollIntoView({ block: 'nearest' }); // what was refused made it longer
  }, [error]);

  const save = async (limit: IWrittenLimit): Promise<void> => {
    try {
      await props.setLimit(kernel, limit, keep);
      props.close();
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
          // a part that was written is set anew as such: the slice may have another size since
          ...(compute === before.compute && !kernel.limit_part_milli
            ? { compute_milli: kernel.limit.compute_milli }
            : { compute })
        });
      }}
      onKeyDown={event => event.key === 'Escape' && props.close()}
    >
      <button
        type="button"
        className="nbgpu-LimitForm-close"
        aria-label={trans.__('Close')}
        onClick={() => props.close()}
      >
        <closeIcon.react tag="span" width="14px" />
      </button>
      <Field
        label={trans.__('Memory limit')}
        value={memory}
        placeholder={trans.__('such as 5 GiB or 1/2')}
        change={setMemory}
        field={first}
      />
      <Field
        label={trans.__('Compute limit')}
        value={compute}
        placeholder={trans.__('such as 1/2 or 25 %')}
        change={setCompute}
      />
      <p className="nbgpu-quiet">
        {trans.__('A fraction is of this slice. Empty: no limit of its own.')}{' '}
        {roundedWords(kernel, props.devices, trans)}
      </p>
      {canKeep && (
        <label className="nbgpu-LimitForm-keep">
          <input
            type="checkbox"
            checked={keep}
            onChange={event => setKeep(event.target.checked)}
          />
          {trans.__('Save it in the notebook, for its next kernels too')}
        </label>
      )}
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
