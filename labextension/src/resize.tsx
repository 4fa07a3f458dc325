import type { TranslationBundle } from '@jupyterlab/translation';
import { editIcon } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { IResizeAnswer, IRoom, IUsage, IWrittenSize } from './api';
import { Field } from './field';
import { fieldsOf, sizeAsked, withShare } from './size';
import { answerWords, isShown, limitsOf, roomWords } from './words';

interface IResizeProps {
  usage: IUsage;
  trans: TranslationBundle;
  room: () => Promise<IRoom>;
  resize: (asked: IWrittenSize) => Promise<IResizeAnswer>;
}

/** A button that opens a form for another size of the whole slice; the pool's answer stays under it. */
export function Resize(props: IResizeProps): JSX.Element {
  const { trans } = props;
  const [open, setOpen] = React.useState(false);
  const [told, setTold] = React.useState<IResizeAnswer | null>(null);
  const button = React.useRef<HTMLButtonElement>(null);
  const limits = limitsOf(props.usage);
  const [seen, setSeen] = React.useState(limits);
  React.useEffect(() => {
    if (limits !== seen) {
      setSeen(limits);
      // somebody has given it another size since
      setTold(told && isShown(told, props.usage) ? told : null);
    }
  }, [limits]);
  const close = () => {
    setOpen(false);
    button.current?.focus();
  };
  return (
    <div className="nbgpu-Resize">
      <button
        ref={button}
        type="button"
        className="nbgpu-Kernels-limit"
        aria-expanded={open}
        onClick={() => {
          setOpen(!open);
          setTold(null); // the answer to an earlier wish says nothing of this one
        }}
      >
        {trans.__('Change the size of this slice')}
        <editIcon.react tag="span" width="12px" />
      </button>
      {open && (
        <ResizeForm
          {...props}
          close={close}
          done={answer => {
            setTold(answer);
            close();
          }}
        />
      )}
      <div role="status">
        {told && (
          <p className="nbgpu-quiet">{answerWords(told, props.usage, trans)}</p>
        )}
      </div>
    </div>
  );
}

function ResizeForm(
  props: IResizeProps & {
    close: () => void;
    done: (answer: IResizeAnswer) => void;
  }
): JSX.Element {
  const { usage, trans } = props;
  const [had] = React.useState(() => fieldsOf(usage.devices[0]));
  const [fields, setFields] = React.useState(had);
  const [error, setError] = React.useState('');
  const [waits, setWaits] = React.useState(false);
  const [room, setRoom] = React.useState<IRoom>({ devices: [] });
  const first = React.useRef<HTMLInputElement>(null);
  React.useEffect(() => first.current?.focus(), []);
  React.useEffect(() => {
    let open = true;
    // again after a refusal, which may be of what others have got since; a hub that does not say has the last word anyway
    props
      .room()
      .then(now => open && setRoom(now))
      .catch(() => open && setRoom({ devices: [] }));
    return () => {
      open = false;
    };
  }, [error]);

  const ask = async (): Promise<void> => {
    const asked = sizeAsked(fields, had);
    if (!asked) {
      props.close();
      return;
    }
    setWaits(true);
    try {
      props.done(await props.resize(asked));
    } catch (reason) {
      setError((reason as Error).message);
      setWaits(false);
    }
  };
  return (
    <form
      className="nbgpu-LimitForm"
      aria-label={trans.__('Size of this slice')}
      onSubmit={event => {
        event.preventDefault();
        void ask();
      }}
      onKeyDown={event => event.key === 'Escape' && props.close()}
    >
      <Field
        label={trans.__('Share of a GPU')}
        value={fields.share}
        placeholder={trans.__('such as 1/2 or 25 %')}
        change={share => setFields(withShare(fields, share, had))}
        field={first}
      />
      <Field
        label={trans.__('GPU memory')}
        value={fields.memory}
        placeholder={trans.__('follows the share')}
        change={memory => setFields({ ...fields, memory })}
      />
      <div className="nbgpu-Resize-room" aria-live="polite">
        {roomWords(room, trans).map(words => (
          <p key={words} className="nbgpu-quiet">
            {words}
          </p>
        ))}
      </div>
      <p className="nbgpu-quiet">
        {trans.__(
          'Notebooks go on. Those that hold more than a smaller slice has keep it and are given no more.'
        )}
      </p>
      {error && <p role="alert">{error}</p>}
      <div className="nbgpu-LimitForm-buttons">
        <button
          type="button"
          className="jp-mod-styled jp-mod-reject"
          onClick={props.close}
        >
          {trans.__('Cancel')}
        </button>
        <button
          type="submit"
          className="jp-mod-styled jp-mod-accept"
          disabled={waits}
        >
          {trans.__('Ask for it')}
        </button>
      </div>
    </form>
  );
}
