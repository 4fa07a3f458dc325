import { drawInView } from '../../../labextension/src/inview';

/** As much of the browser's observer as is used; a test says what comes into view. */
class Observer {
  constructor(readonly tell: (found: object[]) => void) {
    Observer.made.push(this);
  }

  static made: Observer[] = [];
  watched = new Set<object>();

  observe(node: object): void {
    this.watched.add(node);
  }

  unobserve(node: object): void {
    this.watched.delete(node);
  }
}

Object.assign(globalThis, { IntersectionObserver: Observer });

function show(node: object, isIntersecting: boolean): void {
  Observer.made[0].tell([{ target: node, isIntersecting }]);
}

test('is drawn in view alone, and once when it comes into view', () => {
  const node = {} as Element;
  let drawn = 0;
  const one = drawInView(node, () => (drawn += 1));
  one.redraw();
  one.redraw();
  expect(drawn).toBe(0);
  show(node, true);
  expect(drawn).toBe(1);
  one.redraw();
  expect(drawn).toBe(2);
  show(node, false);
  show(node, true);
  expect(drawn).toBe(2); // what it shows is of now
  show(node, false);
  one.redraw();
  expect(drawn).toBe(2);
  show(node, true);
  expect(drawn).toBe(3);
});

test('is forgotten', () => {
  const node = {} as Element;
  let drawn = 0;
  const one = drawInView(node, () => (drawn += 1));
  show(node, true);
  expect(Observer.made).toHaveLength(1); // one for all
  expect(Observer.made[0].watched.has(node)).toBe(true);
  one.forget();
  expect(Observer.made[0].watched.has(node)).toBe(false);
  show(node, true);
  one.redraw();
  expect(drawn).toBe(1);
});
