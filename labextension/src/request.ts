import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

import type { ISliceApi, IWrittenLimit } from './api';

/** A server that takes longer is as good as away; else one that hangs would never be asked again. */
const ANSWER_MS = 10_000;

/** The server's API over HTTP, with the server's own words as error messages. */
export function sliceApi(settings: ServerConnection.ISettings): ISliceApi {
  async function request<T>(
    path: string,
    init: RequestInit = {},
    most = ANSWER_MS
  ): Promise<T> {
    const url = URLExt.join(settings.baseUrl, 'nbgpu/api', path);
    const signal = AbortSignal.timeout(most);
    const response = await ServerConnection.makeRequest(
      url,
      { ...init, signal },
      settings
    );
    const answer = await response.json().catch(() => null);
    if (!response.ok) {
      const words = `${response.status} ${response.statusText}`;
      const error = new Error(answer?.error?.message ?? words);
      throw Object.assign(error, { status: response.status });
    }
    return answer as T;
  }
  return {
    usage: after => request(`usage?after=${after}`),
    history: seconds => request(`history?seconds=${seconds}`),
    setLimit: (kernelId: string, limit: IWrittenLimit) =>
      request(`kernels/${encodeURIComponent(kernelId)}`, {
        method: 'PUT',
        body: JSON.stringify(limit)
      }),
    move: (kernelId, where) =>
      request(`kernels/${encodeURIComponent(kernelId)}/${where}`, {
        method: 'POST'
      }),
    resume: pid =>
      request('resume', { method: 'POST', body: JSON.stringify({ pid }) }),
    room: () => request('resize'),
    resize: asked =>
      request('resize', { method: 'POST', body: JSON.stringify(asked) }, 30_000)
  };
}
