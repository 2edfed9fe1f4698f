"""Draws curves.png from the metrics of the runs (extra: report).

python studies/smollm2/plot.py runs/smollm2 runs/smollm2_clip_cov
"""

import pathlib
import sys

import matplotlib.pyplot as plt

from jax_rlvr.metrics import read

PANELS = {
  'reward on training prompts': ('metrics.jsonl', 'reward/mean'),
  'entropy, nats a token': ('metrics.jsonl', 'entropy/token_mean'),
  'held-out pass@1': ('eval.jsonl', 'eval/arithmetic/pass@1'),
  'held-out pass@8': ('eval.jsonl', 'eval/arithmetic/pass@8'),
}


def main():
  figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout='constrained')
  for axis, (title, (file, name)) in zip(axes, PANELS.items(), strict=True):
    for run in map(pathlib.Path, sys.argv[1:]):
      rows = read(run / file)
      steps, values = zip(*((r['step'], r[name]) for r in rows), strict=True)
      axis.plot(steps, values, marker='.', label=run.name)
    axis.set(title=title, xlabel='step')
    axis.set_ylim(bottom=0)
  axes[0].legend()
  figure.savefig(pathlib.Path(__file__).with_name('curves.png'), dpi=110)


if __name__ == '__main__':
  main()
