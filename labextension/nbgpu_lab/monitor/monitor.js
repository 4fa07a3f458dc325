// The front end of nbgpu.SliceMonitor(): asks the page's Jupyter server, never the kernel.

const MIB = 1024 ** 2;
const GIB = 1024 ** 3;
const SECONDS = 600;
const FRACTIONS = { 1000: "1", 750: "3/4", 667: "2/3", 666: "2/3", 500: "1/2", 333: "1/3", 250: "1/4", 125: "1/8" };

const tenths = (value) => {
  const floored = Math.floor(value * 10 + 1e-9);
  return floored % 10 === 0 ? `${floored / 10}` : (floored / 10).toFixed(1);
};
const memory = (bytes) => (bytes >= GIB ? `${tenths(bytes / GIB)} GiB` : bytes >= MIB ? `${tenths(bytes / MIB)} MiB` : `${bytes} B`);
const fraction = (milli) => FRACTIONS[milli] ?? `${tenths(milli / 10)} %`;

/** Where the page's Jupyter server is and how to be let in. */
function server() {
  let config = {};
  try {
    config = JSON.parse(document.getElementById("jupyter-config-data")?.textContent ?? "{}");
  } catch {
    // a page of its own making: its base URL is what is left
  }
  const base = new URL(config.baseUrl || document.body.dataset.baseUrl || "/", document.baseURI).href;
  const headers = {};
  const xsrf = document.cookie.match(/(?:^|; )_xsrf=([^;]*)/);
  if (xsrf) headers["X-XSRFToken"] = xsrf[1];
  if (config.token) headers.Authorization = `token ${config.token}`;
  return { url: new URL("nbgpu/api/", base).href, headers };
}

async function ask(path) {
  const { url, headers } = server();
  const response = await fetch(url + path, { headers, credentials: "same-origin", cache: "no-store" });
  if (!response.ok) throw new Error(response.status === 404 ? "no nbgpu on this Jupyter server" : `the Jupyter server answers ${response.status}`);
  return response.json();
}

/** One poller for all monitors of a page: one request a second, none while the page is hidden. */
function poller() {
  const key = Symbol.for("nbgpu.monitor.poller");
  globalThis[key] ??= makePoller();
  return globalThis[key];
}

function makePoller() {
  const listeners = new Set();
  const samples = new Map();
  let last = null;
  let timer = 0;

  function remember(device, sample) {
    const kept = (samples.get(device) ?? []).filter(({ time }) => time > sample.time - SECONDS && time !== sample.time);
    samples.set(device, [...kept, sample].sort((a, b) => a.time - b.time));
  }

  async function loadHistory() {
    const history = await ask(`history?seconds=${SECONDS}`);
    for (const [uuid, { memory_used_bytes }] of Object.entries(history.devices)) {
      history.time.forEach((time, i) => remember(uuid, { time, value: memory_used_bytes[i] }));
    }
  }

  async function tick() {
    if (!document.hidden) {
      try {
        const usage = await ask("usage");
        if (usage.slice_id && samples.size === 0) await loadHistory().catch(() => {});
        for (const device of usage.devices ?? []) {
          if (usage.agent.ok) remember(device.uuid, { time: usage.time, value: device.memory_used_bytes });
        }
        last = { usage };
      } catch (error) {
        last = { ...last, error };
      }
      listeners.forEach((listener) => listener(last, samples));
    }
    timer = listeners.size > 0 ? setTimeout(tick, 1000) : 0;
  }

  return {
    listen(listener) {
      listeners.add(listener);
      if (last) listener(last, samples);
      if (!timer) timer = setTimeout(tick, 0);
      return () => listeners.delete(listener);
    },
  };
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function bar(name, words, part, kind) {
  const percent = Math.min(100, Math.floor(part * 100));
  const row = element("div", "nbgpu-monitor-row");
  row.dataset.level = kind === "memory" && percent >= 90 ? "warning" : "ok";
  row.append(element("span", "", name));
  const track = element("div", `nbgpu-monitor-track nbgpu-monitor-${kind}`);
  track.setAttribute("role", "meter");
  track.setAttribute("aria-label", name);
  track.setAttribute("aria-valuemin", "0");
  track.setAttribute("aria-valuemax", "100");
  track.setAttribute("aria-valuenow", String(percent));
  track.setAttribute("aria-valuetext", words);
  const fill = element("div");
  fill.style.width = `${percent}%`;
  track.append(fill);
  row.append(track, element("span", "", words));
  return row;
}

function sparkline(samples, top) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${SECONDS} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "Memory in the last 10 minutes");
  const newest = samples[samples.length - 1]?.time ?? 0;
  const points = samples.map(({ time, value }) => `${tenths(SECONDS - (newest - time))},${tenths(40 - 40 * Math.min(1, value / top))}`);
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  return svg;
}

function deviceRows(device, samples) {
  const { memory_used_bytes: used, memory_limit_bytes: limit, utilization_percent: busy } = device;
  const share = fraction(device.compute_limit_milli);
  return [
    element("div", "nbgpu-monitor-quiet", `GPU ${device.index} · ${device.model}`),
    bar("Memory", `${memory(used)} of ${memory(limit)}`, used / limit, "memory"),
    bar("Compute", `${busy} % of ${share} GPU`, busy / 100, "compute"),
    sparkline(samples.get(device.uuid) ?? [], limit),
  ];
}

function kernelLine(kernel, ownId) {
  const used = kernel.devices.reduce((sum, device) => sum + device.memory_used_bytes, 0);
  const cap = kernel.limit.memory_bytes;
  const name = kernel.kernel_id === null ? "Other processes" : (kernel.name ?? kernel.kernel_id.slice(0, 8));
  const own = kernel.kernel_id && kernel.kernel_id === ownId ? " (this notebook)" : "";
  return `${name}${own}: ${memory(used)}${cap === null ? "" : ` of its own limit of ${memory(cap)}`}`;
}

function draw(root, { usage, error }, samples, ownId) {
  const parts = [];
  if (error) parts.push(element("p", "nbgpu-monitor-note", `No news: ${error.message}.`));
  if (usage?.agent && !usage.agent.ok) {
    parts.push(element("p", "nbgpu-monitor-note", `No news from the node agent since ${new Date(usage.agent.since * 1000).toLocaleTimeString()}.`));
  }
  if (usage?.slice_id) {
    const share = fraction(usage.devices[0].compute_limit_milli);
    const many = usage.devices.length > 1 ? `${usage.devices.length} × ` : "";
    parts.push(element("div", "nbgpu-monitor-title", `${many}${share} ${usage.simulated ? "simulated GPU" : "GPU"}, ${usage.mode}`));
    usage.devices.forEach((device) => parts.push(...deviceRows(device, samples)));
    const holding = usage.kernels.filter((kernel) => kernel.devices.length > 0 || kernel.kernel_id === ownId);
    const list = element("ul");
    holding.forEach((kernel) => list.append(element("li", "", kernelLine(kernel, ownId))));
    parts.push(list);
  } else if (usage && !usage.agent) {
    parts.push(element("p", "nbgpu-monitor-note", "This server has no GPU slice."));
  }
  root.replaceChildren(...parts);
}

export default {
  render({ model, el }) {
    const root = element("div", "nbgpu-monitor");
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "GPU slice");
    el.append(root);
    return poller().listen((state, samples) => draw(root, state, samples, model.get("kernel_id")));
  },
};
