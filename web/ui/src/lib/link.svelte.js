// Link: the WebSocket to the page's process, with requests that are answered by id.
import { decodeFrame } from './bytes.js';

const PAUSES = [200, 400, 800, 1600, 3000];

export class Link {
  /** "connecting", "open" or "lost". */
  state = $state('connecting');
  #socket = null;
  #pending = new Map();
  #count = 0;
  #tries = 0;
  #waiting = [];
  #listeners = new Set();

  /** @param onReopen is called when the connection stands again after a loss. */
  constructor(onReopen) {
    this.onReopen = onReopen;
    this.#connect();
  }

  /** Calls `listener(header)` for events of no request: "lost", "resumed". */
  listen(listener) {
    this.#listeners.add(listener);
  }

  /**
   * Sends a request and waits for its last answer.
   * @param onPart is called with each frame of an answer in parts.
   */
  async ask(request, onPart = null) {
    if (this.state !== 'open') await new Promise((resolve) => this.#waiting.push(resolve));
    const id = ++this.#count;
    if (request.op === 'open') this.#supersede(request.run);
    return new Promise((resolve, reject) => {
      this.#pending.set(id, { resolve, reject, onPart, run: request.run });
      this.#socket.send(JSON.stringify({ ...request, id }));
    });
  }

  /** What was asked of a run is not answered any more once another one takes its name. */
  #supersede(run) {
    for (const [id, pending] of this.#pending) {
      if (pending.run !== run) continue;
      this.#pending.delete(id);
      pending.reject(new Superseded());
    }
  }

  #connect() {
    const scheme = location.protocol === 'https:' ? 'wss' : 'ws';
    const socket = new WebSocket(`${scheme}://${location.host}/page/socket`);
    socket.binaryType = 'arraybuffer';
    socket.onopen = () => {
      const again = this.#tries > 0;
      this.#tries = 0;
      this.state = 'open';
      for (const resolve of this.#waiting.splice(0)) resolve();
      if (again) this.onReopen();
    };
    socket.onmessage = (event) => this.#receive(event.data);
    socket.onclose = () => {
      this.state = 'lost';
      for (const { reject } of this.#pending.values()) reject(new LinkLost());
      this.#pending.clear();
      setTimeout(() => this.#connect(), PAUSES[Math.min(this.#tries++, PAUSES.length - 1)]);
    };
    this.#socket = socket;
  }

  #receive(data) {
    const frame = decodeFrame(data);
    const { id, event, message } = frame.header;
    const pending = this.#pending.get(id);
    if (id === undefined) for (const listener of this.#listeners) listener(frame.header);
    if (!pending) return;
    if (event === 'steps') {
      pending.onPart(frame);
      return;
    }
    this.#pending.delete(id);
    if (event === 'error' || event === 'no_weights') pending.reject(new Refusal(message, event));
    else pending.resolve(frame);
  }
}

/** The page's process refused a request; `kind` is "error" or "no_weights". */
export class Refusal extends Error {
  constructor(message, kind) {
    super(message);
    this.kind = kind;
  }
}

/** The connection to the page's process was lost; what was asked is asked again when it stands. */
export class LinkLost extends Error {}

/** Another run took the name of the one that was asked. */
export class Superseded extends Error {}
