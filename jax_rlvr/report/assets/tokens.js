// Completions token by token: their colours, the scale, the one looked at.

function card(row) {
  const samples = samplesOf();
  const [ids, pieces] = ['id', 'piece'].map(name => samples.column(name));
  const advantage = samples.column('advantage')[row.first];
  const tokens = element('p', {
    class: 'tokens',
    role: 'group',
    'aria-label': `completion, reward ${written(row.reward)}`
  });
  for (let i = row.first; i < row.first + row.tokens; i++) {
    const last = i === row.first + row.length - 1;
    tokens.append(dressed(
        element('span', {class: 'token', tabindex: -1, 'data-i': i}), i,
        visible(samples.pieces[pieces[i]], last && row.ended, ids[i])));
  }
  const facts = [
    row.task, `${row.length} token${row.length === 1 ? '' : 's'}`,
    samples.rows.some(row => row.inner) && `update ${row.inner + 1}`,
    row.truncated && 'cut at the limit',
    row.tokens < row.length && `the first ${row.tokens} are here`,
    ...Object.entries(row.parts ?? {}).map(([name,
                                             x]) => `${name} ${written(x)}`)
  ].filter(Boolean);
  return element(
      'article', {class: 'completion'},
      element(
          'div', {class: 'reward', title: 'reward'},
          element('b', {}, written(row.reward)),
          element(
              'small', {},
              `A ${advantage > 0 ? '+' : ''}${written(advantage, 2)}`)),
      element(
          'div', {class: 'body'},
          element('p', {class: 'question'}, row.question ?? row.prompt ?? ''),
          tokens, element('p', {class: 'facts'}, facts.join(' · '))));
}

// What cannot be seen gets a sign: the end of a completion, a line's, part of a
// character.
function visible(piece, ends, id) {
  if (piece === '') return ends ? '∎' : `⟨${id}⟩`;
  return piece.replaceAll('\n', '↵\n');
}

function dressed(node, i, text) {
  const {rgb, bar, did} = look(lens.scale, i);
  node.textContent = text;
  node.style.backgroundColor = `rgb(${rgb})`;
  node.style.setProperty('--ink', ink(rgb));
  node.style.setProperty('--bar', `${Math.round(100 * Math.abs(bar))}%`);
  node.style.setProperty('--from', bar < 0 ? '100%' : '0%');
  if (did !== undefined)
    node.dataset.did = did === SILENT ? 'silent' : DID[did];
  return node;
}

function inspect(node) {
  const i = +node.dataset.i, samples = samplesOf();
  find('completions')
      .querySelectorAll('.token[tabindex="0"]')
      .forEach(old => old.setAttribute('tabindex', '-1'));
  node.setAttribute('tabindex', '0');
  lens.token = i;
  const row = samples.rows.findLast(row => row.first <= i);
  const of = name => samples.column(name)?.[i];
  const probability = of('probability');
  const line = (name, text, key) => text === undefined ? null : [
    element('dt', {}, name), element('dd', key ? {'data-key': key} : {}, text)
  ];
  const number = (name, title, unit = '') => samples.has(name) ?
      line(
          title,
          element(
              'span', {}, written(of(name), 4),
              unit && element('small', {}, ` ${unit}`)),
          name) :
      null;
  find('inspector')
      .replaceChildren(
          element('p', {class: 'piece'}, node.textContent),
          element(
              'p', {class: 'facts'},
              `token ${i - row.first + 1} of ${row.length} · id ${
                  of('id')} · reward ${written(row.reward)}`),
          element(
              'dl', {}, number('probability', 'probability'),
              line(
                  'log-probability',
                  element(
                      'span', {}, written(Math.log(probability), 4),
                      element('small', {}, ' nats')),
                  'logprob'),
              number('entropy', 'entropy', 'nats'), number('ratio', 'ratio'),
              number('advantage', 'advantage'),
              number('covariance', 'covariance'),
              number('gradient', 'gradient')),
          samples.filters.length ?
              element(
                  'ol', {class: 'chain'},
                  samples.filters.map(filter => link(filter, i))) :
              '');
  mark(i);
  const tip = find('tip');
  tip.replaceChildren(
      `${lens.scale.title} `, element('b', {}, told(lens.scale, i)));
  tip.hidden = false;
  const box = node.getClientRects()[0];
  const left = Math.min(
      Math.max(box.left + scrollX, 8),
      scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.transform =
      `translate(${left}px, ${box.top + scrollY - tip.offsetHeight - 6}px)`;
}

// One filter of the chain: what came, what left.
function link(filter, i) {
  const samples = samplesOf();
  const found = verdict(samples, [filter], i);
  const text = Number.isNaN(found) ? 'unknown' : DID[found] ?? 'no gradient';
  const [came, left] =
      ['came', 'left'].map(name => samples.column(`${filter}/${name}`)[i]);
  return element(
      'li', {'data-did': text}, element('span', {}, filter),
      element('b', {}, text),
      Number.isNaN(left) ?
          '' :
          element('small', {}, `${written(came)} → ${written(left)}`));
}

function blank() {
  find('inspector')
      .replaceChildren(element(
          'p', {class: 'facts'},
          'Point at a token, tap it, or press Tab until one is framed, ' +
              'to read its numbers here.'));
}

// The scale, with how the step's tokens spread over it.
function legend(rows) {
  const {scale} = lens, node = find('scale');
  const note = element('p', {class: 'note'}, scale.note);
  const indices = rows.flatMap(
      row => Array.from({length: row.tokens}, (_, k) => row.first + k));
  if (scale.kind === 'did') {
    const counts = new Map();
    for (const i of indices)
      counts.set(told(scale, i), (counts.get(told(scale, i)) ?? 0) + 1);
    node.replaceChildren(
        element(
            'p', {class: 'kinds'},
            [...DID, 'no gradient'].map(
                (name, k) => element(
                    'span', {},
                    element(
                        'span', {
                          class: 'token',
                          'data-did': k === SILENT ? 'silent' : name,
                          style: `background:rgb(${
                              channels(KINDS[theme()][k])});--ink:${
                              ink(channels(KINDS[theme()][k]))}`
                        },
                        name),
                    element('small', {}, ` ${counts.get(name) ?? 0}`))),
            element(
                'button',
                {type: 'button', id: 'next-change', onclick: nextChange},
                'next step with a change')),
        note);
    return;
  }
  const count = 48, heights = new Array(count).fill(0);
  const place = x => (scale.number(x) - scale.low) / (scale.high - scale.low);
  for (const i of indices) {
    const at = place(scale.values[i]);
    if (!Number.isNaN(at))
      heights[Math.min(Math.max(Math.floor(at * count), 0), count - 1)]++;
  }
  const most = Math.max(...heights, 1);
  const stops = (scale.kind === 'sequential' ? SEQUENTIAL : DIVERGING)[theme()];
  const plot = svg(
      'svg', {
        viewBox: '0 0 480 54',
        preserveAspectRatio: 'none',
        'aria-hidden': 'true'
      },
      heights.map((h, k) => svg('rect', {
                    class: 'count',
                    x: 10 * k + 1,
                    width: 8,
                    y: 36 - 36 * Math.sqrt(h / most),
                    height: 36 * Math.sqrt(h / most)
                  })),
      Array.from({length: 96}, (_, k) => svg('rect', {
                                 x: 5 * k,
                                 y: 40,
                                 width: 5.5,
                                 height: 14,
                                 fill: `rgb(${blend(stops, (k + 0.5) / 96)})`
                               })),
      svg('path', {class: 'here'}));
  const back = x => scale.kind === 'ratio' ? 2 ** x : x;
  const ends = [scale.low, (scale.low + scale.high) / 2, scale.high].map(
      (x, k) => element(
          'span', {}, written(back(x)),
          k === 2 && scale.unit ? ` ${scale.unit}` : ''));
  node.replaceChildren(plot, element('p', {class: 'ends'}, ends), note);
  node.querySelector('.here').dataset.place = '';
}

// Filters that touch few tokens touch none of most steps' samples.
function nextChange() {
  stop();
  const {steps, byStep} = samplesOf();
  const changed = step => byStep.get(step).some(
      row => lens.scale.values.subarray(row.first, row.first + row.tokens)
                 .some(x => x >= 1 && x < SILENT));
  const here = steps.indexOf(lens.step);
  const order = [...steps.slice(here + 1), ...steps.slice(0, here)];
  const found = order.find(changed);
  if (found !== undefined) go(steps.indexOf(found));
  find('next-change').focus();
}

function mark(i) {
  const here = find('scale').querySelector('.here');
  if (!here) return;
  const {scale} = lens;
  const at =
      (scale.number(scale.values[i]) - scale.low) / (scale.high - scale.low);
  here.setAttribute(
      'd',
      Number.isNaN(at) ? '' : `M${Math.min(Math.max(at, 0), 1) * 480},0v54`);
}
