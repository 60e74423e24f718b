// Colours: a diverging ramp, blue below zero and orange above it, told apart with any colour vision.
const RAMPS = {
  light: { zero: [247, 246, 242], low: [24, 92, 158], high: [201, 92, 8], mid: [[150, 190, 222], [243, 181, 120]] },
  dark: { zero: [32, 38, 46], low: [116, 186, 240], high: [250, 168, 84], mid: [[55, 101, 143], [150, 89, 36]] },
};
const SIZE = 511;

function mix(a, b, share) {
  return a.map((each, i) => Math.round(each + (b[i] - each) * share));
}

/** 511 colours as 32-bit pixels (ABGR), from -1 to 1; the middle one is zero. */
function table(theme) {
  const { zero, low, high, mid } = RAMPS[theme];
  const pixels = new Uint32Array(SIZE);
  for (let i = 0; i < SIZE; i++) {
    const value = (i - 255) / 255;
    const [end, between] = value < 0 ? [low, mid[0]] : [high, mid[1]];
    const size = Math.abs(value);
    const [r, g, b] = size < 0.5 ? mix(zero, between, size * 2) : mix(between, end, size * 2 - 1);
    pixels[i] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return pixels;
}

const TABLES = { light: table('light'), dark: table('dark') };

export function pixels(theme) {
  return TABLES[theme];
}

/** Index in `pixels` of a value, where `bound` has the full colour. */
export function shade(value, bound) {
  const index = Math.round((value / bound) * 255) + 255;
  return index < 0 ? 0 : index > 510 ? 510 : index || 0;
}

/** CSS colour of a value. */
export function colour(value, bound, theme) {
  const pixel = TABLES[theme][Number.isFinite(value) ? shade(value, bound) : 255];
  return `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
}

// Classes: Okabe and Ito's colours, darker in the light theme; classes beyond eight repeat them with dashes.
const CLASSES = {
  light: ['#0072b2', '#c4570a', '#007a5a', '#a3467c', '#8a6a00', '#3d7fb0', '#5b4b9a', '#5a5a5a'],
  dark: ['#56b4e9', '#f0a04b', '#2fc79c', '#e08fbd', '#e5d454', '#7fb0ff', '#b7a6ff', '#c9c9c9'],
};
export function classColour(index, theme) {
  return CLASSES[theme][index % 8];
}
export function classDash(index) {
  return [[], [5, 3], [1.5, 2.5], [8, 3, 2, 3]][Math.floor(index / 8) % 4];
}

/** Largest size of the values, at least `least`. */
export function boundOf(values, least = 1e-6, most = Infinity) {
  let bound = least;
  for (let i = 0; i < values.length; i++) {
    const size = Math.abs(values[i]);
    if (size > bound) bound = size;
  }
  return Math.min(bound, most);
}
