// Line charts that share a cursor. Runs differ in colour, dash and mark.

const DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 2', '1 2'];
const MARKS = [
  'M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0',
  'M-2.7,-2.7h5.4v5.4h-5.4z',
  'M0,-3.6l3.4,6h-6.8z',
  'M0,-3.8l3.4,3.8l-3.4,3.8l-3.4,-3.8z',
  'M-3.4,-2.4h6.8l-3.4,6z',
  'M-3,-1h2v-2h2v2h2v2h-2v2h-2v-2h-2z',
];

const view = {
  cursor: null,
  hidden: new Set(),
  smooth: true,
  charts: [],
  chosen: null,
  onchoose: () => {}
};

const colour = i => `var(--run-${i % 6})`;

function swatch(i) {
  return svg(
      'svg', {
        class: 'swatch',
        width: 30,
        height: 12,
        viewBox: '0 0 30 12',
        'aria-hidden': 'true'
      },
      svg('path', {
        d: 'M1,6H29',
        stroke: colour(i),
        'stroke-width': 2,
        'stroke-dasharray': DASHES[i % 6]
      }),
      svg('path',
          {d: MARKS[i % 6], transform: 'translate(15 6)', fill: colour(i)}));
}

// lines: [{run, steps, values}]; bands: [{low, high}] of the one line's steps.
function chart(
    {title, unit = '', lines, bands = [], dashed = null, height = 150, name}) {
  const drawing = element('div', {class: 'drawing'});
  const readouts = lines.map(
      ({run}) =>
          element('span', {class: 'value', style: `--c:${colour(run)}`}));
  const node = element(
      'figure', {
        class: 'chart',
        tabindex: 0,
        role: 'group',
        'data-metric': name ?? title
      },
      element(
          'figcaption', {}, element('span', {class: 'name'}, title),
          element('span', {class: 'unit'}, unit),
          element('span', {class: 'values'}, readouts)),
      drawing);
  let parts = null;
  const all =
      [...new Set(lines.flatMap(line => line.steps))].sort((a, b) => a - b);

  function draw() {
    const seen = lines.filter(line => !view.hidden.has(line.run));
    const y = extent(
        [
          ...seen.flatMap(line => line.values),
          ...bands.flatMap(b => [...b.low, ...b.high])
        ],
        {robust: name?.startsWith('time/')});
    const x = [Math.min(...all), Math.max(...all)];
    if (x[0] === x[1]) x[1] += 1;
    if (x[0] === 1) x[0] = 0;
    parts = frame(drawing, {x, y, height});
    const {plot, at, inner} = parts;
    const lid = `inside-${view.charts.indexOf(one)}`;
    const area = svg('g', {'clip-path': `url(#${lid})`});
    plot.append(
        svg('clipPath', {id: lid}, svg('rect', {
              x: MARGIN.left - 4,
              y: 0,
              width: inner.w + 8,
              height: height - MARGIN.bottom + 4
            })),
        area);
    bands.forEach(b => area.append(svg('path', {
      class: 'band',
      d: band(lines[0].steps, b.low, b.high, at.x, at.y),
      fill: colour(lines[0].run)
    })));
    for (const {run, steps, values} of seen) {
      const dense = steps.length > 60;
      const style = {
        stroke: colour(run),
        'stroke-dasharray': DASHES[run % 6],
        class: 'line'
      };
      if (dense && view.smooth && !bands.length) {
        area.append(svg('path', {
          ...style,
          class: 'line raw',
          'stroke-dasharray': '',
          d: path(steps, values, at.x, at.y)
        }));
        area.append(svg(
            'path', {...style, d: path(steps, smoothed(values), at.x, at.y)}));
      } else {
        area.append(
            svg('path', {...style, d: path(steps, values, at.x, at.y)}));
      }
      if (!dense && !bands.length)
        steps.forEach((step, i) => {
          if (values[i] === null) return;
          area.append(svg('path', {
            d: MARKS[run % 6],
            fill: colour(run),
            transform: `translate(${at.x(step)} ${at.y(values[i])})`
          }));
        });
    }
    if (dashed)
      area.append(svg('path', {
        class: 'line',
        stroke: colour(lines[0].run),
        'stroke-dasharray': '4 3',
        d: path(lines[0].steps, dashed, at.x, at.y)
      }));
    parts.chosen = plot.appendChild(svg('path', {class: 'chosen'}));
    parts.cursor = plot.appendChild(svg('path', {class: 'cursor'}));
    parts.step = plot.appendChild(svg(
        'text', {class: 'tick step-now', y: height - MARGIN.bottom - 5}));
    drawing.replaceChildren(plot);
    point();
  }

  function point() {
    if (!parts) return;
    const {at, inner} = parts;
    const rule = step =>
        step === null ? '' : `M${at.x(step)},${MARGIN.top}v${inner.h}`;
    parts.cursor.setAttribute('d', rule(view.cursor));
    parts.step.textContent = view.cursor === null ? '' : `step ${view.cursor}`;
    const late = view.cursor > (all[0] + all.at(-1)) / 2;
    parts.step.setAttribute('x', at.x(view.cursor ?? 0) + (late ? -5 : 5));
    parts.step.setAttribute('text-anchor', late ? 'end' : 'start');
    parts.chosen.setAttribute('d', rule(view.chosen));
    lines.forEach(({run, steps, values}, i) => {
      readouts[i].hidden = view.hidden.has(run);
      const at =
          view.cursor === null ? steps.length - 1 : nearest(steps, view.cursor);
      readouts[i].textContent = written(values[at]);
    });
    node.setAttribute(
        'aria-label',
        `${title}${unit ? `, ${unit}` : ''}, ${
            view.cursor === null ? 'last' : `step ${view.cursor}`}: ${
            lines
                .map(
                    ({run}, i) =>
                        `${runs[run].name} ${readouts[i].textContent}`)
                .join('; ')}`);
  }

  function at(event) {
    if (!parts) return null;
    const {left} = drawing.getBoundingClientRect();
    const part = (event.clientX - left - MARGIN.left) / parts.inner.w;
    const first = parts.at.x(all[0]), last = parts.at.x(all.at(-1));
    const place =
        (part * parts.inner.w + MARGIN.left - first) / (last - first || 1);
    return all[nearest(all, all[0] + place * (all.at(-1) - all[0]))];
  }

  drawing.addEventListener('pointermove', event => setCursor(at(event)));
  drawing.addEventListener('pointerleave', () => setCursor(null));
  drawing.addEventListener('click', event => view.onchoose(at(event)));
  node.addEventListener('blur', () => setCursor(null));
  node.addEventListener('keydown', event => {
    const i = view.cursor === null ? all.length - 1 : nearest(all, view.cursor);
    const next = {
      ArrowLeft: i - 1,
      ArrowRight: i + 1,
      Home: 0,
      End: all.length - 1
    }[event.key];
    if (event.key === 'Enter') view.onchoose(all[i]);
    if (next === undefined) return;
    event.preventDefault();
    setCursor(all[Math.min(Math.max(next, 0), all.length - 1)]);
  });
  const one = {node, draw, point};
  view.charts.push(one);
  new ResizeObserver(() => draw()).observe(drawing);
  return node;
}

function setCursor(step) {
  if (view.cursor === step) return;
  view.cursor = step;
  for (const one of view.charts) one.point();
}

function redraw() {
  for (const one of view.charts) one.draw();
}
