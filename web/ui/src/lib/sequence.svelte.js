// Sequence: the input timesteps, with edits.
import { boundOf } from './colours.js';

export class Sequence {
  /** float32 [steps, features]; replaced, never changed in place, so that runs can be compared. */
  values = $state.raw(new Float32Array(0));
  features;
  /** Where it comes from: {kind: "file", name, index} | {kind: "wave", name} | {kind: "own", name}. */
  origin;
  label;
  id;
  edits = $state(0);
  /** Largest size of a value so far. */
  bound = 1e-6;
  #first;
  #room = null;

  constructor(values, features, origin, { id = '', label = null } = {}) {
    this.values = values;
    this.features = features;
    this.origin = origin;
    this.id = id;
    this.label = label;
    this.#first = values;
    this.bound = boundOf(values);
  }

  get steps() {
    return this.values.length / this.features;
  }

  row(t) {
    return this.values.subarray(t * this.features, (t + 1) * this.features);
  }

  set(t, feature, value) {
    const values = this.values.slice();
    values[t * this.features + feature] = value;
    this.#change(values);
  }

  /** Inserts a copy of step `t` after it. */
  add(t) {
    const at = (t + 1) * this.features;
    const values = new Float32Array(this.values.length + this.features);
    values.set(this.values.subarray(0, at));
    values.set(this.row(t), at);
    values.set(this.values.subarray(at), at + this.features);
    this.#change(values);
  }

  cut(t) {
    const at = t * this.features;
    const values = new Float32Array(this.values.length - this.features);
    values.set(this.values.subarray(0, at));
    values.set(this.values.subarray(at + this.features), at);
    this.#change(values);
  }

  append(rows) {
    const end = this.values.length + rows.length;
    if (!this.#room || this.#room.length < end) {
      this.#room = new Float32Array(2 * end + 4096);
      this.#room.set(this.values);
    }
    this.#room.set(rows, this.values.length);
    this.bound = boundOf(rows, this.bound);
    this.values = this.#room.subarray(0, end);
  }

  replace(values) {
    this.#change(values);
  }

  restore() {
    this.values = this.#first;
    this.edits = 0;
  }

  get first() {
    return this.#first;
  }

  #change(values) {
    this.values = values;
    this.bound = boundOf(values);
    this.edits += 1;
  }
}

const WAVES = {
  sine: (t, f, features) => Math.sin((2 * Math.PI * t) / 16 + (f * Math.PI) / Math.max(features, 2)),
  square: (t) => (Math.floor(t / 8) % 2 ? -1 : 1),
  impulse: (t) => (t === 4 ? 3 : 0),
  noise: (t, f) => {
    // The same numbers each time: a hash of the place.
    let x = (t * 374761393 + f * 668265263 + 1442695041) | 0;
    x = Math.imul(x ^ (x >>> 13), 1274126177);
    return (((x ^ (x >>> 16)) >>> 0) / 4294967295) * 4 - 2;
  },
};
export const WAVE_NAMES = { sine: 'Sine wave', square: 'Square wave', impulse: 'One impulse', noise: 'Noise' };

export function wave(name, features, steps = 32) {
  const values = new Float32Array(steps * features);
  for (let t = 0; t < steps; t++) for (let f = 0; f < features; f++) values[t * features + f] = WAVES[name](t, f, features);
  return new Sequence(values, features, { kind: 'wave', name, steps }, { id: WAVE_NAMES[name] });
}
