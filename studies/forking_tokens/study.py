"""Tables of README.md, and with --figures its figures (extra: report).

python -m studies.forking_tokens.study --figures
"""

import json
import pathlib

import numpy as np

from jax_rlvr.analysis.entropy_law import ENTROPY
from studies import results
from studies.results import (
  difference,
  draw_runs,
  entropy,
  interval,
  shown,
  table,
)

HERE = pathlib.Path(__file__).parent
STUDY = 'forking_tokens'
NAMES = {
  'all': 'all',
  'top_50': 'top 50 %',
  'top_20': 'top 20 %',
  'top_10': 'top 10 %',
  'bottom_80': 'bottom 80 %',
}


def single(run):
  return run.last('avg@8', 3)


def several(run):
  return run.last('pass@8', 3)


def early(run):
  """Mean held-out score of the first half of training: how fast it learns."""
  step, score = run.at('avg@8')
  return float(score[(step > 0) & (step <= 40)].mean())


def headline(found):
  """Which tokens are updated, and which are counted in the mean."""
  rows, everything = [], found['quickstart/all']
  for name, title in NAMES.items():
    for suffix, counted in ('', 'updated'), ('_all_counted', 'all'):
      runs = found.get(f'quickstart/{name}{suffix}', {})
      if not runs:
        continue
      cells = [
        shown([f(run) for run in runs.values()])
        for f in (entropy, early, single, several)
      ]
      against = ['', '']
      if name != 'all':
        against = [
          shown(difference(runs, everything, f)) for f in (entropy, single)
        ]
      counted = '' if name == 'all' else counted
      rows.append([title, counted, str(len(runs)), *cells, *against])
  head = ['updated', 'counted', 'seeds', 'entropy, nats', 'avg@8, steps 4–40']
  head += ['avg@8', 'pass@8', 'entropy − all’s', 'avg@8 − all’s']
  return table(head, rows)


def token_files():
  found = {}
  for file in sorted((HERE / 'results').glob('tokens.*.json')):
    _, policy, method, seed = file.stem.split('.')
    kept = json.loads(file.read_text())
    found.setdefault((policy, method), {})[int(seed)] = kept
  return found


def evolution(files):
  """Overlap of the top 20 % with the first policy's and the last one's."""
  rows = []
  for (policy, method), runs in files.items():
    each = [run['evolution'] for run in runs.values()]
    for which in 'base', 'final':
      overlaps = np.array([e[f'overlap_with_{which}'] for e in each])
      cells = [
        f'{step}: {mean:.2f}'
        for step, mean in zip(each[0]['step'], overlaps.mean(0), strict=True)
      ]
      title = f'{policy}, {NAMES.get(method, method)} ({len(each)})'
      rows.append([title if which == 'base' else '', which, ', '.join(cells)])
  return table(['', 'overlap with', 'step: share'], rows)


def where(files):
  """Percentiles before and after, and tokens of high and low entropy."""
  rows = []
  for (policy, method), runs in files.items():
    kept = runs[min(runs)]['evolution']
    for place, when in (0, 'before'), (-1, 'after'):
      shares = kept['percentiles'][place]
      cells = [
        f'{value:.3g}'
        for percent, value in zip(kept['percents'], shares, strict=True)
        if percent in (20, 50, 80, 95)
      ]
      below = f'{kept["share_below_0.01"][place]:.0%}'
      title = f'{policy}, {NAMES.get(method, method)}'
      rows.append([title, when, *cells, below])
  head = ['', '', '20 %', '50 %', '80 %', '95 %', 'below 0.01 nats']
  return table(head, rows)


def by_temperature(scores, which):
  """Scores over seeds by the temperature of forks or others, the other 1."""
  found = {}
  for name in scores[0]:
    low, high = map(float, name.split())
    varied, other = (high, low) if which == 'forks' else (low, high)
    if other == 1:
      found[varied] = [each[name][0] for each in scores]
  return dict(sorted(found.items()))


def decoding(files):
  """Score against either temperature, the other being 1."""
  rows = []
  for (policy, method), runs in files.items():
    each = [
      run['decoding']['scores'] for run in runs.values() if 'decoding' in run
    ]
    if not each:
      continue
    for which in 'forks', 'others':
      cells = by_temperature(each, which).items()
      text = ', '.join(f'{t:g}: {shown(scores)}' for t, scores in cells)
      title = f'{policy}, {NAMES.get(method, method)} ({len(each)})'
      rows.append([title if which == 'forks' else '', which, text])
  return table(['', 'temperature of', 'temperature: score'], rows)


def load():
  found = results.read(STUDY)
  # Clip-higher is the update on all tokens.
  every = results.read('entropy_mechanism')['quickstart/clip_higher']
  return found | {'quickstart/all': every}


def tables():
  found, files = load(), token_files()
  return {
    'headline': headline(found),
    'evolution': evolution(files),
    'percentiles': where(files),
    'decoding': decoding(files),
  }


def figures():
  import matplotlib.pyplot as plt

  found, files = load(), token_files()

  def save(figure, name):
    figure.savefig(HERE / f'{name}.png', dpi=110)
    plt.close(figure)

  colours = dict(zip(NAMES, plt.get_cmap('tab10').colors, strict=False))
  fields = {
    ENTROPY: 'entropy of rollouts, nats',
    'avg@8': 'held-out avg@8',
    'pass@8': 'held-out pass@8',
  }
  figure, axes = plt.subplots(
    2, 3, figsize=(12, 6.2), layout='constrained', sharey='col'
  )
  for row, suffix in zip(axes, ('', '_all_counted'), strict=True):
    for axis, (field, title) in zip(row, fields.items(), strict=True):
      for name, label in NAMES.items():
        named = name if name == 'all' else name + suffix
        if runs := found.get(f'quickstart/{named}'):
          draw_runs(axis, runs, field, colours[name], label)
      counted = 'all tokens counted' if suffix else 'updated ones counted'
      axis.set(title=f'{title}\n{counted}', xlabel='step')
      if field == ENTROPY:
        axis.set_yscale('log')
  for axis in axes[:, 2]:
    axis.legend(loc='lower right', fontsize='x-small')
  save(figure, 'curves')

  figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout='constrained')
  for (policy, method), runs in files.items():
    label = f'{policy}, {NAMES.get(method, method)}'
    each = [run['evolution'] for run in runs.values()]
    step = each[0]['step']
    mean = np.mean([e['overlap_with_base'] for e in each], axis=0)
    (line,) = axes[0].plot(np.array(step) / step[-1], mean, label=label)
    mean = np.mean([e['overlap_with_final'] for e in each], axis=0)
    axes[0].plot(np.array(step) / step[-1], mean, '--', color=line.get_color())
    change = np.mean([e['bins']['change'] for e in each], axis=0)
    axes[1].plot(np.arange(len(change)) * 5 + 2.5, change, '.-', label=label)
    spread = np.mean([e['percentiles'] for e in each], axis=0)
    if policy == 'quickstart' and method == 'all':
      for i, percent in enumerate(each[0]['percents']):
        if percent not in (0, 100):
          axes[2].plot(
            step, np.maximum(spread[:, i], 1e-5), label=f'{percent} %'
          )
    scores = [r['decoding']['scores'] for r in runs.values() if 'decoding' in r]
    if scores:
      for which, style in ('forks', '-'), ('others', '--'):
        at = by_temperature(scores, which)
        y, half = zip(*map(interval, at.values()), strict=True)
        axes[3].errorbar(
          list(at),
          y,
          np.nan_to_num(half),
          ls=style,
          marker='.',
          capsize=2,
          label=f'{policy}: {which}',
        )
  axes[0].set(
    title='overlap of the top 20 %:\n— with the base, – – with the last',
    xlabel='share of training',
  )
  axes[1].set(
    title='change of entropy, nats', xlabel='percentile of base entropy'
  )
  axes[2].set(
    title='percentiles of entropy, nats\n(quickstart, all)',
    yscale='log', xlabel='step',
  )  # fmt: skip
  axes[3].set(
    title='score; the other temperature is 1', xscale='log',
    xlabel='temperature of forks, or of others',
  )  # fmt: skip
  for axis in axes:
    axis.legend(fontsize='x-small')
  save(figure, 'tokens')


if __name__ == '__main__':
  results.present(STUDY, tables(), figures)
