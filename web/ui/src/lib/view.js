// The address holds the view: model, sequence with edits, place, open panel, fork.
import { fromBase64, toBase64 } from './bytes.js';

const MOST_LETTERS = 6000;
const NUMBERS = { t: 't', unit: 'u', block: 'b', chapter: 'ch', zoom: 'z', speed: 'sp', target: 'y', feature: 'f', factor: 'w' };

export function readView() {
  const given = new URLSearchParams(location.hash.slice(1));
  const ui = {};
  for (const [name, key] of Object.entries(NUMBERS)) {
    if (given.has(key) && Number.isFinite(Number(given.get(key)))) ui[name] = Number(given.get(key));
  }
  if (given.has('tab')) ui.tab = given.get('tab');
  if (given.has('folded')) ui.folded = true;
  const source = given.get('s');
  const [kind, name, number] = source ? source.split(':') : [];
  let origin = null;
  if (kind === 'file') origin = { kind, name: decodeURIComponent(name), index: Number(number) };
  if (kind === 'wave') origin = { kind, name, steps: Number(number) };
  return {
    model: given.get('m'), version: Number(given.get('v')) || 0, origin, ui,
    values: decoded(given.get('x')),
    forkAt: Number(given.get('fork')) || 0,
    compared: given.get('cmp'),
    forkValues: decoded(given.get('fx')),
  };
}

export function writeView(app) {
  const { model, sequence } = app;
  if (!model || !sequence) return;
  const view = new URLSearchParams({ m: model.name, v: model.version });
  const { origin } = sequence;
  if (origin.kind === 'file') view.set('s', `file:${encodeURIComponent(origin.name)}:${origin.index}`);
  if (origin.kind === 'wave') view.set('s', `wave:${origin.name}:${origin.steps}`);
  if (sequence.edits || origin.kind === 'own') put(view, 'x', sequence.values);
  for (const [name, key] of Object.entries(NUMBERS)) view.set(key, app[name]);
  view.set('tab', app.tab);
  if (app.folded) view.set('folded', '1');
  if (app.fork?.begin) {
    view.set('fork', app.fork.begin);
    put(view, 'fx', app.fork.input);
  } else if (app.fork) view.set('cmp', `${app.fork.model.name}/${app.fork.model.version}`);
  history.replaceState(null, '', `#${view}`);
}

/** Numbers go into the address as base64, unless they are too many: then only their source does. */
function put(view, key, values) {
  const text = toBase64(values).replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '');
  if (text.length <= MOST_LETTERS) view.set(key, text);
}

/** Numbers of an address; null where it has none, or was cut off. */
function decoded(text) {
  try {
    return text ? fromBase64(text.replaceAll('-', '+').replaceAll('_', '/')) : null;
  } catch {
    return null;
  }
}
