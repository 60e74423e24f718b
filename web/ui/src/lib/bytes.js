// Bits and digits: frames of the WebSocket, base64, and decimal forms of float32.

/** Decodes a frame: header and arrays. See unroll_web/page/frames.py. */
export function decodeFrame(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  let offset = 4 + size;
  const arrays = {};
  for (const [name, shape] of header.arrays) {
    const length = shape.reduce((a, b) => a * b, 1);
    arrays[name] = Object.assign(new Float32Array(buffer, offset, length), { shape });
    offset += 4 * length;
  }
  return { header, arrays };
}

export function toBase64(values) {
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  let text = '';
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

export function fromBase64(text) {
  return new Float32Array(Uint8Array.from(atob(text), (each) => each.charCodeAt(0)).buffer);
}

/** The shortest decimal that is this float32 and no other; numpy prints the same digits. */
export function exact(value) {
  if (!Number.isFinite(value)) return String(value);
  for (let digits = 1; digits < 9; digits++) {
    const text = value.toPrecision(digits);
    if (Math.fround(Number(text)) === value) return String(Number(text)).replace('-', '−');
  }
  return String(Number(value.toPrecision(9))).replace('-', '−');
}

/** A short form, of about three digits. */
export function short(value, digits = 3) {
  if (!Number.isFinite(value)) return value > 0 ? '∞' : value < 0 ? '−∞' : 'none';
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : value.toFixed(size < 10 ? digits : 1);
  return text.replaceAll('-', '−');
}

export function signed(value, digits = 3) {
  return (value >= 0 ? '+' : '') + short(value, digits);
}

/** Number of leading rows, `width` values each, with the same bits in both arrays. */
export function sameRows(a, b, width, rows) {
  const left = new Uint32Array(a.buffer, a.byteOffset, rows * width);
  const right = new Uint32Array(b.buffer, b.byteOffset, rows * width);
  for (let i = 0; i < rows * width; i++) if (left[i] !== right[i]) return Math.floor(i / width);
  return rows;
}

export function norm(values, from = 0, to = values.length) {
  let sum = 0;
  for (let i = from; i < to; i++) sum += values[i] * values[i];
  return Math.sqrt(sum);
}
