// Colours, and where numbers lie between them. Chosen so that lightness alone
// tells the order, in print and to the colour-blind; no meaning is in a colour
// alone: tokens carry a bar as long as their number is large.

const dark = matchMedia('(prefers-color-scheme: dark)');

// From the paper to ink: what is small does not disturb the text.
const SEQUENTIAL = {
  light: [
    '#fbfaf7', '#eef1c4', '#c5e2a4', '#83c79a', '#48a49d', '#2f7d9a', '#36558a',
    '#3f2d6d', '#35104f'
  ],
  dark: [
    '#16171b', '#2c2650', '#37407f', '#31628e', '#2b828b', '#36a37f', '#6fc162',
    '#b9da4c', '#fde84a'
  ],
};
// Orange below, blue above.
const DIVERGING = {
  light: [
    '#6e2f00', '#b5570f', '#e3974a', '#f5d2ac', '#fbfaf7', '#bdd6ee', '#6fa5d8',
    '#2a6bb0', '#0c386c'
  ],
  dark: [
    '#ffcf94', '#ea9136', '#a85a14', '#573312', '#16171b', '#15375c', '#22639f',
    '#5a9fe0', '#b3d6ff'
  ],
};
// Of what a filter did.
const KINDS = {
  light: ['#fbfaf7', '#f2ab5e', '#8cbdec', '#dfe3b4', '#fbfaf7'],
  dark: ['#16171b', '#e48f36', '#5a9fe0', '#4b5230', '#16171b'],
};

const theme = () => dark.matches ? 'dark' : 'light';

function channels(hex) {
  return [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
}

function blend(stops, t) {
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [channels(stops[i]), channels(stops[i + 1])];
  return a.map((x, k) => Math.round(x + (b[k] - x) * (place - i)));
}

function luminance(rgb) {
  const [r, g, b] = rgb.map(x => {
    x /= 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Of black and white the one that stands out more: 4.5 to 1 at the least.
function ink(rgb) { return luminance(rgb) > 0.179 ? '#000' : '#fff'; }

const DID = ['kept', 'clipped', 'penalised', 'scaled'];
const SILENT = 4;  // It came to the filter without a gradient.

// What tokens can be coloured by. `at` tells of a token's number x where it
// lies: colour in [0, 1], and length of its bar in [−1, 1].
function colourings(samples) {
  const found = [];
  const add = (name, title, unit, kind, note) => {
    if (samples.has(name)) found.push({name, title, unit, kind, note});
  };
  add('entropy', 'entropy', 'nats', 'sequential',
      'How open the choice was: forking tokens stand out.');
  add('covariance', 'covariance', 'nats × advantage', 'diverging',
      'Likely and better than average, or rare and worse: above 0, ' +
          'entropy falls.');
  add('advantage', 'advantage', '', 'diverging', 'One number a completion.');
  add('ratio', 'ratio', '', 'ratio',
      'Current over old probability; 1 in a step’s first update.');
  add('probability', 'probability', '', 'sequential',
      'Of the token under the current policy.');
  add('gradient', 'gradient', '', 'diverging',
      'Of the loss by log-probability, as it leaves the filters: below 0, ' +
          'the token is made likelier.');
  if (samples.filters.length) {
    found.push({
      name: 'filters',
      title: 'all filters',
      unit: '',
      kind: 'did',
      note: 'The first filter that changed the token’s gradient.'
    });
    for (const filter of samples.filters) {
      found.push({
        name: `${filter}/did`,
        title: filter,
        unit: '',
        kind: 'did',
        note: 'What this filter did to the token’s gradient.'
      });
    }
  }
  return found;
}

// One scale for all steps, so that stepping through training shows what moves.
function scaled(colouring, samples) {
  if (colouring.kind === 'did') {
    const values = verdicts(colouring, samples);
    return {...colouring, values, low: 0, high: 4};
  }
  const values = samples.column(colouring.name);
  const number = colouring.kind === 'ratio' ? Math.log2 : x => x;
  const sizes = Float32Array.from(values, x => Math.abs(number(x)))
                    .filter(Number.isFinite)
                    .sort();
  let high = sizes[Math.floor(0.97 * (sizes.length - 1))] || 1;
  if (colouring.name === 'probability') high = 1;
  if (colouring.kind === 'ratio') high = Math.max(high, 0.05);
  const low = colouring.kind === 'sequential' ? 0 : -high;
  return {...colouring, values, number, low, high};
}

// What filters did to each token: the first that changed it, of those named.
function verdicts(colouring, samples) {
  const names =
      colouring.name === 'filters' ? samples.filters : [colouring.title];
  return Float32Array.from(
      samples.column('advantage'), (_, i) => verdict(samples, names, i));
}

function verdict(samples, names, i) {
  const did = name => samples.column(`${name}/did`)[i];
  const before = samples.filters.slice(0, samples.filters.indexOf(names[0]));
  for (const name of names) {
    if (did(name) !== 0) return did(name);
  }
  const silent = samples.column('advantage')[i] === 0 ||
      before.some(name => did(name) === 1);
  return silent ? SILENT : 0;
}

function look(scale, i) {
  const x = scale.values[i];
  if (Number.isNaN(x)) return {rgb: channels(KINDS[theme()][0]), bar: 0};
  if (scale.kind === 'did') {
    return {rgb: channels(KINDS[theme()][x]), bar: 0, did: x};
  }
  const part = scale.number(x) / scale.high;
  const bar = Math.min(Math.max(part, -1), 1);
  if (scale.kind === 'sequential') {
    return {rgb: blend(SEQUENTIAL[theme()], bar), bar};
  }
  return {rgb: blend(DIVERGING[theme()], (bar + 1) / 2), bar};
}

function told(scale, i) {
  const x = scale.values[i];
  if (scale.kind === 'did')
    return DID[x] ?? (x === SILENT ? 'no gradient' : '–');
  return [written(x), scale.unit].filter(Boolean).join(' ');
}
