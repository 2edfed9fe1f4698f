r"""Where the entropy sits, what training does to it, and decoding by it.

  python -m studies.forking_tokens.tokens quickstart.all.0 \
    --on quickstart --run runs/quickstart/clip_higher/0

writes `results/tokens.quickstart.all.0.json`: the entropies of held-out
completions of the last policy under each checkpoint that was kept, and, with
--decode, scores of the run's policy where forks and other tokens are drawn at
temperatures of their own.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np

import jax_rlvr
from jax_rlvr import config
from jax_rlvr.analysis import forking
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.sampling import entropy_temperature
from studies import asking

HERE = pathlib.Path(__file__).parent
PERCENTS = 0, 20, 40, 50, 60, 80, 90, 95, 99, 100
TEMPERATURES = 0.05, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0


def evolution(policies, steps, ids, made, more_than) -> dict:
  """§4 of the paper: one set of texts under all checkpoints, base first."""
  texts = asking.texts(ids, made)
  entropies = [forking.entropies(policy, texts) for policy in policies]
  with_base, with_final = forking.evolution(entropies, texts.mask)
  base, final = entropies[0], entropies[-1]
  bins = forking.change_by_percentile(base, final, texts.mask)
  ranked = forking.ranked(texts.ids[texts.mask], base[texts.mask], more_than)

  def words(order):
    tokenizer = policies[-1].tokenizer
    return [
      [forking.written(tokenizer, int(ranked.ids[i])), float(ranked.entropy[i])]
      for i in list(range(len(ranked.ids)))[order][:8]
    ]

  return {
    'tokens': int(texts.mask.sum()),
    'step': list(steps),
    'overlap_with_base': with_base.tolist(),
    'overlap_with_final': with_final.tolist(),
    'percents': PERCENTS,
    'percentiles': [
      forking.percentiles(e[texts.mask], PERCENTS).tolist() for e in entropies
    ],
    'share_below_0.01': [forking.share_below(e[texts.mask]) for e in entropies],
    'bins': {name: x.tolist() for name, x in bins._asdict().items()},
    'highest': words(slice(None)),
    'lowest': words(slice(None, None, -1)),
  }


def decoding(policy, task, prompts, c, nats, temperatures) -> dict:
  """Eq. 5, Fig. 3: one of the two temperatures varies, the other is 1."""
  (threshold,) = forking.percentiles(nats, [80])
  scores = {}
  for which in 'low', 'high':
    for temperature in temperatures:
      both = {'low': 1.0, 'high': 1.0} | {which: temperature}
      name = '{low:g} {high:g}'.format(**both)
      if name not in scores:
        _, _, rewards = asking.ask(
          policy, task, prompts, c.eval_samples, c.max_completion_tokens,
          seed=1, transform=entropy_temperature(**both, threshold=threshold),
        )  # fmt: skip
        each = rewards.mean(1)
        error = each.std(ddof=1) / np.sqrt(len(each))
        scores[name] = [float(each.mean()), float(error)]
        print(name, *scores[name])
  return {'threshold': float(threshold), 'scores': scores}


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m studies.forking_tokens.tokens',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('name')
  parser.add_argument('--on', default='quickstart')
  parser.add_argument('--run', type=pathlib.Path, required=True)
  parser.add_argument('--decode', action='store_true')
  parser.add_argument('--decode_step', type=int)
  parser.add_argument(
    '--temperatures', type=float, nargs='+', default=TEMPERATURES
  )
  arguments = parser.parse_args()

  c = config.load(f'studies/setting.py:on={arguments.on}').config
  task = c.tasks[0]
  prompts = task.prompts('test')[: c.eval_prompts]
  steps = sorted(Checkpoints(arguments.run / 'checkpoints').steps())
  policies = [jax_rlvr.load_policy(arguments.run, step) for step in steps]
  few = prompts[: 256 if arguments.on == 'quickstart' else 64]
  ids, made, _ = asking.ask(policies[-1], task, few, 4, c.max_completion_tokens)
  found = {'evolution': evolution(policies, steps, ids, made, 20)}
  if arguments.decode:
    decoded = policies[-1]
    if arguments.decode_step is not None:
      decoded = policies[steps.index(arguments.decode_step)]
      _, made, _ = asking.ask(decoded, task, few, 4, c.max_completion_tokens)
    nats = np.concatenate([m.entropies for group in made for m in group])
    found['decoding'] = decoding(
      decoded, task, prompts, c, nats, arguments.temperatures
    )
  file = HERE / 'results' / f'tokens.{arguments.name}.json'
  file.parent.mkdir(exist_ok=True)
  file.write_text(json.dumps(found) + '\n')


if __name__ == '__main__':
  main()
