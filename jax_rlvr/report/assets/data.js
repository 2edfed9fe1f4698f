// The runs: a JSON text and columns of 4 bytes a token, see report/data.py.

async function unpack(text) {
  const packed = atob(text);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream();
  const whole =
      await new Response(stream.pipeThrough(new DecompressionStream('gzip')))
          .arrayBuffer();
  const length = new DataView(whole).getUint32(0, true);
  const json = new TextDecoder().decode(new Uint8Array(whole, 4, length));
  const blob = new Uint8Array(whole, 4 + length);
  const runs = JSON.parse(json);
  for (const run of runs) {
    if (run.samples) run.samples = placed(run.samples, blob);
  }
  return runs;
}

// Columns are put together when they are first asked for.
function placed(samples, blob) {
  const made = new Map();
  const column = name => {
    const where = samples.columns[name];
    if (!where) return null;
    if (!made.has(name)) made.set(name, joined(blob, where));
    return made.get(name);
  };
  let first = 0;
  const byStep = new Map(samples.steps.map(step => [step, []]));
  for (const row of samples.rows) {
    row.first = first;
    first += row.tokens;
    byStep.get(row.step).push(row);
  }
  const filters = Object.keys(samples.columns)
                      .filter(name => name.endsWith('/did'))
                      .map(name => name.slice(0, -4));
  return {
    steps: samples.steps,
    rows: samples.rows,
    pieces: samples.pieces,
    byStep,
    column,
    filters,
    has: name => name in samples.columns,
  };
}

function joined(blob, {start, count, whole}) {
  const bytes = new Uint8Array(4 * count);
  for (let plane = 0; plane < 4; plane++) {
    const from = start + plane * count;
    for (let i = 0; i < count; i++) bytes[4 * i + plane] = blob[from + i];
  }
  return whole ? new Uint32Array(bytes.buffer) : new Float32Array(bytes.buffer);
}

// The page.

function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  const space = 'http://www.w3.org/2000/svg';
  return filled(document.createElementNS(space, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on'))
      node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false)
      node.setAttribute(key, value);
  }
  // Texts become text nodes: what a policy wrote is never markup.
  node.append(...children.flat().filter(child => child !== null));
  return node;
}

const find = id => document.getElementById(id);

// Numbers to read.

const RAISED = '⁰¹²³⁴⁵⁶⁷⁸⁹';

function written(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return '–';
  if (!Number.isFinite(x)) return x > 0 ? '∞' : '−∞';
  const size = Math.abs(x);
  let text;
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) {
    const [digit, power] = x.toExponential(digits - 1).split('e');
    const raised =
        power.replace('+', '').replace(/./g, c => RAISED[c] ?? '⁻');
    text = `${digit}·10${raised}`;
  } else if (size >= 1000) {
    text = Math.round(x).toLocaleString('en').replaceAll(',', '\u202f');
  } else {
    const places = size >= 100 ? 1 : size >= 10 ? 2 : digits;
    text = Number.isInteger(x) ? String(x) :
        size < 0.1             ? x.toPrecision(digits) :
                                 x.toFixed(places);
  }
  return text.replace('-', '−');
}
