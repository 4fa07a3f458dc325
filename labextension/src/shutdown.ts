import { URLExt } from '@jupyterlab/coreutils';

/**
 * Call `ends` when this page has asked its server to end and the server has said yes (File › Shut Down): JupyterLab tells no extension, so
 * the page's own requests are looked at.
 */
export function onShutDown(baseUrl: string, ends: () => void): void {
  const asked = new URL(URLExt.join(baseUrl, 'api/shutdown'), document.baseURI);
  const said = (entry: PerformanceEntry) =>
    new URL(entry.name).pathname === asked.pathname &&
    (entry as PerformanceResourceTiming).responseStatus === 200;
  new PerformanceObserver(list => {
    if (list.getEntries().some(said)) {
      ends();
    }
  }).observe({ type: 'resource' });
}
