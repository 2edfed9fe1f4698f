// Axes, lines and bands of a plot.

const MARGIN = {
  left: 46,
  right: 14,
  top: 8,
  bottom: 22
};

function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step =
      [1, 2, 2.5, 5, 10].map(x => x * power).find(x => x >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step;
       i++) {
    found.push(+(i * step).toPrecision(12));
  }
  return found;
}

function short(x) {
  const size = Math.abs(x);
  if (size >= 1e9) return `${+ (x / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+ (x / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+ (x / 1e3).toPrecision(3)}k`;
  if (size && size < 1e-3) return written(x, 2);
  return String(+x.toPrecision(4)).replace('-', '−');
}

// The mean of some neighbours on both sides.
function smoothed(values) {
  const half = Math.round(values.length / 40);
  return values.map((x, i) => {
    if (x === null) return null;
    const near = values.slice(Math.max(i - half, 0), i + half + 1)
                     .filter(y => y !== null);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function path(xs, ys, x, y) {
  let d = '', pen = 'M';
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || !Number.isFinite(ys[i])) {
      pen = 'M';
      continue;
    }
    d += `${pen}${x(xs[i]).toFixed(1)},${y(ys[i]).toFixed(1)}`;
    pen = 'L';
  }
  return d;
}

function band(xs, low, high, x, y) {
  const there = i => low[i] !== null && high[i] !== null;
  const kept = xs.map((_, i) => i).filter(there);
  const point = (i, v) => `${x(xs[i]).toFixed(1)},${y(v[i]).toFixed(1)}`;
  const up = kept.map(i => point(i, high));
  const back = kept.map(i => point(i, low)).reverse();
  return up.length ? `M${[...up, ...back].join('L')}Z` : '';
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step)
      low = middle + 1;
    else
      high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

// The frame of any plot: axes, grid, scales.
function frame(node, {x, y, height, label}) {
  const width = Math.max(node.clientWidth, 160);
  const inner = {
    w: width - MARGIN.left - MARGIN.right,
    h: height - MARGIN.top - MARGIN.bottom
  };
  const at = {
    x: v => MARGIN.left + (v - x[0]) / (x[1] - x[0] || 1) * inner.w,
    y: v => MARGIN.top + (1 - (v - y[0]) / (y[1] - y[0] || 1)) * inner.h,
  };
  const plot = svg('svg', {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    'aria-hidden': 'true'
  });
  for (const v of ticks(...y)) {
    plot.append(
        svg('path',
            {class: 'rule', d: `M${MARGIN.left},${at.y(v)}h${inner.w}`}),
        svg('text', {
          class: 'tick',
          x: MARGIN.left - 7,
          y: at.y(v) + 4,
          'text-anchor': 'end'
        },
            short(v)));
  }
  for (const v of ticks(...x, Math.max(3, Math.floor(inner.w / 70)))) {
    plot.append(
        svg('text',
            {class: 'tick', x: at.x(v), y: height - 5, 'text-anchor': 'middle'},
            short(v)));
  }
  if (label)
    plot.append(
        svg('text', {
          class: 'tick',
          x: width - MARGIN.right,
          y: height - 24,
          'text-anchor': 'end'
        },
            label));
  return {plot, at, inner, width};
}

// Times are led by those of compilation, which would hide all others.
function extent(values, {robust = false} = {}) {
  let finite = values.filter(v => v !== null && Number.isFinite(v));
  if (robust && finite.length > 20) {
    finite =
        finite.sort((a, b) => a - b).slice(0, Math.floor(0.98 * finite.length));
  }
  let low = finite.reduce((a, b) => Math.min(a, b), Infinity);
  let high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!finite.length) [low, high] = [0, 1];
  if (low > 0 && low < 0.35 * high) low = 0;
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  return [low === 0 ? 0 : low - pad, high + pad];
}
