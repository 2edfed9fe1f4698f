// Head of the page, curves, law and covariance.

// What everybody looks at first; a name may stand for several, by `*`.
const FIRST = [
  ['reward/mean', 'Reward', 'of rollouts'],
  ['eval/*/pass@1', 'Held-out pass@1', ''],
  ['entropy/token_mean', 'Entropy', 'nats a token'],
  ['kl/old', 'KL to the old policy', 'nats'],
  ['kl/reference', 'KL to the reference', 'nats'],
  ['ratio/max', 'Largest ratio', ''],
  ['length/mean', 'Length', 'tokens'],
  ['length/clipped_share', 'Cut at the limit', 'share'],
  ['groups/zero_variance_share', 'Groups of one reward', 'share'],
  ['filters/*/kept', 'Kept by', 'share of tokens'],
  ['filters/*/selected', 'Selected by', 'share of tokens'],
  ['grad_norm', 'Gradient norm', ''],
  ['time/rollout_s', 'Rollout', 's'],
  ['time/update_s', 'Update', 's'],
  ['time/rollout_tokens_per_s', 'Rollout speed', 'tokens / s'],
];
const FAN = [['p01', 'p99'], ['p05', 'p95'], ['p25', 'p75']];

function linesOf(name) {
  return runs.flatMap((run, i) => {
    const from = [run.metrics, run.scores].find(part => part.values[name]);
    if (!from) return [];
    const kept =
        from.step.map((_, k) => k).filter(k => from.values[name][k] !== null);
    if (!kept.length) return [];
    return [{
      run: i,
      steps: kept.map(k => from.step[k]),
      values: kept.map(k => from.values[name][k])
    }];
  });
}

function head() {
  const joint = i => i === runs.length - 1 ? element('i', {}, ' and ') : ', ';
  find('title').replaceChildren(
      ...runs.flatMap((run, i) => i ? [joint(i), run.name] : [run.name]));
  if (runs.length > 3) find('title').textContent = `${runs.length} runs`;
  find('legend').append(...runs.map(
      (run, i) => element(
          'button', {
            type: 'button',
            'aria-pressed': 'true',
            class: 'run',
            title: run.recipe,
            onclick: event => {
              const shown = view.hidden.delete(i) || !view.hidden.add(i);
              event.currentTarget.setAttribute('aria-pressed', String(shown));
              redraw();
            },
          },
          swatch(i), run.name)));
  const score = runs.map(
      run => Object.keys(run.scores.values)
                 .find(name => /^eval\/.*\/pass@1$/.test(name)));
  const pair = values => {
    const kept = (values ?? []).filter(x => x !== null);
    const ends = [kept[0], kept.at(-1)].map(x => written(x));
    return kept.length ? ends.join(' → ') : '–';
  };
  const middle = values => written([
    ...values ?? []
  ].filter(x => x !== null).sort((a, b) => a - b)[values?.length >> 1]);
  table(
      find('summary'),
      [
        'run', 'steps', 'held-out pass@1', 'reward', 'entropy, nats',
        'length, tokens', 's a step', 'recipe'
      ],
      runs.map((run, i) => {
        const of = name => run.metrics.values[name];
        const seconds =
            of('time/rollout_s')
                ?.map((x, k) => x + (of('time/update_s')?.[k] ?? 0));
        return [
          run.name, written(run.steps), pair(run.scores.values[score[i]]),
          pair(of('reward/mean')), pair(of('entropy/token_mean')),
          pair(of('length/mean')), middle(seconds), run.recipe
        ];
      }));
}

function table(node, heads, rows) {
  node.append(
      element(
          'thead', {},
          element(
              'tr', {},
              heads.map(text => element('th', {scope: 'col'}, text)))),
      element(
          'tbody', {},
          rows.map(
              ([name, ...cells], i) => element(
                  'tr', {}, element('th', {scope: 'row'}, swatch(i), name),
                  cells.map(text => element('td', {}, text))))));
}

function curves() {
  const names = [...new Set(runs.flatMap(
      run =>
          [...Object.keys(run.metrics.values),
           ...Object.keys(run.scores.values)]))];
  const taken = new Set();
  for (const [pattern, title, unit] of FIRST) {
    const [before, after] = pattern.split('*');
    const matching = names.filter(
        name => after === undefined ?
            name === pattern :
            name.startsWith(before) && name.endsWith(after) &&
                name.length > before.length + after.length);
    for (const name of matching) {
      taken.add(name);
      const of =
          after === undefined ? '' : name.slice(before.length, -after.length);
      const heading = !of ? title :
          pattern.startsWith('eval') ?
                            (matching.length > 1 ? `${title}, ${of}` : title) :
                            `${title} ${of}`;
      find('curves').append(
          chart({title: heading, unit, lines: linesOf(name), name}));
    }
  }
  const rest = names.filter(name => !taken.has(name)).sort();
  find('more').addEventListener('toggle', () => {
    find('more').querySelector('.grid').append(
        ...rest.splice(0)
            .map(name => ({name, lines: linesOf(name)}))
            .filter(({lines}) => lines.length)
            .map(({name,
                   lines}) => chart({title: name, lines, name, height: 110})));
  }, {once: true});
  find('more').hidden = !rest.length;
  find('smooth').addEventListener('change', event => {
    view.smooth = event.target.checked;
    redraw();
  });
}

function laws() {
  const found =
      runs.map((run, i) => ({...run.law, run: i, known: Boolean(run.law)}))
          .filter(law => law.known);
  if (!found.length) return;
  find('law').hidden = false;
  const node = find('plane');
  const draw = () => {
    const shown = found.filter(law => !view.hidden.has(law.run));
    const x = [0, Math.max(...found.flatMap(law => law.entropy)) * 1.05];
    const y = extent(found.flatMap(law => [...law.score, law.ceiling]));
    const {plot, at, inner} =
        frame(node, {x, y, height: 340, label: 'H, nats'});
    const cut = svg(
        'clipPath', {id: 'inside'},
        svg('rect',
            {x: MARGIN.left, y: MARGIN.top, width: inner.w, height: inner.h}));
    const inside = svg('g', {'clip-path': 'url(#inside)'});
    plot.append(
        cut, inside,
        svg('text', {class: 'tick', x: MARGIN.left + 5, y: MARGIN.top + 11},
            'R'));
    for (const {run, curve: [h, r, low, high], entropy, score, step, ceiling} of
             shown) {
      const style = {
        stroke: colour(run),
        'stroke-dasharray': DASHES[run % 6],
        class: 'line'
      };
      inside.append(
          svg('path', {
            class: 'band',
            fill: colour(run),
            d: band(h, low, high, at.x, at.y)
          }),
          svg('path', {...style, d: path(h, r, at.x, at.y)}), svg('path', {
            class: 'ceiling',
            stroke: colour(run),
            d: `M${MARGIN.left},${at.y(ceiling)}h${inner.w}`
          }));
      entropy.forEach(
          (v, i) => inside.append(
              svg('path', {
                d: MARKS[run % 6],
                fill: colour(run),
                'fill-opacity': 0.35 + 0.65 * i / entropy.length,
                transform: `translate(${at.x(v)} ${at.y(score[i])}) scale(1.25)`
              },
                  svg('title', {},
                      `${runs[run].name}, step ${step[i]}: H ${written(v)}, R ${
                          written(score[i])}`))));
    }
    node.replaceChildren(plot);
  };
  view.charts.push({draw, point: () => {}});
  new ResizeObserver(draw).observe(node);
  table(
      find('laws'), ['', 'a', 'b', 'ceiling', 'early¹', 'RMSE¹'],
      runs.map(
          ({name, law}) =>
              [name,
               ...[law?.a, law?.b, law?.ceiling, law?.forecast?.ceiling,
                   law?.forecast?.rmse]
                   .map(x => written(x))]));
}

function fans() {
  const charts = [];
  runs.forEach((run, i) => {
    const of = name => run.metrics.values[`covariance/${name}`];
    if (!of('mean')) return;
    if (of('p50'))
      charts.push(chart({
        title: run.name,
        unit: 'nats × advantage',
        height: 230,
        name: `covariance of ${run.name}`,
        lines: [{run: i, steps: run.metrics.step, values: of('p50')}],
        bands: FAN.map(([low, high]) => ({low: of(low), high: of(high)})),
        dashed: of('mean'),
      }));
  });
  const fan = charts.length;
  for (const share of ['0.0002', '0.02', '0.2']) {
    const lines = linesOf(`covariance/top_${share}`);
    if (lines.length)
      charts.push(chart({
        title: `Mean of the highest ${+ share * 100} %`,
        unit: '',
        lines,
        name: `covariance/top_${share}`
      }));
  }
  find('covariance').hidden = !charts.length;
  find('fans').append(...charts.slice(0, fan));
  find('tops').append(...charts.slice(fan));
}
