import type { ISliceModel } from './tokens';

/** Run `show` once, as soon as there is a slice; never on a server without one. */
export function whenPresent(model: ISliceModel, show: () => void): void {
  const check = () => {
    if (model.present) {
      model.changed.disconnect(check);
      show();
    }
  };
  model.changed.connect(check);
  check();
}

/** Call `follow` whenever the value of `read` is another one. */
export function onChange<T>(
  model: ISliceModel,
  read: () => T,
  follow: (now: T) => void
): void {
  let last = read();
  model.changed.connect(() => {
    const now = read();
    if (now !== last) {
      last = now;
      follow(now);
    }
  });
}
