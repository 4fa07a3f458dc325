import type { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

interface IBoundaryProps {
  trans: TranslationBundle;
  /** Where there is room for one line: the sentence is the button. */
  short?: boolean;
  children?: React.ReactNode;
}

/** Says so where something below could not be drawn, in place of nothing at all; a press draws it anew. */
export class Boundary extends React.Component<
  IBoundaryProps,
  { failed: boolean }
> {
  state = { failed: false };

  static getDerivedStateFromError(): { failed: boolean } {
    return { failed: true };
  }

  componentDidCatch(error: unknown): void {
    console.error('nbgpu: the GPU slice could not be drawn:', error);
  }

  render(): React.ReactNode {
    const { trans, short, children } = this.props;
    if (!this.state.failed) {
      return children;
    }
    const again = () => this.setState({ failed: false });
    if (short) {
      return (
        <button className="nbgpu-Status" data-level="warning" onClick={again}>
          {trans.__('GPU: could not be shown. Try again')}
        </button>
      );
    }
    return (
      <div className="nbgpu-Panel-content" role="alert">
        <p>
          {trans.__(
            'The GPU slice could not be shown: something that the server said is not understood. Your notebooks go on; limits stay in force.'
          )}
        </p>
        <button type="button" className="jp-mod-styled" onClick={again}>
          {trans.__('Try again')}
        </button>
      </div>
    );
  }
}
