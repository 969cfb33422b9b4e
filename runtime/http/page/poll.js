/** Asks again and again, but only while somebody can see the page. */

const MAX_INTERVAL_MS = 30_000;

export class Poll {
  /**
   * `task` asks once and throws if that failed; `interval` gives the pause after it in ms, or
   * null for none until `now()` is called. Failures double the pause, up to half a minute.
   */
  constructor(task, interval) {
    this.task = task;
    this.interval = interval;
    this.failures = 0;
    this.timer = null;
    this.running = false;
    this.again = false;
    document.addEventListener("visibilitychange", () => this.now());
  }

  /** Ask at once, or right after the question under way. */
  async now() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    if (this.running) {
      this.again = true;
      return;
    }
    this.running = true;
    try {
      await this.task();
      this.failures = 0;
    } catch {
      this.failures += 1; // the task showed it
    }
    this.running = false;
    if (this.again) {
      this.again = false;
      this.now();
      return;
    }
    const pause = this.interval();
    if (pause === null) return;
    const longer = Math.min(pause * 2 ** Math.min(this.failures, 6), MAX_INTERVAL_MS);
    this.timer = setTimeout(() => this.now(), longer);
  }
}
