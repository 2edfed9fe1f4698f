// Sampled completions, every token coloured by what the update saw of it.

const lens = {
  run: 0,
  step: null,
  colouring: 'entropy',
  rewards: null,
  order: 'batch',
  scale: null,
  playing: null,
  token: null
};

const samplesOf = () => runs[lens.run].samples;

function microscope() {
  const able = runs.map((run, i) => i).filter(i => runs[i].samples);
  if (!able.length) return;
  find('microscope').hidden = false;
  lens.run = able[0];
  const box = find('controls');
  const pick = (label, id, options, change) => element(
      'label', {class: 'field'}, element('span', {}, label),
      element(
          'select', {id, onchange: event => change(event.target.value)},
          options.map(([value, text]) => element('option', {value}, text))));
  const button = (text, label, click) => element(
      'button',
      {type: 'button', 'aria-label': label, title: label, onclick: click},
      text);
  box.append(
      able.length > 1 ? pick(
                            'run', 'run', able.map(i => [i, runs[i].name]),
                            value => {
                              lens.run = +value;
                              choose();
                            }) :
                        '',
      element(
          'div', {class: 'field step'},
          element(
              'label',
              {for: 'step'
              },
              'step ', element('output', {id: 'step-now'})),
          element(
              'div', {class: 'stepper'},
              button('‹', 'previous step', () => by(-1)), element('input', {
                type: 'range',
                id: 'step',
                min: 0,
                step: 1,
                oninput: event => go(+event.target.value)
              }),
              button('›', 'next step', () => by(1)),
              button('▸', 'play', play))),
      element(
          'fieldset', {class: 'field', id: 'colouring'},
          element('legend', {}, 'colour by')),
      element(
          'fieldset', {class: 'field', id: 'rewards'},
          element('legend', {}, 'reward')),
      pick(
          'order', 'order',
          [
            ['batch', 'as sampled'], ['high', 'reward, highest first'],
            ['low', 'reward, lowest first'], ['long', 'longest first']
          ],
          value => {
            lens.order = value;
            show();
          }));
  find('microscope').addEventListener('keydown', keys);
  const text = find('completions');
  const token = event => event.target.closest?.('.token');
  text.addEventListener(
      'pointerover', event => token(event) && inspect(token(event)));
  text.addEventListener('pointerleave', () => {
    find('tip').hidden = true;
  });
  text.addEventListener(
      'focusin', event => token(event) && inspect(token(event)));
  text.addEventListener('focusout', () => {
    find('tip').hidden = true;
  });
  text.addEventListener('click', event => token(event)?.focus());
  dark.addEventListener('change', show);
  view.onchoose = step => {
    stop();
    go(nearest(samplesOf().steps, step));
  };
  choose();
}

// Another run: what can be shown of it.
function choose() {
  stop();
  const samples = samplesOf();
  const all = colourings(samples);
  if (!all.some(each => each.name === lens.colouring))
    lens.colouring = 'entropy';
  const radios = (box, name, options, on) => {
    find(box).replaceChildren(
        find(box).firstElementChild,
        element(
            'div', {class: 'chips'},
            options.map(
                ({value, text, type, checked, title}) => element(
                    'label', {class: 'chip', title}, element('input', {
                      type,
                      name,
                      value,
                      checked: checked && '',
                      onchange: on
                    }),
                    element('span', {}, text)))));
  };
  radios(
      'colouring', 'colouring', all.map(each => ({
                                          value: each.name,
                                          text: each.title,
                                          type: 'radio',
                                          checked: each.name === lens.colouring,
                                          title: each.note
                                        })),
      event => {
        lens.colouring = event.target.value;
        rescale();
        show();
      });
  lens.rewards = bins(samples);
  radios(
      'rewards', 'reward',
      lens.rewards.map(
          (bin, i) =>
              ({value: i, text: bin.text, type: 'checkbox', checked: true})),
      event => {
        lens.rewards[+event.target.value].on = event.target.checked;
        show();
      });
  const slider = find('step');
  slider.max = samples.steps.length - 1;
  const before = lens.step === null ? 0 : nearest(samples.steps, lens.step);
  rescale();
  go(before);
}

// Its few rewards one by one, or quarters of many.
function bins(samples) {
  const rewards = samples.rows.map(row => row.reward)
                      .filter(x => x !== null)
                      .sort((a, b) => a - b);
  const each = [...new Set(rewards)];
  let found = each.map(x => ({text: written(x), low: x, high: x}));
  if (each.length > 6) {
    const cuts = [0, 1, 2, 3, 4].map(
        k => rewards[Math.round(k / 4 * (rewards.length - 1))]);
    found = [0, 1, 2, 3].map(
        k => ({
          text: `${written(cuts[k])} … ${written(cuts[k + 1])}`,
          low: cuts[k],
          high: cuts[k + 1]
        }));
  }
  if (rewards.length < samples.rows.length)
    found.push({text: 'unscored', low: null});
  return found.map(bin => ({...bin, on: true}));
}

const fits = (bin, reward) => bin.low === null ?
    reward === null :
    reward !== null && bin.low <= reward && reward <= bin.high;

function rescale() {
  const samples = samplesOf();
  lens.scale = scaled(
      colourings(samples).find(each => each.name === lens.colouring), samples);
}

function go(index) {
  const {steps} = samplesOf();
  lens.step = steps[Math.min(Math.max(index, 0), steps.length - 1)];
  find('step').value = steps.indexOf(lens.step);
  find('step').setAttribute('aria-valuetext', `step ${lens.step}`);
  find('step-now').textContent = `${lens.step} of ${runs[lens.run].steps}`;
  view.chosen = lens.step;
  for (const one of view.charts) one.point();
  show();
}

const by = offset => {
  stop();
  go(samplesOf().steps.indexOf(lens.step) + offset);
};

function play() {
  if (lens.playing) return stop();
  const last = samplesOf().steps.length - 1;
  if (samplesOf().steps.indexOf(lens.step) === last) go(0);
  lens.playing = setInterval(() => {
    const i = samplesOf().steps.indexOf(lens.step);
    if (i < last)
      go(i + 1);
    else
      stop();
  }, 400);
}

function stop() {
  clearInterval(lens.playing);
  lens.playing = null;
}

function show() {
  const samples = samplesOf();
  const rows = samples.byStep.get(lens.step);
  const kept = rows.filter(
      row => lens.rewards.some(bin => bin.on && fits(bin, row.reward)));
  const reward = row => row.reward ?? -Infinity;
  const orders = {
    high: (a, b) => reward(b) - reward(a),
    low: (a, b) => reward(a) - reward(b),
    long: (a, b) => b.length - a.length
  };
  if (orders[lens.order]) kept.sort(orders[lens.order]);
  find('completions').replaceChildren(...kept.map(card));
  find('completions')
      .classList.toggle('brief', rows.every(row => row.tokens <= 12));
  find('completions').querySelector('.token')?.setAttribute('tabindex', '0');
  find('shown').textContent =
      `${kept.length} of ${rows.length} sampled completions`;
  find('tip').hidden = true;
  legend(rows);
  blank();
}

function keys(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === '[' || event.key === ']') {
    const held =
        lens.token !== null && document.activeElement.matches('.token');
    by(event.key === '[' ? -1 : 1);
    if (held) find('completions').querySelector('.token')?.focus();
    return;
  }
  const node = document.activeElement;
  if (!node?.matches('.token')) return;
  const all = [...find('completions').querySelectorAll('.token')];
  const line = node.closest('.tokens'),
        lines = [...find('completions').querySelectorAll('.tokens')];
  const column = [...line.children].indexOf(node);
  const other = offset => {
    const next = lines[lines.indexOf(line) + offset];
    return next?.children[Math.min(column, next.children.length - 1)];
  };
  const next = {
    ArrowLeft: () => all[all.indexOf(node) - 1],
    ArrowRight: () => all[all.indexOf(node) + 1],
    ArrowUp: () => other(-1),
    ArrowDown: () => other(1),
    Home: () => line.firstElementChild,
    End: () => line.lastElementChild
  }[event.key];
  if (!next) return;
  event.preventDefault();
  next()?.focus();
}
