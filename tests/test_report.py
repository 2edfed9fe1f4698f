"""The report: what is in the file, and what it does in a browser."""

import base64
import functools
import gzip
import json
import re
import shutil

import numpy as np
import pytest

from jax_rlvr.report import data
from jax_rlvr.report.__main__ import main
from jax_rlvr.tokenizer import train_characters

HOSTILE = '</script><img src=x onerror="window.hacked = 1"><!--'
TOKENIZER = train_characters('0123456789+=')


def completion(step, number, **more):
  """Tokens '4', '2' and the end, whose entropies are 1, ½ and 0 nats."""
  ids = [*TOKENIZER.encode('42'), TOKENIZER.end_ids[0]]
  return {
    'task': 'sums',
    'prompt': f'{step}.{number}',
    'completion': '42',
    'truncated': False,
    'reward': float(number),
    'parts': {},
    'advantage': 2.0 * number - 1.0,
    'ids': ids,
    'logprob': [-1.0, -0.5, 0.0],
    'entropy': [1.0, 0.5, 0.0],
  } | more


def watched(step, number):
  sign = 2.0 * number - 1.0
  return completion(
    step,
    number,
    question=HOSTILE if number else '40+2=',
    inner_step=number,
    # Ratios 1, e^¼ and 1.
    current_logprob=[-1.0, -0.25, 0.0],
    current_entropy=[2.0 / step, 0.5, 0.0],
    covariance=[-1.5 * sign, 0.25, 0.5 * sign],
    gradient=[0.0, -0.125, 0.0625],
    filters={
      'clip': [[0, -1.0, 0.0]],
      'pull': [[1, -1.25, -0.5], [2, 1.0, 1.75]] if number else [],
    },
  )


def write(workdir, make, steps=4):
  workdir.mkdir(parents=True)
  TOKENIZER.save(workdir / 'tokenizer')
  run = {'run': {'recipe': 'sums.py', 'overrides': {'lr': '0.1'}}}
  (workdir / 'manifest.json').write_text(json.dumps(run))
  # R = 1.25 − ¼ e^H, H = 1/s.
  entropies = {step: 1 / step for step in range(1, steps + 2)}
  rows = [
    {
      'step': step,
      'reward/mean': step / 10,
      'entropy/token_mean': entropies[step],
      'entropy/sequence_mean': entropies[step],
      'grad_norm': float('nan') if step == 2 else 1.0,
      'covariance/mean': 0.1,
      **{f'covariance/p{p:02}': p / 100 for p in (1, 5, 25, 50, 75, 95, 99)},
    }
    for step in range(1, steps + 1)
  ]
  scores = [
    {
      'step': step,
      'eval/sums/avg@4': (score := 1.25 - 0.25 * np.exp(entropies[step + 1])),
      'eval/sums/pass@1': score,
    }
    for step in range(steps + 1)
  ]
  for name, lines in (('metrics', rows), ('eval', scores)):
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (workdir / f'{name}.jsonl').write_text(text)
  (workdir / 'rollouts').mkdir()
  for step in range(1, steps + 1):
    text = ''.join(json.dumps(make(step, n)) + '\n' for n in (0, 1))
    (workdir / 'rollouts' / f'{step:06d}.jsonl').write_text(text)
  return workdir


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  """Of a run of today, whose name is hostile, and of one of before."""
  folder = tmp_path_factory.mktemp('runs')
  new = write(folder / '<b>new', watched)
  old = write(folder / 'old', completion, steps=2)
  out = folder / 'report.html'
  assert main([str(new), str(old), '--out', str(out)]) == 0
  return out


def unpacked(packed):
  """The runs of a page, with their columns, as its script reads them."""
  whole = gzip.decompress(packed)
  length = int.from_bytes(whole[:4], 'little')
  runs, blob = json.loads(whole[4 : 4 + length]), whole[4 + length :]
  for run in runs:
    columns = run['samples']['columns'] if run['samples'] else {}
    for name, at in columns.items():
      count = at['count']
      planes = np.frombuffer(blob, np.uint8, 4 * count, at['start'])
      column = planes.reshape(4, count).T.copy().view('<u4')[:, 0]
      columns[name] = column if at['whole'] else column.view('<f4')
  return runs


def test_page_is_one_file_that_asks_for_nothing(report):
  text = report.read_text()
  body = re.sub(r'(?s)(?<=id="data">).*?(?=</script>)', '', text)
  assert set(re.findall(r'https?://[^\s\'"<]*', body)) == {
    'http://www.w3.org/2000/svg'
  }
  assert not re.search(
    r'\bsrc=|@import|<link|\bfetch\(|XMLHttp|url\((?!#)', body
  )
  assert "default-src 'none'" in body
  # The hostile run and question are there, and neither is markup.
  assert '<b>' not in text and HOSTILE not in text
  assert text.count('</script') == 2
  assert '<title>&lt;b&gt;new · old</title>' in text


def test_page_has_the_numbers_of_the_runs(report):
  packed = re.search(r'id="data">(.*?)</script>', report.read_text()).group(1)
  new, old = unpacked(base64.b64decode(packed))
  assert new['name'] == '<b>new' and new['recipe'] == 'sums.py: lr=0.1'
  assert new['metrics']['step'] == [1, 2, 3, 4]
  assert new['metrics']['values']['reward/mean'] == [0.1, 0.2, 0.3, 0.4]
  assert new['metrics']['values']['grad_norm'] == [1.0, None, 1.0, 1.0]
  assert new['scores']['step'] == [0, 1, 2, 3, 4]
  columns = {name: x[3:6] for name, x in new['samples']['columns'].items()}
  texts = [new['samples']['pieces'][i] for i in columns['piece']]
  assert texts == ['4', '2', '']
  assert columns.pop('id').tolist() == completion(1, 1)['ids']
  # e^−1, e^−¼, 1; 14 bits of fraction.
  expected = {
    'probability': [0.367879, 0.778801, 1.0],
    'entropy': [2.0, 0.5, 0.0],
    'ratio': [1.0, 1.284025, 1.0],
    'advantage': [1.0, 1.0, 1.0],
    'covariance': [-1.5, 0.25, 0.5],
    'gradient': [0.0, -0.125, 0.0625],
    'clip/did': [1, 0, 0],
    'pull/did': [0, 2, 2],
    'pull/came': [np.nan, -1.25, 1.0],
    'pull/left': [np.nan, -0.5, 1.75],
  }
  for name, numbers in expected.items():
    np.testing.assert_allclose(columns[name], numbers, 5e-5, err_msg=name)
  assert set(old['samples']['columns']) == {
    'id', 'piece', 'advantage', 'entropy', 'probability'
  }  # fmt: skip
  # Too few pairs for a law.
  assert old['law'] is None


def test_law_is_that_of_the_run(report):
  packed = re.search(r'id="data">(.*?)</script>', report.read_text()).group(1)
  law = unpacked(base64.b64decode(packed))[0]['law']
  # The score after s steps is that of the entropy of step s + 1.
  assert law['a'] == pytest.approx(0.25) and law['b'] == pytest.approx(1.25)
  assert law['ceiling'] == pytest.approx(1.0)
  assert law['step'] == [0, 1, 2, 3]
  assert law['entropy'] == [1.0, 0.5, 0.33333, 0.25]
  assert law['curve'][1][0] == pytest.approx(1.0)


def test_a_run_that_learnt_new_fields_halfway_shows_both_halves(tmp_path):
  def make(step, number):
    return (watched if step == 2 else completion)(step, number)

  run = data.read(write(tmp_path / 'run', make, steps=2), 1000)
  (whole,) = unpacked(data.pack([run]))
  columns = whole['samples']['columns']
  # Two completions of three tokens before.
  assert np.isnan(columns['covariance'][:6]).all()
  assert np.isnan(columns['clip/did'][:6]).all()
  assert columns['covariance'][6:9].tolist() == [1.5, 0.25, -0.5]


def test_completions_without_tokens_are_left_out(tmp_path):
  def oldest(step, number):
    row = completion(step, number)
    return {name: row[name] for name in ('task', 'completion', 'reward')}

  run = data.read(write(tmp_path / 'run', oldest), 1000)
  assert run['samples'] is None
  (whole,) = unpacked(data.pack([run]))
  assert whole['metrics']['values']['reward/mean'][0] == 0.1


def test_curves_of_many_steps_are_means_of_neighbours():
  rows = [{'step': i, 'x': float(i)} for i in range(1, 2501)]
  found = data.series(rows)
  # 2,500 / 1,000 → 3 a point: 1 to 3, 4 to 6, …, 2,500.
  assert len(found['step']) == 834
  assert found['step'][:2] == [3, 6] and found['values']['x'][:2] == [2.0, 5.0]
  assert found['step'][-1] == 2500 and found['values']['x'][-1] == 2500.0


def test_what_a_filter_did():
  nan = np.nan
  came = np.array([nan, 2.0, -1.0, 0.0])
  left = np.array([nan, 0.0, -0.5, 0.25])
  kept, clipped, penalised, scaled = 0, 1, 2, 3
  assert data.did(came, left, False).tolist() == [
    kept, clipped, penalised, penalised
  ]  # fmt: skip
  # A gradient that was not there was not multiplied.
  assert data.did(came, left, True).tolist() == [
    kept, clipped, scaled, penalised
  ]  # fmt: skip


@pytest.mark.parametrize(
  'changed, expected',
  [
    ([[0, 1.0, 5.0], [1, -0.2, -1.0], [2, 3.0, 0.0]], True),
    ([[0, 1.0, 5.0], [1, -0.2, 1.0]], False),
    ([[2, 3.0, 0.0]], False),
    ([], False),
  ],
)
def test_scaled_is_one_factor_for_all(changed, expected):
  assert data._scaled([{'filters': {'x': changed}}]) == {'x': expected}


class Bytes:
  """A tokenizer of bytes: a character may take several tokens."""

  end_ids = (0,)

  def decode(self, ids):
    return bytes(ids).decode('utf-8', errors='replace')


def test_pieces_are_the_text_that_each_token_adds():
  text = 'né €5' * 40
  ids = list(text.encode())
  found = data._pieces(Bytes(), ids)
  assert found[:9] == ['n', '', 'é', ' ', '', '', '€', '5', 'n']
  assert len(found) == len(ids) and ''.join(found) == text
  # A character that never ends shows as what it is.
  assert data._pieces(Bytes(), ids[:2]) == ['n', '\ufffd']
  assert data._pieces(None, [7]) == ['⟨7⟩']


def test_samples_keep_to_their_tokens(tmp_path):
  workdir = write(tmp_path / 'run', watched, steps=60)
  whole = data.read(workdir, 360)['samples']
  assert whole['steps'] == list(range(1, 61))
  # Steps go first, evenly, down to 16 of them; then the ends of completions.
  fewer = data.read(workdir, 180)['samples']
  assert len(fewer['steps']) == 30 and fewer['steps'][::29] == [1, 60]
  assert len(fewer['columns']['id']) == 180
  least = data.read(workdir, 70)['samples']
  assert len(least['steps']) == 16
  assert {row['tokens'] for row in least['rows']} == {2}
  assert {row['length'] for row in least['rows']} == {3}


def test_tokens_take_little_room(tmp_path):
  """400,000 tokens, the default, in 15 MB: 37 bytes each, in base64."""
  rng = np.random.default_rng(0)
  count = 20_000
  numbers = {
    name: rng.normal(size=count)
    for name in ('entropy', 'probability', 'ratio', 'covariance', 'gradient')
  }
  sparse = np.where(rng.random(count) < 0.01, 1.0, np.nan)
  for name in ('clip', 'clip_cov'):
    numbers |= {f'{name}/{x}': sparse for x in ('came', 'left', 'did')}
  numbers |= {
    'advantage': np.repeat(rng.normal(size=count // 100), 100),
    'id': rng.integers(0, 150_000, count).astype(np.uint32),
    'piece': rng.integers(0, 9_000, count).astype(np.uint32),
  }
  samples = {'steps': [], 'rows': [], 'pieces': [], 'columns': numbers}
  packed = base64.b64encode(data.pack([{'samples': samples}]))
  assert len(packed) / count < 37


@pytest.mark.parametrize(
  'folder, message',
  [('no', 'no such folder'), ('', 'no step is logged yet')],
)
def test_no_run_is_one_clear_line(tmp_path, capsys, folder, message):
  run, out = tmp_path / folder, tmp_path / 'out.html'
  assert main([str(run), '--out', str(out)]) == 2
  assert capsys.readouterr().err == f'error: {run} holds no run: {message}\n'
  assert not out.exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
  runs = [write(tmp_path / name / 'run', completion, 1) for name in 'ab']
  out = tmp_path / 'out.html'
  assert main([*map(str, runs), '--out', str(out)]) == 0
  assert '<title>a/run · b/run</title>' in out.read_text()


# In a browser


@pytest.fixture(scope='module')
def browser():
  playwright = pytest.importorskip(
    'playwright.sync_api', reason='no playwright: pip install playwright'
  )
  names = 'chromium', 'chromium-browser', 'google-chrome'
  binary = next(filter(None, map(shutil.which, names)), None)
  if binary is None:
    pytest.skip('no chromium: apt-get install chromium')
  with playwright.sync_playwright() as p:
    # In a container root has no sandbox; the page is our own.
    arguments = ['--no-sandbox', '--disable-dev-shm-usage']
    chromium = p.chromium.launch(executable_path=binary, args=arguments)
    yield chromium
    chromium.close()


@pytest.fixture
def opened(browser, report):
  """Opens the report; what it complains of fails the test."""
  complaints, contexts = [], []

  def open_report(width=1280, height=900, **settings):
    context = browser.new_context(
      viewport={'width': width, 'height': height}, **settings
    )
    contexts.append(context)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on('pageerror', lambda error: complaints.append(str(error)))
    page.on('console', lambda said: complaints.append(said.text))
    page.on(
      'request',
      lambda asked: (
        asked.url.startswith('file:') or complaints.append(asked.url)
      ),
    )
    page.goto(report.as_uri())
    page.wait_for_selector('body[data-ready]')
    return page

  yield open_report
  for context in contexts:
    context.close()
  assert not complaints


def number(page, key):
  return page.inner_text(f'#inspector [data-key={key}]').split()[0]


def colour_by(page, name):
  page.check(f'input[name=colouring][value="{name}"]')


def colour(token):
  return token.evaluate('node => getComputedStyle(node).backgroundColor')


def test_it_opens_and_what_a_policy_wrote_is_text(opened):
  page = opened()
  assert page.inner_text('h1') == '<b>new and old'
  assert page.evaluate('window.hacked') is None
  assert HOSTILE in page.inner_text('#completions')
  assert page.locator('#completions img').count() == 0
  curves = page.locator('#curves .chart')
  titles = curves.locator('.name').all_inner_texts()
  assert titles[:3] == ['Reward', 'Held-out pass@1', 'Entropy']
  # Two runs in one chart, each with its last number.
  assert curves.first.locator('path.line').count() == 2
  assert curves.first.locator('.value').all_inner_texts() == ['0.400', '0.200']
  assert page.locator('#laws tbody tr').first.inner_text().split() == [
    '<b>new', '0.250', '1.250', '1', '–', '–'
  ]  # fmt: skip
  # Bands of three widths.
  assert page.locator('#fans path.band').count() == 6
  page.click('#more summary')
  assert page.locator('#more .chart').count() > 3


def test_hovering_a_token_shows_its_numbers(opened):
  page = opened()
  # The second completion's '2'.
  page.locator('.tokens').nth(1).locator('.token').nth(1).hover()
  assert page.inner_text('#inspector .piece') == '2'
  found = {
    key: number(page, key)
    for key in (
      'probability', 'logprob', 'entropy', 'ratio', 'advantage', 'covariance',
      'gradient',
    )
  }  # fmt: skip
  assert found == {
    'probability': '0.7788',
    'logprob': '−0.2500',
    'entropy': '0.5000',
    'ratio': '1.2840',
    'advantage': '1',
    'covariance': '0.2500',
    'gradient': '−0.1250',
  }
  chain = page.locator('#inspector .chain li').all_inner_texts()
  assert [line.split() for line in chain] == [
    ['clip', 'kept'],
    ['pull', 'penalised', '−1.250', '→', '−0.500'],
  ]
  assert page.inner_text('#tip') == 'entropy 0.500 nats'


def test_colouring_switches_and_a_bar_tells_it_too(opened):
  page = opened()
  first, second, third = (
    page.locator('.tokens').first.locator('.token').nth(i) for i in range(3)
  )

  def bar(token):
    return token.evaluate('node => getComputedStyle(node).backgroundSize')

  assert colour(third) == 'rgb(251, 250, 247)' and bar(third) == '0% 2px'
  by_entropy = colour(first)
  colour_by(page, 'covariance')
  # Of reward 0: 1.5, ¼ and −½; 1.5 is the scale's end.
  assert colour(first) == 'rgb(12, 56, 108)' != by_entropy
  assert bar(first) == '100% 2px' and bar(second) == '17% 2px'
  left, right = (
    token.evaluate('node => getComputedStyle(node).backgroundPositionX')
    for token in (second, third)
  )
  assert (left, right) == ('0%', '100%')
  colour_by(page, 'filters')
  assert first.get_attribute('data-did') == 'clipped'
  assert 'line-through' in first.evaluate(
    'node => getComputedStyle(node).textDecorationLine'
  )
  pulled = page.locator('.tokens').nth(1).locator('.token').nth(1)
  assert pulled.get_attribute('data-did') == 'penalised'
  colour_by(page, 'clip/did')
  assert pulled.get_attribute('data-did') == 'kept'
  # What the second filter gets of the clipped token has no gradient.
  colour_by(page, 'pull/did')
  assert first.get_attribute('data-did') == 'silent'


def test_rewards_filter_and_order(opened):
  page = opened()
  rewards = page.locator('.completion .reward b')
  assert rewards.all_inner_texts() == ['0', '1']
  page.select_option('#order', 'high')
  assert rewards.all_inner_texts() == ['1', '0']
  page.uncheck('#rewards input >> nth=1')
  assert rewards.all_inner_texts() == ['0']
  assert page.inner_text('#shown') == '1 of 2 sampled completions'


def test_stepping_goes_through_training(opened):
  page = opened()
  token = page.locator('.tokens').first.locator('.token').first
  colours, entropies = [], []
  for step in range(1, 5):
    assert page.inner_text('#step-now') == f'{step} of 4'
    token.hover()
    entropies.append(number(page, 'entropy'))
    colours.append(colour(token))
    page.click('text=›')
  assert entropies == ['2', '1', '0.6667', '0.5000']
  # One scale for all steps: what falls pales.
  assert len(set(colours)) == 4
  # A click on a chart goes to the step there: here its left end.
  page.locator('#curves .drawing').first.click(position={'x': 60, 'y': 50})
  assert page.inner_text('#step-now') == '1 of 4'
  # Another run offers what it has: of an old one, less.
  page.select_option('#run', label='old')
  values = page.locator('#colouring input').evaluate_all(
    'all => all.map(one => one.value)'
  )
  assert values == ['entropy', 'advantage', 'probability']


def test_all_can_be_reached_and_read_by_keyboard(opened):
  page = opened()
  press = page.keyboard.press

  def focused(what='node.className'):
    return page.evaluate(f'(node => {what})(document.activeElement)')

  visited = []
  for _ in range(60):
    press('Tab')
    visited.append(focused('node.id || node.className || node.name'))
    if visited[-1] == 'token':
      break
  assert visited[0] == 'skip' and visited[-1] == 'token'
  assert {'run', 'chart', 'step', 'colouring', 'order', 'smooth'} <= set(
    visited
  )
  assert page.inner_text('#inspector .piece') == '4'
  width = 'parseFloat(getComputedStyle(node).outlineWidth)'
  assert focused(width) >= 2
  press('ArrowRight')
  assert page.inner_text('#inspector .piece') == '2'
  press('ArrowDown')
  assert number(page, 'ratio') == '1.2840'
  press('End')
  assert page.inner_text('#inspector .piece') == '∎'
  press(']')
  assert page.inner_text('#step-now') == '2 of 4' and focused() == 'token'
  press('Shift+Tab')
  press('Tab')
  assert focused() == 'token'
  # A chart read by the arrows, and its step put under the microscope.
  chart = page.locator('#curves .chart').first
  chart.focus()
  press('Home')
  press('ArrowRight')
  press('ArrowRight')
  assert 'step 3: <b>new 0.300; old 0.200' in chart.get_attribute('aria-label')
  press('Enter')
  assert page.inner_text('#step-now') == '3 of 4'


def luminance(rgb):
  x = np.array([int(n) for n in re.findall(r'\d+', rgb)[:3]]) / 255
  x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
  return float(x @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
  high, low = sorted((luminance(a), luminance(b)), reverse=True)
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_every_text_stands_out_in_light_and_dark(opened, scheme):
  page = opened(color_scheme=scheme)
  paper = page.evaluate('getComputedStyle(document.body).backgroundColor')
  assert (luminance(paper) > 0.5) == (scheme == 'light')
  styles = (
    'all => all.map(node => [getComputedStyle(node).color,'
    ' getComputedStyle(node).backgroundColor])'
  )
  for selector in ('h1', '.lead', '.note', '.facts', '.unit', '.value', 'td'):
    for ink, _ in page.locator(selector).evaluate_all(styles):
      assert contrast(ink, paper) >= 4.5, selector
  for ink in page.locator('.tick').evaluate_all(
    'all => all.map(node => getComputedStyle(node).fill)'
  ):
    assert contrast(ink, paper) >= 4.5
  for name in ('entropy', 'covariance', 'advantage', 'ratio', 'filters'):
    colour_by(page, name)
    for ink, fill in page.locator('.token').evaluate_all(styles):
      assert contrast(ink, fill) >= 4.5, name


def test_a_phone_scrolls_one_way_only(opened):
  page = opened(390, 844, has_touch=True, is_mobile=True)
  assert page.evaluate('document.documentElement.scrollWidth') == 390
  assert page.evaluate('innerWidth') == 390
  page.locator('.tokens').nth(1).locator('.token').nth(1).tap()
  box = page.locator('#inspector').bounding_box()
  # The numbers are at hand, at the bottom of the screen.
  assert 0 < box['y'] < 844 and box['y'] + box['height'] <= 845
  assert number(page, 'ratio') == '1.2840'


def test_a_policy_of_words_and_lines_is_shown_as_written(
  browser, tmp_path, monkeypatch
):
  """Line ends get a sign, and tokens of no text their number."""
  texts = ['Two', ' words\n', '', ' more']
  monkeypatch.setattr(data, '_pieces', lambda tokenizer, ids: texts[: len(ids)])
  ids = [5, 6, 7, 8]
  make = functools.partial(
    completion, ids=ids, logprob=[-1.0] * 4, entropy=[1.0] * 4
  )
  run = write(tmp_path / 'run', make, 1)
  out = tmp_path / 'out.html'
  assert main([str(run), '--out', str(out)]) == 0
  page = browser.new_page()
  page.goto(out.as_uri())
  page.wait_for_selector('body[data-ready]')
  assert page.locator('.tokens').first.evaluate('node => node.textContent') == (
    'Two words↵\n⟨7⟩ more'
  )
  page.close()
