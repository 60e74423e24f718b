// Sandbox: a small network whose W_hh has exactly the spectral radius that a slider gives.
const UNITS = 16;
export const SANDBOX_STEPS = 40;

/** The same pseudo-random numbers each time, about normal. */
function numbers(seed) {
  let state = seed;
  const next = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 4294967296;
  };
  return () => Math.sqrt(-2 * Math.log(next() + 1e-12)) * Math.cos(2 * Math.PI * next());
}

/** An orthogonal matrix, all of whose eigenvalues have size 1: rows of random numbers, made perpendicular. */
function orthogonal() {
  const random = numbers(7);
  const rows = [];
  for (let i = 0; i < UNITS; i++) {
    const row = Array.from({ length: UNITS }, random);
    for (const other of rows) {
      const share = row.reduce((sum, each, j) => sum + each * other[j], 0);
      for (let j = 0; j < UNITS; j++) row[j] -= share * other[j];
    }
    const size = Math.hypot(...row);
    rows.push(row.map((each) => each / size));
  }
  return rows;
}

const W = orthogonal();

/**
 * |dL/dh_t| from the last step back to the first, where dL/dh of the last has size 1.
 * @param radius spectral radius of W_hh
 * @param linear true for a cell without tanh
 * @param clip largest size of a step's gradient; 0 for none
 */
export function sandbox(radius, linear, clip) {
  const random = numbers(11);
  let h = new Array(UNITS).fill(0);
  const states = [];
  for (let t = 0; t < SANDBOX_STEPS; t++) {
    const sums = W.map((row) => radius * row.reduce((sum, each, j) => sum + each * h[j], 0) + 0.3 * random());
    h = linear ? sums : sums.map(Math.tanh);
    states.push(h);
  }
  const start = Array.from({ length: UNITS }, random);
  const size = Math.hypot(...start);
  let gradient = start.map((each) => each / size);
  const sizes = [1];
  let clipped = 0;
  for (let t = SANDBOX_STEPS - 1; t > 0; t--) {
    const inner = linear ? gradient : gradient.map((each, i) => each * (1 - states[t][i] ** 2));
    gradient = W[0].map((_, j) => radius * W.reduce((sum, row, i) => sum + row[j] * inner[i], 0));
    let now = Math.hypot(...gradient);
    if (clip && now > clip) {
      gradient = gradient.map((each) => (each * clip) / now);
      now = clip;
      clipped++;
    }
    sizes.push(now);
  }
  return { sizes, clipped };
}
