// App: what the page shows, and what it does. Components read it and call its methods.
import { fromBase64 } from './bytes.js';
import { json } from './http.js';
import { Player } from './player.svelte.js';
import { Run } from './run.svelte.js';
import { Sequence, wave } from './sequence.svelte.js';
import { readView, writeView } from './view.js';

export class App extends Player {
  models = $state.raw([]);
  hasWeights = $state(false);
  sources = $state.raw([]);
  /** Another way that the sequence went on: a fork, or another version on the same input. */
  fork = $state.raw(null);
  unit = $state(0);
  feature = $state(0);
  tab = $state('tour');
  chapter = $state(0);
  folded = $state(false);
  zoom = $state(1);
  factor = $state(1);
  whatIf = $state.raw(null);
  analysis = $state.raw(null);
  target = $state(-1);

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
      if (view.values?.length && view.values.length % sequence.features === 0) sequence.replace(view.values);
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
    await this.restart();
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

  /** A what-if is of the sequence before the edit. */
  onEdited() {
    if (this.factor !== 1) this.scale(this.factor);
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

  remember() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => writeView(this), 150);
  }
  #timer = 0;
}
