"""Tables of README.md, and with --figures its figures (extra: report).

python -m studies.exactness.study --figures
"""

import json
import pathlib

import numpy as np

from jax_rlvr.analysis.entropy_law import ENTROPY
from studies import results
from studies.results import difference, draw, entropy, shown, table

HERE = pathlib.Path(__file__).parent
STUDY = 'exactness'
# The batch's own selection: runs of the other studies.
METHODS = {
  'clip_cov': ('Clip-Cov', 'entropy_mechanism', 'clip_cov'),
  'kl_cov': ('KL-Cov', 'entropy_mechanism', 'kl_cov'),
  'forking_tokens': ('forking tokens', 'forking_tokens', 'top_20'),
}
# 'again' is the batch's own way once more, from the same policy, with other
# prompts and draws: what chance alone does.
CUTS = '16', 'again'
LABELS = {'again': 'the whole batch again'}


def score(run):
  return run.last('avg@8', 3)


def parted(field):
  """Mean |difference| of two runs' curves."""

  def distance(run, other):
    ours, theirs = run.at(field)[1], other.at(field)[1]
    return float(np.abs(ours - theirs).mean())

  return distance


def gradients(policy):
  """One inner batch a policy: tokens and gradients against the batch's."""
  found = json.loads(
    (HERE / 'results' / f'gradients_{policy}.json').read_text()
  )
  rows = []
  for method, (title, *_) in METHODS.items():
    chosen = shown([each[method]['batch']['chosen'] for each in found], 0)
    rows.append([title, 'whole batch', chosen, '', '', ''])
    for cut in '1', '4', '16', 'another draw':
      if cut not in found[0][method]:
        continue
      each = [one[method][cut] for one in found]
      cells = [shown([e['chosen'] for e in each], 0)]
      cells += [
        shown([e[name] for e in each])
        for name in ('shared', 'cosine', 'distance')
      ]
      rows.append(['', cut, *cells])
  head = ['', 'microbatches', 'tokens chosen', 'of the batch’s']
  return table([*head, 'cosine', 'distance / norm'], rows)


def runs_of(found, method, cut):
  suffix = cut and (f'_{cut}' if cut == 'again' else f'_microbatches_{cut}')
  return found[f'quickstart/{method}{suffix}']


def curves(found):
  """Runs at the end, and against the batch's that began as they did."""
  rows = []
  for method, (title, *_) in METHODS.items():
    ours = runs_of(found, method, '')
    for cut in '', *CUTS:
      runs = runs_of(found, method, cut)
      cells = [
        shown([f(run) for run in runs.values()]) for f in (entropy, score)
      ]
      against = [''] * 4
      if cut:
        pairs = [(runs[seed], ours[seed]) for seed in runs]
        against = [
          shown(difference(runs, ours, entropy)),
          shown([parted(ENTROPY)(*pair) for pair in pairs], 3),
          shown(difference(runs, ours, score)),
          shown([parted('avg@8')(*pair) for pair in pairs], 3),
        ]
      where = cut or 'whole batch'
      seeds = str(len(runs))
      rows.append([title if not cut else '', where, seeds, *cells, *against])
  head = ['', 'microbatches', 'seeds', 'entropy, nats', 'avg@8']
  head += ['entropy − batch’s', 'curves apart', 'avg@8 − batch’s']
  return table([*head, 'curves apart'], rows)


def load():
  found = results.read(STUDY)
  for method, (_, study, name) in METHODS.items():
    ours = results.read(study)[f'quickstart/{name}']
    found[f'quickstart/{method}'] = ours
  return found


def tables():
  return {
    'gradients on the quickstart': gradients('quickstart'),
    'gradients on SmolLM2': gradients('smollm2'),
    'curves': curves(load()),
  }


def figures():
  import matplotlib.pyplot as plt

  found = load()
  figure, axes = plt.subplots(
    2, 3, figsize=(12, 6), layout='constrained', sharey='row'
  )
  colours = plt.get_cmap('tab10').colors
  for column, (method, (title, *_)) in zip(
    axes.T, METHODS.items(), strict=True
  ):
    ours = runs_of(found, method, '')
    for colour, cut in zip(colours, CUTS, strict=False):
      runs = runs_of(found, method, cut)
      label = LABELS.get(cut, f'{cut} microbatches')
      for axis, field in zip(column, (ENTROPY, 'avg@8'), strict=True):
        each = [
          run.at(field)[1] - ours[s].at(field)[1] for s, run in runs.items()
        ]
        step, _ = ours[0].at(field)
        draw(axis, step, each, colour, label)
        axis.axhline(0, color='black', lw=0.5)
    column[0].set(title=title)
    column[1].set(xlabel='step')
    column[0].legend(fontsize='small')
  axes[0, 0].set_ylabel('entropy − whole batch’s, nats')
  axes[1, 0].set_ylabel('held-out avg@8 − whole batch’s')
  figure.savefig(HERE / 'curves.png', dpi=110)


if __name__ == '__main__':
  results.present(STUDY, tables(), figures)
