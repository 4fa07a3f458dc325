import type { TranslationBundle } from '@jupyterlab/translation';
import { closeIcon, UseSignal } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { INotice } from './api';
import { happenings, type IHappening, moment } from './happenings';
import { sliceIcon, warningIcon } from './icons';
import type { News } from './news';

const SHOWN_AT_FIRST = 5;
const NEWS_MS = 30_000;

interface IHappenedProps {
  notices: readonly INotice[];
  news: News;
  trans: TranslationBundle;
}

/** The last things that happened, the newest first; the server keeps the last 100 notices. */
export function WhatHappened(props: IHappenedProps): JSX.Element {
  return (
    <UseSignal signal={props.news.changed}>
      {() => <Happened {...props} said={props.news.latest?.id} />}
    </UseSignal>
  );
}

/** `said` is said below the panel's content now, and not once more here. */
function Happened(
  props: IHappenedProps & { said: number | undefined }
): JSX.Element {
  const { notices, said, trans } = props;
  const [all, showAll] = React.useState(false);
  const known = React.useMemo(() => happenings(notices), [notices]);
  const found = known.filter(({ id }) => id !== said);
  const shown = all ? found : found.slice(0, SHOWN_AT_FIRST);
  return (
    <section aria-label={trans.__('What happened')}>
      <h3>{trans.__('What happened')}</h3>
      {found.length === 0 && (
        <p className="nbgpu-quiet">
          {known.length === 0
            ? trans.__('Nothing yet that you should know of.')
            : trans.__('The latest is below; nothing before it.')}
        </p>
      )}
      <ol className="nbgpu-Happened" reversed>
        {shown.map(happening => (
          <Happening key={happening.id} happening={happening} trans={trans} />
        ))}
      </ol>
      {found.length > SHOWN_AT_FIRST && (
        <button
          type="button"
          className="jp-mod-styled nbgpu-Happened-all"
          aria-expanded={all}
          onClick={() => showAll(!all)}
        >
          {all
            ? trans.__('Show the last %1', SHOWN_AT_FIRST)
            : trans.__('Show all %1', found.length)}
        </button>
      )}
    </section>
  );
}

function Happening(props: {
  happening: IHappening;
  trans: TranslationBundle;
}): JSX.Element {
  const { happening, trans } = props;
  const { latest, times } = happening;
  return (
    <li data-level={latest.level}>
      <span className="nbgpu-Happened-head">
        <Level notice={latest} trans={trans} />
        <time dateTime={new Date(latest.time * 1000).toISOString()}>
          {moment(latest.time)}
        </time>
        {latest.name && !latest.message.includes(latest.name) && (
          <bdi
            className="nbgpu-Happened-name"
            title={latest.path ?? latest.name}
          >
            {latest.name}
          </bdi>
        )}
        {times > 1 && (
          <span className="nbgpu-Happened-times">
            {trans.__('%1 times', times)}
          </span>
        )}
      </span>
      <span className="nbgpu-Happened-message">{latest.message}</span>
    </li>
  );
}

/** How serious it is: an icon and a word, never a colour alone. */
function Level(props: {
  notice: INotice;
  trans: TranslationBundle;
}): JSX.Element {
  const { notice, trans } = props;
  const Icon = notice.level === 'info' ? sliceIcon : warningIcon;
  const words =
    notice.level === 'error'
      ? trans.__('Error')
      : notice.level === 'warning'
        ? trans.__('Warning')
        : trans.__('For your information');
  return (
    <span className="nbgpu-Happened-level">
      <Icon.react tag="span" width="14px" aria-hidden="true" />
      <span className={notice.level === 'info' ? 'nbgpu-hidden' : ''}>
        {words}
      </span>
    </span>
  );
}

/** What just happened, below the panel's content, which it never covers; it goes by itself. */
export function Latest(props: {
  news: News;
  trans: TranslationBundle;
}): JSX.Element {
  return (
    <UseSignal signal={props.news.changed}>
      {() => <LatestNow {...props} happening={props.news.latest} />}
    </UseSignal>
  );
}

function LatestNow(props: {
  news: News;
  trans: TranslationBundle;
  happening: IHappening | null;
}): JSX.Element {
  const { happening, news, trans } = props;
  React.useEffect(() => {
    const timer = happening && setTimeout(() => news.show(null), NEWS_MS);
    return () => clearTimeout(timer ?? undefined);
  }, [happening?.latest.id]);
  // it stays in the page, empty too: else a screen reader would not say what comes into it
  return (
    <div className="nbgpu-Latest" role="alert">
      {happening && (
        <>
          <ol className="nbgpu-Happened">
            <Happening happening={happening} trans={trans} />
          </ol>
          <button
            type="button"
            className="nbgpu-Latest-close"
            aria-label={trans.__('Close')}
            title={trans.__('Close')}
            onClick={() => news.show(null)}
          >
            <closeIcon.react tag="span" width="14px" />
          </button>
        </>
      )}
    </div>
  );
}
