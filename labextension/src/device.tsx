import type { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import type { IDeviceUsage, IUsage } from './api';
import { formatMemoryOf, memoryLevel, percent } from './format';
import type { ISample } from './history';
import { warningIcon } from './icons';
import { Sparkline } from './sparkline';
import { computeWords, rangeName, warningWords } from './words';

interface IDeviceProps {
  device: IDeviceUsage;
  mode: IUsage['mode'];
  samples: readonly ISample[];
  /** How much of the history they are. */
  seconds: number;
  warnPercent: number;
  trans: TranslationBundle;
}

/** One device of the slice: memory and compute, now and over the last minutes. */
export function Device(props: IDeviceProps): JSX.Element {
  const { device, samples, seconds, trans } = props;
  const range = rangeName(seconds, trans);
  const level = memoryLevel(
    device.memory_used_bytes,
    device.memory_limit_bytes,
    props.warnPercent
  );
  const busiest = Math.max(
    device.compute_limit_milli,
    ...samples.map(sample => sample.compute)
  );
  return (
    <section
      className="nbgpu-Device"
      aria-label={trans.__('GPU %1', device.index)}
    >
      <h3>
        {trans.__('GPU %1', device.index)}
        <span className="nbgpu-Device-model">{device.model}</span>
      </h3>
      <Gauge
        name={trans.__('Memory')}
        value={formatMemoryOf(
          device.memory_used_bytes,
          device.memory_limit_bytes,
          trans
        )}
        percent={percent(device.memory_used_bytes, device.memory_limit_bytes)}
        kind="memory"
        level={level}
        warning={warningWords(level, trans)}
      />
      <Sparkline
        kind="memory"
        label={trans.__('Memory in the last %1', range)}
        values={samples.map(({ time, memory }) => ({ time, value: memory }))}
        seconds={seconds}
        top={device.memory_limit_bytes}
        limit={device.memory_limit_bytes}
      />
      <Gauge
        name={trans.__('Compute')}
        value={computeWords(device, props.mode, trans)}
        percent={device.utilization_percent}
        kind="compute"
        level="ok"
        warning={null}
      />
      <Sparkline
        kind="compute"
        label={trans.__('Compute in the last %1', range)}
        values={samples.map(({ time, compute }) => ({ time, value: compute }))}
        seconds={seconds}
        top={busiest}
        limit={device.compute_limit_milli}
      />
      <div className="nbgpu-Device-axis" aria-hidden="true">
        <span>{trans.__('%1 ago', range)}</span>
        <span>{trans.__('now')}</span>
      </div>
    </section>
  );
}

interface IGaugeProps {
  name: string;
  value: string;
  percent: number;
  kind: 'memory' | 'compute';
  level: string;
  warning: string | null;
}

/** A bar with its name, its value in words, and a warning in words. */
function Gauge(props: IGaugeProps): JSX.Element {
  const width = Math.min(100, props.percent);
  return (
    <div className="nbgpu-Gauge" data-level={props.level}>
      <div className="nbgpu-Gauge-words">
        <span>{props.name}</span>
        <span>{props.value}</span>
      </div>
      <div
        className={`nbgpu-Gauge-track nbgpu-mod-${props.kind}`}
        role="meter"
        aria-label={props.name}
        aria-valuemin={0}
        aria-valuemax={100}
        aria-valuenow={width}
        aria-valuetext={props.value}
      >
        <div className="nbgpu-Gauge-bar" style={{ width: `${width}%` }} />
      </div>
      {props.warning && (
        <div className="nbgpu-Gauge-warning">
          <warningIcon.react tag="span" width="14px" />
          {props.warning}
        </div>
      )}
    </div>
  );
}
