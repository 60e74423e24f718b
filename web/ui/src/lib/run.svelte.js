// Run: one sequence on the server, as it was answered. Arrays hold the bits of the answers.
import { norm, toBase64 } from './bytes.js';
import { boundOf } from './colours.js';

export class Run {
  /** Steps answered so far; grows with every frame. */
  n = $state(0);
  /** "opening", "ready", "computing" or "lost". */
  status = $state('opening');
  /** Milliseconds of the latest call, and of the last hundred. */
  ms = $state(0);
  latencies = [];
  /** The advance in flight, if any. */
  computing = null;
  begin = 0;
  blocks = [];
  blockWidth = 0;
  initial = new Float32Array(0);
  detailed = $state(0);
  topBound = 0.2;

  constructor(link, name, model) {
    this.link = link;
    this.name = name;
    this.model = model;
    this.hidden = model.hidden;
    this.outputs = model.outputs;
    this.classes = model.labels.length;
    this.#room(0);
  }

  /** Opens it on the server: from the zero state, or from a step of another run. */
  async open(origin = {}) {
    const { header, arrays } = await this.link.ask({
      op: 'open', run: this.name, model: this.model.name, version: this.model.version, ...origin,
    });
    this.begin = header.step;
    this.blocks = header.blocks;
    this.bundle = header.bundle;
    this.blockWidth = header.blocks.reduce((sum, each) => sum + each.width, 0);
    let offset = 0;
    for (const block of this.blocks) {
      Object.assign(block, { offset, bound: 0.2 });
      offset += block.width;
    }
    this.initial = arrays.initial;
    this.status = 'ready';
    return this;
  }

  /** Sends timesteps [n, features] and keeps their answers. */
  async advance(values) {
    const steps = values.length / this.model.features;
    this.#room(this.n + steps);
    this.status = 'computing';
    try {
      await this.link.ask({ op: 'advance', run: this.name, values: toBase64(values) }, (frame) => this.#take(frame));
    } finally {
      if (this.status === 'computing') this.status = 'ready';
    }
  }

  #take({ header, arrays }) {
    const at = header.first - this.begin;
    this.states.set(arrays.states, at * this.hidden);
    this.logits.set(arrays.logits, at * this.outputs);
    this.probabilities.set(arrays.probabilities, at * this.classes);
    const count = arrays.logits.shape[0];
    this.topBound = boundOf(arrays.states, this.topBound);
    if (arrays.blocks) {
      this.blockValues.set(arrays.blocks, at * this.blockWidth);
      this.detailed = at + count;
      for (const block of this.blocks) {
        for (let t = 0; t < count; t++) {
          const begin = t * this.blockWidth + block.offset;
          block.bound = boundOf(arrays.blocks.subarray(begin, begin + block.width), block.bound);
        }
      }
    }
    this.status = 'computing';
    this.ms = header.ms;
    this.latencies.push(header.ms / (arrays.blocks ? count : 1));
    if (this.latencies.length > 200) this.latencies.splice(0, 100);
    this.n = at + count;
  }

  #room(steps) {
    const grown = (old, width) => {
      if (old && old.length >= steps * width) return old;
      const array = new Float32Array(Math.max(steps, Math.min(2 * steps, steps + 4096)) * width);
      if (old) array.set(old);
      return array;
    };
    this.states = grown(this.states, this.hidden);
    this.logits = grown(this.logits, this.outputs);
    this.probabilities = grown(this.probabilities, this.classes);
    this.blockValues = grown(this.blockValues, this.blockWidth);
  }

  /** Values of a block after each step: array, width of its rows, offset in a row, rows that are known. */
  rows(index) {
    const block = this.blocks[index];
    const top = block && block.kind === 'h' && block.layer === this.model.layers - 1;
    if (top) return { array: this.states, stride: this.hidden, offset: 0, width: block.width, n: this.n, bound: this.topBound };
    const width = block ? block.width : 0;
    return { array: this.blockValues, stride: this.blockWidth, offset: block?.offset ?? 0, width, n: this.detailed, bound: block?.bound ?? 1 };
  }

  /** One block after step `t` (0-based); t = -1 is the state before the first step. */
  block(index, t) {
    const { array, stride, offset, width, n } = this.rows(index);
    if (t < 0) return this.initial.subarray(this.blocks[index].offset, this.blocks[index].offset + width);
    return t < n ? array.subarray(t * stride + offset, t * stride + offset + width) : new Float32Array(width);
  }

  topBlock() {
    return this.blocks.findLastIndex((each) => each.kind === 'h');
  }

  probabilityRow(t) {
    return this.probabilities.subarray(t * this.classes, (t + 1) * this.classes);
  }

  logitRow(t) {
    return this.logits.subarray(t * this.outputs, (t + 1) * this.outputs);
  }

  /** |h| after step t. */
  size(t) {
    return norm(this.states, t * this.hidden, (t + 1) * this.hidden);
  }

  /** Share of the units after step t with |h| over 0.97, where tanh hardly moves. */
  saturation(t) {
    let count = 0;
    for (let i = t * this.hidden; i < (t + 1) * this.hidden; i++) if (Math.abs(this.states[i]) > 0.97) count++;
    return this.hidden ? count / this.hidden : 0;
  }

  answer(t) {
    const row = this.probabilityRow(t);
    let best = 0;
    for (let i = 1; i < row.length; i++) if (row[i] > row[best]) best = i;
    return best;
  }
}
