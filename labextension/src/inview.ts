/** Draws what changes every second only where it can be seen: a notebook may have more than a thousand monitors. */

export interface IDrawn {
  /** There is something new: it is drawn now, or when it comes into view. */
  redraw(): void;
  /** It is gone. */
  forget(): void;
}

const looks = new WeakMap<Element, (inView: boolean) => void>();
/** One for all of the page. */
let observer: IntersectionObserver | null = null;

/** Call `draw` for what is in `node` while that is in view. */
export function drawInView(node: Element, draw: () => void): IDrawn {
  let inView = false;
  let old = true;
  const redraw = () => {
    old = !inView;
    if (inView) {
      draw();
    }
  };
  observer ??= new IntersectionObserver(found =>
    found.forEach(one => looks.get(one.target)?.(one.isIntersecting))
  );
  looks.set(node, now => {
    inView = now;
    if (inView && old) {
      redraw();
    }
  });
  observer.observe(node);
  return {
    redraw,
    forget: () => {
      observer?.unobserve(node);
      looks.delete(node);
      inView = false;
    }
  };
}
