import * as React from 'react';

interface IFieldProps {
  label: string;
  value: string;
  placeholder: string;
  change: (value: string) => void;
  field?: React.Ref<HTMLInputElement>;
}

/** One line of text in a form of the panel, under its name. */
export function Field(props: IFieldProps): JSX.Element {
  return (
    <label>
      {props.label}
      <input
        ref={props.field}
        className="jp-mod-styled"
        value={props.value}
        placeholder={props.placeholder}
        onChange={event => props.change(event.target.value)}
      />
    </label>
  );
}
