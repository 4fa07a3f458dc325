import * as React from 'react';

import { linePoints } from './history';

const WIDTH = 300;
const HEIGHT = 40;

interface ISparklineProps {
  kind: 'memory' | 'compute';
  label: string;
  values: { time: number; value: number }[];
  /** How long the box is. */
  seconds: number;
  /** The value at the top edge. */
  top: number;
  /** Where to draw the line of the limit, when it is below the top. */
  limit: number;
}

/** The last minutes as a line over a filled area; the newest value is at the right. */
export function Sparkline(props: ISparklineProps): JSX.Element {
  const box = {
    width: WIDTH,
    height: HEIGHT,
    seconds: props.seconds,
    top: props.top
  };
  const points = linePoints(props.values, box);
  const line = points.map(point => point.join(',')).join(' ');
  const limitY = HEIGHT * (1 - Math.min(1, props.limit / props.top));
  return (
    <svg
      className={`nbgpu-Sparkline nbgpu-mod-${props.kind}`}
      viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
      preserveAspectRatio="none"
      role="img"
      aria-label={props.label}
    >
      <title>{props.label}</title>
      {props.limit < props.top && (
        <line
          className="nbgpu-Sparkline-limit"
          x1={0}
          x2={WIDTH}
          y1={limitY}
          y2={limitY}
        />
      )}
      {points.length > 1 && (
        <>
          <polygon
            className="nbgpu-Sparkline-area"
            points={`${points[0][0]},${HEIGHT} ${line} ${WIDTH},${HEIGHT}`}
          />
          <polyline className="nbgpu-Sparkline-line" points={line} />
        </>
      )}
    </svg>
  );
}
