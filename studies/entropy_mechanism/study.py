"""Tables of README.md, and with --figures its figures (extra: report).

python -m studies.entropy_mechanism.study --figures
"""

import pathlib

import numpy as np

from jax_rlvr.analysis import covariance, entropy_law
from studies import results
from studies.results import difference, draw_runs, entropy, shown, table

HERE = pathlib.Path(__file__).parent
STUDY = 'entropy_mechanism'
ENTROPY = entropy_law.ENTROPY
NAMES = {
  'grpo': 'GRPO',
  'clip_higher': 'clip-higher',
  'clip_cov': 'Clip-Cov',
  'kl_cov': 'KL-Cov',
  'clip_cov_1e-1': 'Clip-Cov, 0.1',
  'kl_cov_2e-1': 'KL-Cov, 0.2',
}
# Of an evaluation there: its scores, and how many of the last ones are averaged
# because one of them is too noisy.
SCORES = {
  'quickstart': ('avg@8', 'pass@8', 3),
  'smollm2': ('avg@4', 'pass@4', 1),
}
KNOBS = {
  'Clip-Cov, fraction': {
    '3e-3': 'clip_cov_3e-3',
    '1e-2': 'clip_cov',
    '3e-2': 'clip_cov_3e-2',
    '1e-1': 'clip_cov_1e-1',
  },
  'KL-Cov, fraction': {
    '5e-3': 'kl_cov_5e-3',
    '2e-2': 'kl_cov',
    '6e-2': 'kl_cov_6e-2',
    '2e-1': 'kl_cov_2e-1',
  },
  'KL-Cov, coef': {
    '0': 'kl_cov_2e-2_coef_0.0',
    '0.1': 'kl_cov_2e-2_coef_0.1',
    '0.5': 'kl_cov_2e-2_coef_0.5',
    '1': 'kl_cov',
    '2': 'kl_cov_2e-2_coef_2.0',
    '10': 'kl_cov_2e-2_coef_10.0',
  },
  'GRPO, entropy bonus': {
    '0': 'grpo',
    '1e-3': 'bonus_1e-3',
    '5e-3': 'bonus_5e-3',
    '1e-2': 'bonus_1e-2',
    '5e-2': 'bonus_5e-2',
    '2e-1': 'bonus_2e-1',
  },
  'GRPO, reference KL': {
    '0': 'grpo',
    '1e-3': 'kl_1e-3',
    '1e-2': 'kl_1e-2',
    '5e-2': 'kl_5e-2',
    '1e-1': 'kl_1e-1',
  },
}


def score(policy, which=0):
  *names, count = SCORES[policy]
  return lambda run: run.last(names[which], count)


def headline(found, policy):
  """Methods at the end of training, and against GRPO of the same seed."""
  single, several, _ = SCORES[policy]
  grpo, rows = found[f'{policy}/grpo'], []
  for name, title in NAMES.items():
    runs = found.get(f'{policy}/{name}', {})
    if not runs:
      continue
    cells = [
      shown([f(run) for run in runs.values()])
      for f in (entropy, score(policy), score(policy, 1))
    ]
    against = ['', '', '']
    if name != 'grpo':
      against = [
        shown(difference(runs, grpo, f)) for f in (entropy, score(policy))
      ]
      against.append(shown(above_law(runs, grpo, policy)))
    rows.append([title, str(len(runs)), *cells, *against])
  head = ['', 'seeds', 'entropy, nats', single, several]
  head += ['entropy − GRPO’s', f'{single} − GRPO’s', 'above GRPO’s law']
  return table(head, rows)


def above_law(runs, grpo, policy):
  """Score over what GRPO's law of the seed gives at the same entropy.

  Means over the latter half of the evaluations: of equal entropies, not of
  equal steps.
  """
  found = []
  for seed in sorted(set(runs) & set(grpo)):
    law = entropy_law.fit(*points(grpo[seed], policy)[1:])
    _, nats, right = points(runs[seed], policy)
    latter = slice(len(nats) // 2, None)
    found.append(float((right - law.score(nats))[latter].mean()))
  return found


def chosen(found):
  """Which tokens are chosen, in the first and the last tenth of the steps."""
  rows = []
  for policy in SCORES:
    for name in 'clip_cov', 'kl_cov', 'clip_cov_1e-1', 'kl_cov_2e-1':
      runs = found.get(f'{policy}/{name}', {})
      kind = '_'.join(name.split('_')[:2])
      cells = []
      for what in 'selected', 'below_mean', 'probability':
        each = [run.at(f'filters/{kind}/{what}')[1] for run in runs.values()]
        for part in slice(0, 0.1), slice(0.9, 1):
          ends = [cut(x, part) for x in each]
          cells.append(f'{np.mean(ends):.2g}' if ends else '')
      if runs:
        pairs = [' → '.join(cells[i : i + 2]) for i in (0, 2, 4)]
        rows.append([f'{policy}, {NAMES[name]}', *pairs])
  head = ['first → last tenth of the steps', 'share of all tokens']
  return table([*head, 'worse than average', 'their probability'], rows)


def cut(x, part):
  """Mean of a share of a curve, of one step at the least."""
  start, stop = (round(edge * len(x)) for edge in (part.start, part.stop))
  start = min(start, len(x) - 1)
  return x[start : max(stop, start + 1)].mean()


def knobs(found):
  """One seed each: what each knob does to entropy and score."""
  rows = []
  for title, values in KNOBS.items():
    runs = {
      v: found.get(f'quickstart/{name}', {}) for v, name in values.items()
    }
    runs = {v: run[0] for v, run in runs.items() if 0 in run}
    for what, f in ('entropy', entropy), ('avg@8', score('quickstart')):
      cells = [f'{v}: {f(run):.2f}' for v, run in runs.items()]
      rows.append([title if what == 'entropy' else '', what, ', '.join(cells)])
  return table(['knob', '', 'value: at the end'], rows)


def points(run, policy):
  # Of few evaluations the last is not to be lost, which has no rollouts after.
  return entropy_law.pairs(
    run.rows, run.evaluations, held_out=policy == 'smollm2'
  )


def law(found, policy, share):
  """The law of each method's runs, and what their beginnings predict."""
  rows = []
  for name, title in NAMES.items():
    for seed, run in sorted(found.get(f'{policy}/{name}', {}).items()):
      step, nats, right = points(run, policy)
      fitted = entropy_law.fit(nats, right)
      low, high = fitted.band(0.0)
      cells = [f'{fitted.a:.3f}', f'{fitted.b:.3f}', f'{fitted.line.r2:.3f}']
      early = entropy_law.forecast(step, nats, right, share)
      rows.append(
        [
          title,
          str(seed),
          *cells,
          f'{fitted.ceiling:.2f} [{low:.2f}, {high:.2f}]',
          str(early.fitted),
          f'{early.rmse:.3f}',
          f'{early.final_error:.3f}',
        ]
      )
  head = ['', 'seed', 'a', 'b', 'R²', 'ceiling [95 %]']
  return table([*head, 'fitted first', 'RMSE of the rest', 'last one'], rows)


def on_policy(found):
  """Correlation of covariance and fall of entropy, step by step."""
  rows = []
  for seed, run in sorted(found.get('quickstart/on_policy', {}).items()):
    for name in 'covariance/prompts', 'covariance/mean':
      changes = covariance.changes(run.rows, name)
      low, high = fisher(changes.correlation, len(changes.step))
      smooth = np.corrcoef(
        *(blocks(x) for x in (changes.covariance, changes.fall))
      )[0, 1]
      rows.append(
        [
          str(seed),
          'by prompt' if name.endswith('prompts') else 'by token',
          f'{changes.correlation:.2f} [{low:.2f}, {high:.2f}]',
          f'{smooth:.2f}',
          f'{(changes.covariance > 0).mean():.0%}',
        ]
      )
  head = ['seed', 'covariance', 'correlation, by step [95 %]']
  return table([*head, 'of means over 8 steps', 'steps where it is > 0'], rows)


def blocks(x, size=8):
  return x[: len(x) // size * size].reshape(-1, size).mean(1)


def fisher(correlation, count):
  """95 % interval of a correlation, by Fisher's transformation."""
  half = 1.96 / np.sqrt(count - 3)
  return np.tanh(np.arctanh(correlation) + np.array([-half, half]))


def tables():
  found = results.read(STUDY)
  return {
    'headline on the quickstart': headline(found, 'quickstart'),
    'headline on SmolLM2': headline(found, 'smollm2'),
    'chosen tokens': chosen(found),
    'knobs': knobs(found),
    'law on the quickstart': law(found, 'quickstart', 0.15),
    'law on SmolLM2': law(found, 'smollm2', 0.5),
    'on-policy': on_policy(found),
  }


def figures():
  import matplotlib.pyplot as plt

  found = results.read(STUDY)
  colours = dict(zip(NAMES, plt.get_cmap('tab10').colors, strict=False))

  def save(figure, name):
    figure.savefig(HERE / f'{name}.png', dpi=110)
    plt.close(figure)

  figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout='constrained')
  for row, (policy, (single, several, _)) in zip(
    axes, SCORES.items(), strict=True
  ):
    fields = {ENTROPY: 'entropy of rollouts, nats', single: '', several: ''}
    for axis, (field, title) in zip(row, fields.items(), strict=True):
      for name, title_of in NAMES.items():
        if runs := found.get(f'{policy}/{name}'):
          draw_runs(axis, runs, field, colours[name], title_of)
      what = title or f'held-out {field}'
      axis.set(title=f'{policy}: {what}', xlabel='step')
      if field == ENTROPY:
        axis.set_yscale('log')
    row[1].legend()
  save(figure, 'curves')

  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
  for axis, policy in zip(axes, SCORES, strict=True):
    for name, title in NAMES.items():
      runs = found.get(f'{policy}/{name}', {})
      for seed, run in sorted(runs.items()):
        _, nats, right = points(run, policy)
        label = title if seed == min(runs) else None
        axis.plot(
          np.exp(nats), right, '.', color=colours[name], label=label,
          alpha=0.7,
        )  # fmt: skip
    for run in found[f'{policy}/grpo'].values():
      _, nats, right = points(run, policy)
      fitted = entropy_law.fit(nats, right)
      grid = np.linspace(0, nats.max(), 100)
      low, high = fitted.band(grid)
      axis.plot(np.exp(grid), fitted.score(grid), color=colours['grpo'])
      axis.fill_between(
        np.exp(grid), low, high, color=colours['grpo'], alpha=0.15
      )
    axis.set(
      title=f'{policy}: GRPO’s law of each seed',
      xlabel='e^entropy', ylabel=f'held-out {SCORES[policy][0]}',
    )  # fmt: skip
    axis.legend()
  save(figure, 'law')

  figure, axes = plt.subplots(
    2, len(KNOBS), figsize=(16, 5.6), layout='constrained', sharey='row'
  )
  for column, (title, values) in zip(axes.T, KNOBS.items(), strict=True):
    shades = plt.get_cmap('viridis')(np.linspace(0, 0.9, len(values)))
    for shade, (value, name) in zip(shades, values.items(), strict=True):
      if run := found.get(f'quickstart/{name}', {}).get(0):
        column[0].plot(*run.at(ENTROPY), color=shade, label=value)
        column[1].plot(*run.at('avg@8'), color=shade)
    column[0].set(title=title, yscale='log')
    column[0].legend(fontsize='small')
    column[1].set(xlabel='step')
  axes[0, 0].set_ylabel('entropy, nats')
  axes[1, 0].set_ylabel('held-out avg@8')
  save(figure, 'knobs')

  runs = found.get('quickstart/on_policy', {})
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout='constrained')
  for seed, run in sorted(runs.items()):
    changes = covariance.changes(run.rows)
    x, y = blocks(changes.covariance), blocks(changes.fall)
    axes[1].plot(x, y, '.', label=f'seed {seed}')
    if seed == 0:
      at = blocks(changes.step)
      twin = axes[0].twinx()
      (one,) = axes[0].plot(at, x, color='tab:blue', label='covariance')
      (two,) = twin.plot(at, y, color='tab:orange', label='−ΔH a step, nats')
      axes[0].legend(handles=[one, two])
      axes[0].set(title='seed 0, means over 8 steps', xlabel='step')
  axes[1].set(
    xlabel='covariance by prompt, Eq. 8–9', ylabel='−ΔH a step, nats',
    title='strictly on-policy, means over 8 steps',
  )  # fmt: skip
  axes[1].legend()
  save(figure, 'covariance')


if __name__ == '__main__':
  results.present(STUDY, tables(), figures)
