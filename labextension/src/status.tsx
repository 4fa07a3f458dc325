import type { TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget, UseSignal } from '@jupyterlab/ui-components';
import * as React from 'react';

import { Boundary } from './boundary';
import { busiestPercent, formatMemoryOf } from './format';
import { sliceIcon, warningIcon } from './icons';
import { askedLong, askedShort } from './askback';
import { lentLong, lentShort } from './lent';
import type { ISliceModel } from './tokens';
import {
  clock,
  modeWords,
  nearest,
  sliceName,
  staleWords,
  warningWords
} from './words';

/** The status bar's item: slice, memory of its limit, compute; a click opens the panel. */
export class StatusItem extends ReactWidget {
  constructor(
    private _model: ISliceModel,
    private _trans: TranslationBundle,
    private _openPanel: () => void
  ) {
    super();
    this.addClass('nbgpu-StatusItem');
  }

  protected render(): JSX.Element {
    return (
      <Boundary trans={this._trans} short>
        <UseSignal signal={this._model.changed}>
          {() => this._renderNow()}
        </UseSignal>
      </Boundary>
    );
  }

  private _renderNow(): JSX.Element {
    const { model, trans } = { model: this._model, trans: this._trans };
    const usage = model.usage;
    if (!usage) {
      const words = model.absent
        ? trans.__('GPU: this server has no slice any more')
        : trans.__('GPU: the node agent does not answer yet');
      return this._button('warning', words, words);
    }
    const asked = usage.asked_back;
    if (asked && !model.stale) {
      const words = `${sliceName(usage, trans)}: ${askedShort(asked, trans)}`;
      return this._button('warning', words, askedLong(asked, trans));
    }
    if (usage.lent && !model.stale) {
      const words = `${sliceName(usage, trans)}: ${lentShort(usage.lent, trans)}`;
      const waits = usage.lent.wanted_seconds !== null;
      return this._button(
        waits ? 'warning' : 'ok',
        words,
        lentLong(usage.lent, trans)
      );
    }
    const { device, level } = nearest(usage, model.warnPercent);
    const held = formatMemoryOf(
      device.memory_used_bytes,
      device.memory_limit_bytes,
      trans
    );
    const memory =
      usage.devices.length > 1
        ? trans.__('%1 on GPU %2', held, device.index)
        : held;
    const compute = trans.__('%1 % busy', busiestPercent(usage.devices));
    const text = `${sliceName(usage, trans)}: ${memory}, ${compute}`;
    const away = model.stale
      ? trans.__('no news since %1', clock(model.stale.since))
      : null;
    const suspended = usage.suspended?.length
      ? trans.__('%1 suspended', usage.suspended.length)
      : null;
    const warning = away ?? warningWords(level, trans) ?? suspended;
    const title = [
      trans.__('GPU slice of this server (%1)', modeWords(usage, trans)),
      away
        ? staleWords(model.stale!, trans)
        : trans.__('Compute is in percent of the slice. Click for details.')
    ].join('\n');
    return this._button(
      away || (suspended && level === 'ok') ? 'warning' : level,
      warning ? `${text} · ${warning}` : text,
      title,
      away !== null
    );
  }

  private _button(
    level: string,
    text: string,
    title: string,
    stale = false
  ): JSX.Element {
    const Icon = level === 'ok' ? sliceIcon : warningIcon;
    return (
      <button
        className="nbgpu-Status"
        data-level={level}
        data-stale={stale || undefined}
        title={title}
        aria-label={this._trans.__('%1. Show the GPU panel', text)}
        onClick={this._openPanel}
      >
        <Icon.react tag="span" className="nbgpu-Status-icon" />
        <span className="nbgpu-Status-text">{text}</span>
      </button>
    );
  }
}
