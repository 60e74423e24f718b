// Player: a sequence on the server, in time: step, play, seek, edit. What is lost on the way is said and made up for.
import { sameRows } from './bytes.js';
import { Link, LinkLost, Refusal, Superseded } from './link.svelte.js';
import { Run } from './run.svelte.js';

export class Player {
  model = $state.raw(null);
  sequence = $state.raw(null);
  run = $state.raw(null);
  /** The run before the first edit, to compare with. */
  original = $state.raw(null);
  /** Steps consumed in view: 0 is the zero state. */
  t = $state(0);
  block = $state(0);
  playing = $state(false);
  speed = $state(4);
  notice = $state.raw(null);
  sameBits = $state.raw(null);
  lost = $state.raw(null);
  said = $state('');
  #recomputing = null;
  #restarting = null;
  #wanted = null;
  #living = false;
  #again = false;

  constructor() {
    this.link = new Link(() => this.#reopen());
    this.link.listen((event) => this.#event(event));
  }

  get steps() {
    return this.sequence ? this.sequence.steps : 0;
  }

  async restart() {
    const run = new Run(this.link, 'a', this.model);
    await run.open();
    if (this.run?.model !== this.model) this.block = Math.max(0, run.topBlock());
    this.run = run;
    this.t = 0;
  }

  /** Asks the server for every step up to `t` that it has not answered. */
  async computeTo(t) {
    const { run } = this;
    while (run.computing) await run.computing;
    const known = run.n;
    if (t <= known) return;
    const width = this.sequence.features;
    const rows = this.sequence.values.subarray(known * width, Math.min(t, this.steps) * width);
    run.computing = run.advance(rows).finally(() => (run.computing = null));
    await run.computing;
  }

  /** Looks at step `t`, computing up to there if needed. */
  async seek(t) {
    const wanted = Math.max(0, Math.min(Math.round(t), this.steps));
    this.#wanted = wanted;
    await this.#restarting;
    await this.guard(() => this.computeTo(wanted));
    if (this.#wanted !== wanted) return; // Somebody was faster.
    this.#wanted = null;
    this.t = Math.min(wanted, this.run?.n ?? 0);
    this.said = this.describe();
    this.remember();
  }

  /** Goes some steps on or back, from where earlier calls will have come. */
  move(steps) {
    return this.seek((this.#wanted ?? this.t) + steps);
  }

  async reset() {
    this.playing = false;
    this.t = 0;
    this.#restarting = this.guard(() => this.restart());
    await this.#restarting;
    this.said = 'Reset to the zero state.';
  }

  async togglePlay() {
    if (!this.playing && this.t >= this.steps) await this.reset();
    this.playing = !this.playing;
    if (this.playing) this.#play();
  }

  async #play() {
    let due = performance.now();
    while (this.playing && this.t < this.steps) {
      // At high speeds several steps share a frame of the screen.
      const count = Math.max(1, Math.round(this.speed / 60));
      await this.move(count);
      due = Math.max(due + (1000 * count) / this.speed, performance.now());
      await new Promise((resolve) => setTimeout(resolve, due - performance.now()));
    }
    this.playing = false;
  }

  /** Appends a step of a live source, and asks for it at once. */
  async live(row) {
    this.sequence.append(row);
    if (this.#living) return; // The steps that come meanwhile go together.
    this.#living = true;
    await this.guard(async () => {
      while (this.run.n < this.steps) {
        await this.computeTo(this.steps);
        this.t = this.run.n;
      }
    });
    this.#living = false;
  }

  // Edits: the sequence is computed again from its beginning, and compared bit by bit.

  edit(feature, value) {
    if (this.t < 1 || !Number.isFinite(value)) return;
    this.#keepOriginal();
    this.sequence.set(this.t - 1, feature, value);
    this.#recompute();
  }

  addStep() {
    if (this.t < 1) return;
    this.#keepOriginal();
    this.sequence.add(this.t - 1);
    this.#recompute();
    this.said = `Step ${this.t} repeated; the sequence has ${this.steps} steps.`;
  }

  cutStep() {
    if (this.t < 1 || this.steps < 2) return;
    this.#keepOriginal();
    this.sequence.cut(this.t - 1);
    this.#recompute();
    this.said = `Step ${this.t} cut; the sequence has ${this.steps} steps.`;
  }

  restore() {
    this.sequence.restore();
    this.original = this.sameBits = null;
    this.#recompute();
  }

  #keepOriginal() {
    this.original ??= this.run;
  }

  #recompute() {
    this.#again = true;
    this.#recomputing ??= this.#recomputeAll().finally(() => {
      this.#recomputing = null;
      this.onEdited();
      this.remember();
    });
    return this.#recomputing;
  }

  async #recomputeAll() {
    while (this.#again) {
      this.#again = false;
      const before = this.run;
      await this.guard(async () => {
        const run = new Run(this.link, 'a', this.model);
        await run.open();
        await run.advance(this.sequence.values);
        this.run = run;
        this.t = Math.min(this.t, run.n);
        const compared = this.original ?? before;
        const rows = Math.min(run.n, compared.n);
        const width = run.hidden || run.outputs;
        const [a, b] = run.hidden ? [run.states, compared.states] : [run.logits, compared.logits];
        this.sameBits = this.original && { rows: sameRows(a, b, width, rows), values: width };
      });
    }
  }

  // Words for the reader.

  describe() {
    if (!this.run || this.t < 1) return 'Before the first step: the zero state.';
    const t = this.t - 1;
    if (!this.run.classes) return `Step ${this.t} of ${this.steps}.`;
    const best = this.run.answer(t);
    return `Step ${this.t} of ${this.steps}: ${this.model.labels[best]}, ${Math.round(this.run.probabilityRow(t)[best] * 100)} %.`;
  }

  say(kind, text) {
    this.notice = { kind, text };
  }

  async guard(action) {
    try {
      await action();
      if (this.notice?.kind === 'error') this.notice = null;
    } catch (error) {
      if (error instanceof Superseded || error instanceof LinkLost) return;
      if (error instanceof Refusal && error.kind === 'no_weights') this.noWeights = error.message;
      this.say(error instanceof Refusal && error.kind === 'no_weights' ? 'weights' : 'error', error.message);
      this.playing = false;
    }
  }

  #event(event) {
    if (event.event === 'lost') {
      this.lost = event;
      this.said = `The server was lost after step ${event.step}: ${event.reason}`;
    }
    if (event.event === 'resumed') {
      this.lost = null;
      this.say('resumed', `Resumed from the snapshot of step ${event.step}, ${event.seconds.toFixed(1)} s after the loss. No step was lost.`);
      this.said = this.notice.text;
    }
  }

  /** The page's own process came back: it knows nothing of the runs any more. */
  async #reopen() {
    if (!this.run) return;
    const [before, t] = [this.run, this.t];
    await this.guard(async () => {
      await this.restart();
      await this.computeTo(before.n);
      this.t = Math.min(t, this.run.n);
    });
  }
}
