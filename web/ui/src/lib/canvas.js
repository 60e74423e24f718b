// Canvas: a Svelte action that keeps a canvas as large as its box, in device pixels, and draws when asked.

/**
 * `use:canvas={draw}`: calls draw(context, width, height) in CSS pixels, at most once a frame of the screen, when the
 * box or `draw` changes.
 */
export function canvas(node, draw) {
  const context = node.getContext('2d');
  let frame = 0;
  const paint = () => {
    frame = 0;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [node.clientWidth, node.clientHeight];
    if (node.width !== Math.round(width * ratio) || node.height !== Math.round(height * ratio)) {
      node.width = Math.round(width * ratio);
      node.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    if (width && height) draw(context, width, height);
  };
  const ask = () => (frame ||= requestAnimationFrame(paint));
  const observer = new ResizeObserver(ask);
  observer.observe(node);
  ask();
  return {
    update(next) {
      draw = next;
      ask();
    },
    destroy() {
      observer.disconnect();
      cancelAnimationFrame(frame);
    },
  };
}

/** The steps that a strip shows, [from, to), and their width. */
export function windowOf(steps, zoom, t) {
  const span = Math.max(1, Math.ceil(steps / zoom));
  const from = Math.max(0, Math.min(steps - span, Math.round(t - span / 2)));
  return { from, to: Math.min(steps, from + span), span };
}

/** Draws rows of values as an image: one pixel column a step, or the largest value of several steps. */
export function drawHeat(context, width, height, { array, stride, offset, rows, known, view, bound, table }) {
  const columns = Math.min(view.span, Math.max(1, Math.floor(width)));
  const image = new ImageData(columns, Math.max(rows, 1));
  const pixels = new Uint32Array(image.data.buffer);
  const scale = 255 / bound;
  for (let x = 0; x < columns; x++) {
    const first = view.from + Math.floor((x * view.span) / columns);
    const last = Math.min(known, Math.max(first + 1, view.from + Math.floor(((x + 1) * view.span) / columns)));
    if (first >= known) break;
    for (let row = 0; row < rows; row++) {
      let value = array[first * stride + offset + row];
      for (let t = first + 1; t < last; t++) {
        const other = array[t * stride + offset + row];
        if (Math.abs(other) > Math.abs(value)) value = other;
      }
      const index = Math.round(value * scale) + 255;
      pixels[row * columns + x] = table[index < 0 ? 0 : index > 510 ? 510 : index];
    }
  }
  const buffer = new OffscreenCanvas(columns, Math.max(rows, 1));
  buffer.getContext('2d').putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(buffer, 0, 0, width, height);
}

/** Draws a line of value(t) over the steps of a view, from `known` steps, scaled by y(value). */
export function drawLine(context, width, view, known, value, y) {
  const columns = Math.min(view.span, Math.max(2, Math.floor(width)));
  context.beginPath();
  for (let x = 0; x < columns; x++) {
    const t = view.from + Math.floor((x * view.span) / columns);
    if (t >= known) break;
    const at = ((t - view.from + 0.5) / view.span) * width;
    if (x === 0) context.moveTo(at, y(value(t)));
    else context.lineTo(at, y(value(t)));
  }
  context.stroke();
}
