// Microphone: rows of samples at 16 kHz, as a worklet gathers them.
export class Microphone {
  on = $state(false);
  level = $state(0);
  #context = null;
  #stream = null;

  async start(samples, onRows) {
    this.#stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    this.#context = new AudioContext({ sampleRate: 16000 });
    await this.#context.audioWorklet.addModule('/assets/microphone.js');
    const gather = new AudioWorkletNode(this.#context, 'gather', { processorOptions: { samples } });
    gather.port.onmessage = ({ data }) => {
      this.level = Math.max(this.level * 0.8, data.reduce((most, each) => Math.max(most, Math.abs(each)), 0));
      onRows(data);
    };
    this.#context.createMediaStreamSource(this.#stream).connect(gather);
    this.on = true;
  }

  stop() {
    this.#stream?.getTracks().forEach((each) => each.stop());
    this.#context?.close();
    this.#stream = this.#context = null;
    this.on = false;
  }
}
