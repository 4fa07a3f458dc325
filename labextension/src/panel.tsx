import type { TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget, UseSignal } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { IKernelUsage, IUsage, IWrittenLimit } from './api';
import { Boundary } from './boundary';
import { Device } from './device';
import { Latest, WhatHappened } from './happened';
import { sliceIcon } from './icons';
import type { ILimitKeeper } from './keep';
import { Kernels } from './kernels';
import { askedLong } from './askback';
import { lentLong } from './lent';
import { news } from './news';
import { Resize } from './resize';
import type { ISliceModel } from './tokens';
import { modeWords, RANGES, rangeName, sliceName, staleWords } from './words';

/** The side panel: the slice, its devices over time, its kernels and what happened. */
export class SlicePanel extends ReactWidget {
  constructor(
    private _model: ISliceModel,
    private _trans: TranslationBundle,
    private _keeper: ILimitKeeper | null = null
  ) {
    super();
    this.id = 'nbgpu-panel';
    this.addClass('nbgpu-Panel');
    this.title.icon = sliceIcon;
    this.title.caption = this._trans.__('GPU slice');
    this.node.tabIndex = -1;
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', this._trans.__('GPU slice'));
  }

  /** Who asks for it by keyboard is in it. */
  protected onActivateRequest(): void {
    this.node.focus();
  }

  protected render(): JSX.Element {
    return (
      <Boundary trans={this._trans}>
        <UseSignal signal={this._model.changed}>
          {() => this._renderNow()}
        </UseSignal>
        <Latest news={news} trans={this._trans} />
      </Boundary>
    );
  }

  private async _setLimit(
    kernel: IKernelUsage,
    limit: IWrittenLimit,
    keep: boolean
  ): Promise<void> {
    const id = kernel.kernel_id!;
    await this._model.setLimit(id, limit);
    if (!keep || !this._keeper || kernel.path === null) {
      return;
    }
    try {
      await this._keeper.keep(kernel, limit);
    } catch (reason) {
      throw new Error(
        this._trans.__(
          'The limit is set for this kernel, but could not be kept in the notebook: %1',
          (reason as Error).message
        )
      );
    }
    await this._model.setLimit(id, { ...limit, kept: true });
  }

  private _renderNow(): JSX.Element {
    const { usage, stale, history, historySeconds, notices, warnPercent } =
      this._model;
    const trans = this._trans;
    return (
      <div className="nbgpu-Panel-content" data-stale={!!stale || undefined}>
        <div className="nbgpu-Panel-away" role="status">
          {stale && <p>{staleWords(stale, trans)}</p>}
          {this._model.absent && (
            <p>{trans.__('This Jupyter server has no GPU slice any more.')}</p>
          )}
        </div>
        {usage && (
          <>
            <Header usage={usage} trans={trans} />
            {usage.may_resize && (
              <Resize
                usage={usage}
                trans={trans}
                room={() => this._model.room()}
                resize={asked => this._model.resize(asked)}
              />
            )}
            <div className="nbgpu-Panel-lent" role="status">
              {usage.lent && <p>{lentLong(usage.lent, trans)}</p>}
              {usage.asked_back && (
                <p>
                  {askedLong(usage.asked_back, trans)}{' '}
                  {trans.__(
                    'Files are kept; what is only in memory is lost. You can start a server again afterwards.'
                  )}
                </p>
              )}
            </div>
            <Ranges
              seconds={historySeconds}
              choose={seconds => this._model.showHistory(seconds)}
              trans={trans}
            />
            {usage.devices.map(device => (
              <Device
                key={device.uuid}
                device={device}
                mode={usage.mode}
                samples={history.of(device.uuid, historySeconds)}
                seconds={historySeconds}
                warnPercent={warnPercent}
                trans={trans}
              />
            ))}
            <section aria-label={trans.__('Kernels')}>
              <h3>{trans.__('Kernels')}</h3>
              <Kernels
                usage={usage}
                trans={trans}
                setLimit={(...limit) => this._setLimit(...limit)}
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

/** How much of the history to show. */
function Ranges(props: {
  seconds: number;
  choose: (seconds: number) => void;
  trans: TranslationBundle;
}): JSX.Element {
  const { trans } = props;
  return (
    <fieldset className="nbgpu-Ranges">
      <legend>{trans.__('History')}</legend>
      {RANGES.map(seconds => (
        <label key={seconds}>
          <input
            type="radio"
            name="nbgpu-history"
            checked={seconds === props.seconds}
            onChange={() => props.choose(seconds)}
          />
          <span>{rangeName(seconds, trans)}</span>
        </label>
      ))}
    </fieldset>
  );
}

function Header(props: {
  usage: IUsage;
  trans: TranslationBundle;
}): JSX.Element {
  const { usage, trans } = props;
  return (
    <div className="nbgpu-Header">
      <h2>{sliceName(usage, trans)}</h2>
      <p className="nbgpu-quiet">{modeWords(usage, trans)}</p>
      {usage.simulated && (
        <p className="nbgpu-Header-simulated">
          {trans.__('Simulated: this machine has no NVIDIA driver.')}
        </p>
      )}
    </div>
  );
}
