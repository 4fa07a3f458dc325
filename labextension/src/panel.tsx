import type { TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget, UseSignal } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { IUsage } from './api';
import { Device } from './device';
import { Latest, WhatHappened } from './happened';
import { sliceIcon } from './icons';
import { Kernels } from './kernels';
import { lentLong } from './lent';
import { news } from './news';
import type { ISliceModel } from './tokens';
import { clock, modeWords, sliceName } from './words';

/** The side panel: the slice, its devices over time, its kernels and what happened. */
export class SlicePanel extends ReactWidget {
  constructor(
    private _model: ISliceModel,
    private _trans: TranslationBundle
  ) {
    super();
    this.id = 'nbgpu-panel';
    this.addClass('nbgpu-Panel');
    this.title.icon = sliceIcon;
    this.title.caption = this._trans.__('GPU slice');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', this._trans.__('GPU slice'));
  }

  protected render(): JSX.Element {
    return (
      <>
        <UseSignal signal={this._model.changed}>
          {() => this._renderNow()}
        </UseSignal>
        <Latest news={news} trans={this._trans} />
      </>
    );
  }

  private _renderNow(): JSX.Element {
    const { usage, agent, history, notices, warnPercent } = this._model;
    const trans = this._trans;
    return (
      <div className="nbgpu-Panel-content">
        {!agent.ok && (
          <p className="nbgpu-Panel-away" role="status">
            {trans.__(
              'The node agent does not answer since %1. Limits stay in force.',
              clock(agent.since)
            )}
          </p>
        )}
        {usage && (
          <>
            <Header usage={usage} trans={trans} />
            <div className="nbgpu-Panel-lent" role="status">
              {usage.lent && <p>{lentLong(usage.lent, trans)}</p>}
            </div>
            {usage.devices.map(device => (
              <Device
                key={device.uuid}
                device={device}
                samples={history.of(device.uuid)}
                warnPercent={warnPercent}
                trans={trans}
              />
            ))}
            <section aria-label={trans.__('Kernels')}>
              <h3>{trans.__('Kernels')}</h3>
              <Kernels
                usage={usage}
                trans={trans}
                setLimit={(id, limit) => this._model.setLimit(id, limit)}
                resume={pid => this._model.resume(pid)}
              />
            </section>
          </>
        )}
        <WhatHappened notices={notices} news={news} trans={trans} />
      </div>
    );
  }
}

function Header(props: {
  usage: IUsage;
  trans: TranslationBundle;
}): JSX.Element {
  const { usage, trans } = props;
  return (
    <header className="nbgpu-Header">
      <h2>{sliceName(usage, trans)}</h2>
      <p className="nbgpu-quiet">{modeWords(usage, trans)}</p>
      {usage.simulated && (
        <p className="nbgpu-Header-simulated">
          {trans.__('Simulated: this machine has no NVIDIA driver.')}
        </p>
      )}
    </header>
  );
}
