// App: what the page shows, and what it does. Components read it and call its methods.
import { sameRows } from './bytes.js';
import { Link, LinkLost, Refusal, Superseded } from './link.svelte.js';
import { Run } from './run.svelte.js';
import { Sequence, wave } from './sequence.svelte.js';
import { fromBase64 } from './bytes.js';
import { readView, writeView } from './view.js';

export class App {
  models = $state.raw([]);
  hasWeights = $state(false);
  sources = $state.raw([]);
  model = $state.raw(null);
  sequence = $state.raw(null);
  run = $state.raw(null);
  /** The run before the first edit, to compare with. */
  original = $state.raw(null);
  /** Another way that the sequence went on: a fork, or another version on the same input. */
  fork = $state.raw(null);
  /** Steps consumed in view: 0 is the zero state. */
  t = $state(0);
  unit = $state(0);
  block = $state(0);
  feature = $state(0);
  playing = $state(false);
  speed = $state(4);
  tab = $state('tour');
  chapter = $state(0);
  folded = $state(false);
  zoom = $state(1);
  factor = $state(1);
  whatIf = $state.raw(null);
  analysis = $state.raw(null);
  target = $state(-1);
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

  get modelKey() {
    return this.model ? `${this.model.name}/${this.model.version}` : '';
  }

  async start() {
    const view = readView();
    try {
      const [models, sources] = await Promise.all([json('/page/api/models'), json('/page/api/sources')]);
      this.models = models.models;
      this.hasWeights = models.weights;
      this.sources = sources.sources;
    } catch (error) {
      this.say('error', error.message);
      setTimeout(() => this.start(), 2000);
      return;
    }
    this.notice = null;
    const known = this.models.find((each) => each.name === view.model && (!view.version || each.version === view.version));
    this.model = known ?? this.#first();
    if (!this.model) return this.say('error', 'The server has no models yet.');
    Object.assign(this, view.ui);
    await this.guard(async () => {
      const sequence = await this.#sequenceOf(view.origin);
      if (view.values) sequence.replace(view.values);
      await this.show(sequence, view.ui.t);
      this.block = Math.min(view.ui.block ?? this.block, this.run.blocks.length - 1);
      this.unit = Math.min(view.ui.unit ?? 0, Math.max(0, this.unitsOf(this.block) - 1));
      if (view.compared) await this.compareWith(view.compared);
      if (view.ui.factor) await this.scale(view.ui.factor);
      if (view.forkAt) await this.forkAt(view.forkAt, view.forkValues);
    });
  }

  /** The first model that has layers, in its newest version. */
  #first() {
    const { name } = this.models.find((each) => each.architecture !== 'step') ?? this.models[0] ?? {};
    return this.models.findLast((each) => each.name === name) ?? null;
  }

  async #sequenceOf(origin) {
    const features = this.model.features;
    if (origin?.kind === 'file') return this.fromFile(origin.name, origin.index);
    if (origin?.kind === 'wave') return wave(origin.name, features, origin.steps);
    const file = this.sources.find((each) => each.features === features && each.sequences.length);
    if (file) return this.fromFile(file.name, Math.min(3, file.sequences.length - 1));
    return wave(features === 1 ? 'sine' : 'noise', features);
  }

  async fromFile(name, index) {
    const found = await json(`/page/api/sources/${encodeURIComponent(name)}/${index}`);
    const values = fromBase64(found.values);
    if (values.length % this.model.features) throw new Error(`${name}: other features than ${this.model.name} takes`);
    return new Sequence(values, this.model.features, { kind: 'file', name, index }, found);
  }

  /** Shows a sequence: computes it to its end, and looks at step `t`. */
  async show(sequence, t = null) {
    this.playing = false;
    this.sequence = sequence;
    Object.assign(this, { original: null, fork: null, sameBits: null, analysis: null, whatIf: null, factor: 1 });
    await this.#restart();
    await this.computeTo(sequence.steps);
    this.t = Math.min(t ?? sequence.steps, sequence.steps);
    this.unit = Math.min(this.unit, Math.max(0, this.unitsOf(this.block) - 1));
    this.remember();
  }

  async choose(key) {
    this.model = this.models.find((each) => `${each.name}/${each.version}` === key);
    this.unit = 0;
    await this.guard(async () => {
      const old = this.sequence;
      const fits = old && old.features === this.model.features;
      await this.show(fits ? old : await this.#sequenceOf(null));
    });
  }

  unitsOf(block) {
    return this.run?.blocks[block]?.width ?? 0;
  }

  async #restart() {
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
    this.#restarting = this.guard(() => this.#restart());
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

  // Edits: the sequence is computed again from its beginning, and compared bit by bit.

  edit(feature, value) {
    if (this.t < 1 || !Number.isFinite(value)) return;
    this.#keepOriginal();
    this.sequence.set(this.t - 1, feature, value);
    this.#recompute(this.t - 1);
  }

  addStep() {
    if (this.t < 1) return;
    this.#keepOriginal();
    this.sequence.add(this.t - 1);
    this.#recompute(this.t);
    this.said = `Step ${this.t} repeated; the sequence has ${this.steps} steps.`;
  }

  cutStep() {
    if (this.t < 1 || this.steps < 2) return;
    this.#keepOriginal();
    this.sequence.cut(this.t - 1);
    this.#recompute(this.t - 1);
    this.said = `Step ${this.t} cut; the sequence has ${this.steps} steps.`;
  }

  restore() {
    this.sequence.restore();
    this.original = this.sameBits = null;
    this.#recompute(0);
  }

  #keepOriginal() {
    this.original ??= this.run;
  }

  #recompute(changed) {
    this.#again = true;
    this.#recomputing ??= this.#recomputeAll(changed).finally(() => {
      this.#recomputing = null;
      this.remember();
    });
    return this.#recomputing;
  }

  async #recomputeAll(changed) {
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
        this.sameBits = this.original && { rows: sameRows(a, b, width, rows), changed, values: width };
      });
    }
  }

  // Forks and versions.

  /** Takes the snapshot after `t` steps and goes on with `values`, by default the rest of the sequence. */
  async forkAt(t = this.t, values = null) {
    await this.guard(async () => {
      const fork = new Run(this.link, 'b', this.model);
      await fork.open({ from: 'a', step: t });
      const rest = values ?? this.sequence.values.slice(t * this.sequence.features);
      fork.input = rest;
      if (rest.length) await fork.advance(rest);
      this.fork = fork;
      this.said = `Forked after step ${t}.`;
    });
    this.remember();
  }

  /** Runs the same sequence on another version or model of the same features. */
  async compareWith(key) {
    const model = this.models.find((each) => `${each.name}/${each.version}` === key);
    if (model?.features !== this.model.features) return;
    await this.guard(async () => {
      const fork = new Run(this.link, 'b', model);
      await fork.open();
      fork.input = this.sequence.values;
      await fork.advance(this.sequence.values);
      this.fork = fork;
    });
    this.remember();
  }

  dropFork() {
    this.fork = null;
    this.link.ask({ op: 'close', run: 'b' }).catch(() => {});
    this.remember();
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

  async download(kind, run) {
    const { header, arrays } = await this.link.ask({ op: 'export', run, kind });
    const { buffer, byteOffset } = arrays.content;
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([new Uint8Array(buffer, byteOffset, header.bytes)]));
    link.download = header.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    this.said = `${header.file} saved.`;
  }

  async copyAddress() {
    writeView(this);
    try {
      await navigator.clipboard.writeText(location.href);
      this.said = 'The address was copied.';
    } catch {
      this.say('info', 'Copy it from the address bar: the browser does not let the page write to the clipboard.');
    }
  }

  // What needs the weights.

  async scale(factor) {
    this.factor = factor;
    if (factor === 1) this.whatIf = null;
    if (factor === 1) return this.remember();
    await this.guard(async () => {
      const { header, arrays } = await this.link.ask({ op: 'analysis', run: 'a', step: this.run.n, factor });
      if (header.factor === this.factor) this.whatIf = { ...header, ...arrays };
    });
    this.remember();
    return this.whatIf;
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

  remember() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => writeView(this), 150);
  }
  #timer = 0;

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
      await this.#restart();
      await this.computeTo(before.n);
      this.t = Math.min(t, this.run.n);
    });
    if (this.playing) this.#play();
  }
}

export async function json(path, options) {
  const answer = await fetch(path, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.detail ?? `${path}: ${answer.status}`);
  return content;
}
