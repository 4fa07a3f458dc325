/** The server's times by this browser's clock: the two may differ by hours. */

/** Less than this is no difference worth correcting. */
const SAME_SECONDS = 2;

export class ServerClock {
  /** The server said that it is `now`, to a question of `sent` that was answered at `received` (both this browser's). */
  hear(now: number, sent: number, received: number): void {
    const ahead = (sent + received) / 2 - now;
    // a slow answer tells less; what it cannot tell apart is left as it is, so that a time that is shown does not flicker
    if (
      Math.abs(ahead - this._ahead) >
      SAME_SECONDS + Math.abs(received - sent) / 2
    ) {
      this._ahead = ahead;
    }
  }

  /** A time of the server's as this browser's clock showed it then. */
  local(seconds: number): number {
    return seconds + this._ahead;
  }

  private _ahead = 0;
}
