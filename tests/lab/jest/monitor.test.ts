import { ENGLISH } from '../../../labextension/src/english';
import { SliceModel } from '../../../labextension/src/model';
import {
  drawMonitor,
  kernelIdIn,
  MONITOR_MIME,
  monitorRoot
} from '../../../labextension/src/monitor';
import { answer, GIB, kernel } from './usage';

/** As much of an element as the monitor uses. Whatever would read text as markup fails. */
class Element {
  constructor(readonly tag: string) {}

  className = '';
  dataset: { [name: string]: string } = {};
  style: { [name: string]: string } = {};
  attributes: { [name: string]: string } = {};
  children: Element[] = [];
  own = '';

  set textContent(text: string) {
    this.own = text;
  }

  get textContent(): string {
    return this.own + this.children.map(one => one.textContent).join('\n');
  }

  set innerHTML(_: string) {
    throw new Error('markup');
  }

  set outerHTML(_: string) {
    throw new Error('markup');
  }

  setAttribute(name: string, value: string): void {
    this.attributes[name] = value;
  }

  append(...children: Element[]): void {
    this.children.push(...children);
  }

  replaceChildren(...children: Element[]): void {
    this.children = children;
  }

  all(): Element[] {
    return [this, ...this.children.flatMap(one => one.all())];
  }
}

const MARKUP = '<img src=x onerror="stranger()"><script>stranger()</script>';
const OWN = { kernel_id: 'a' };
const TAGS = new Set(['div', 'span', 'p', 'ul', 'li', 'svg', 'polyline']);
const NAMES = /^(role|aria-[a-z]+|viewBox|preserveAspectRatio|points)$/;

let usage: ReturnType<typeof answer>;

beforeEach(() => {
  usage = answer(100);
  Object.assign(globalThis, {
    document: {
      createElement: (tag: string) => new Element(tag),
      createElementNS: (_: string, tag: string) => new Element(tag)
    }
  });
});

afterEach(() => {
  delete (globalThis as { document?: unknown }).document;
});

/** What is drawn of `part` of a use for an output that has `data`. */
async function draw(part: object, data: unknown): Promise<Element> {
  const api = { usage: async () => ({ ...usage, ...part }) };
  const model = new SliceModel({
    auto: false,
    api: api as unknown as SliceModel.IOptions['api']
  });
  await model.tick();
  const root = monitorRoot(ENGLISH);
  drawMonitor(root, model, kernelIdIn(data), ENGLISH);
  model.dispose();
  const drawn = root as unknown as Element;
  for (const one of drawn.all()) {
    expect(TAGS).toContain(one.tag);
    expect(Object.keys(one.attributes).filter(name => !NAMES.test(name))).toEqual([]); // prettier-ignore
  }
  return drawn;
}

test('the MIME type is the one that the kernel sends', () => {
  expect(MONITOR_MIME).toBe('application/vnd.nbgpu.monitor+json');
});

test('shows the slice, and marks the kernel that the output names', async () => {
  const kernels = [kernel(), kernel({ kernel_id: 'b', name: 'other.ipynb' })];
  kernels.forEach(one => {
    one.devices = [
      {
        uuid: 'GPU-1',
        memory_used_bytes: GIB,
        memory_peak_bytes: GIB,
        compute_used_milli: 1
      }
    ];
  });
  const drawn = await draw({ kernels }, OWN);
  expect(drawn.attributes).toEqual({ role: 'group', 'aria-label': 'GPU slice' }); // prettier-ignore
  expect(drawn.textContent).toContain('1/4 simulated GPU, burst');
  expect(drawn.textContent).toContain('3 of 20 GiB');
  expect(drawn.textContent).toContain('train.ipynb (this notebook): 1 GiB');
  expect(drawn.textContent).toContain('other.ipynb: 1 GiB');
});

test.each([
  undefined,
  null,
  true,
  -1,
  1e308,
  NaN,
  '',
  'a',
  MARKUP,
  [],
  ['a'],
  [{ kernel_id: 'a' }],
  {},
  { kernel: 'a' },
  { kernel_id: null },
  { kernel_id: 1e308 },
  { kernel_id: ['a'] },
  { kernel_id: { toString: () => 'a' } },
  { kernel_id: MARKUP },
  { kernel_id: 'a'.repeat(1e6) },
  { kernel_id: '__proto__' },
  JSON.parse('{"__proto__": {"kernel_id": "a"}, "kernel_id": 7}'),
  { devices: [{ model: MARKUP, memory_used_bytes: 1e308 }], html: MARKUP }
])(
  'an output with junk (%#) marks no kernel and shows nothing of its own',
  async junk => {
    const honest = await draw({}, { kernel_id: 'none of them' });
    const drawn = await draw({}, junk);
    expect(drawn.textContent).toBe(honest.textContent);
  }
);

test('names are text', async () => {
  const kernels = [kernel({ name: MARKUP })];
  const devices = [{ ...usage.devices![0], model: MARKUP }];
  const drawn = await draw({ kernels, devices }, OWN);
  expect(drawn.textContent).toContain(`${MARKUP} (this notebook): 0 B`);
  expect(drawn.textContent).toContain(`GPU 0 · ${MARKUP}`);
});

test('huge, negative and missing limits stay inside their bars', async () => {
  const [device] = usage.devices!;
  for (const used of [1e308, -1, 0]) {
    const devices = [
      { ...device, memory_used_bytes: used, memory_limit_bytes: 1 },
      { ...device, memory_limit_bytes: 0, utilization_percent: 1e9 }
    ];
    const meters = (await draw({ devices, kernels: [] }, OWN)).all().filter(one => one.attributes.role === 'meter'); // prettier-ignore
    expect(meters.length).toBe(4);
    for (const meter of meters) {
      const now = Number(meter.attributes['aria-valuenow']);
      expect(now >= 0 && now <= 100).toBe(true);
      expect(meter.children[0].style.width).toBe(`${now}%`);
    }
  }
});

test('who does not answer is said', async () => {
  const drawn = await draw({ agent: { ok: false, since: 0 } }, OWN);
  expect(drawn.textContent).toContain('No news from the node agent since');
});
