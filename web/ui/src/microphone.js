// Runs on the browser's audio thread: gathers samples into rows of one step each.
class Gather extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.row = new Float32Array(processorOptions.samples);
    this.filled = 0;
  }

  process([[samples]]) {
    for (const each of samples ?? []) {
      this.row[this.filled++] = each;
      if (this.filled < this.row.length) continue;
      this.port.postMessage(this.row);
      this.row = new Float32Array(this.row.length);
      this.filled = 0;
    }
    return true;
  }
}

registerProcessor('gather', Gather);
