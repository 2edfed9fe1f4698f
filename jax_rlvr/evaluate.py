r"""avg@k, unbiased pass@k and maj@k of a policy on held-out prompts.

  python -m jax_rlvr.evaluate --workdir runs/quickstart --samples 8 \
    --json out.json

restores a run's checkpoint by its manifest alone: the recipe is not executed.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from jax_rlvr import checkpoint, prng, rollout
from jax_rlvr import mesh as layouts
from jax_rlvr.actor import Actor, OnProgress, ignore
from jax_rlvr.config import ConfigError, Task
from jax_rlvr.prng import Stream
from jax_rlvr.records import Rollout
from jax_rlvr.sampling import Transform, chain, min_p, top_k, top_p
from jax_rlvr.scoring import Scorers


def run(
  actor: Actor,
  params: Any,
  tasks: Sequence[Task],
  scorers: Scorers,
  *,
  key: jax.Array,
  prompts: int,
  samples: int,
  temperature: float,
  max_completion_tokens: int,
  max_prompt_tokens: int = 1,
  transform: Transform | None = None,
  stop: Sequence[str] = (),
  on_progress: OnProgress = ignore,
) -> tuple[dict[str, float], list[Rollout]]:
  """Evaluates on the first `prompts` prompts of each task's test split.

  Returns:
    `eval/<task>/avg@k` and the like, and the rollouts of all tasks.
  """
  measured, everything = {}, []
  for task in tasks:
    asked = task.prompts('test')
    asked = [asked[i] for i in range(min(prompts, len(asked)))]
    keys = prng.sample_keys(key, range(len(asked)), samples)
    completed = actor.complete(
      params,
      asked,
      keys,
      temperature=temperature,
      max_completion_tokens=max_completion_tokens,
      max_prompt_tokens=max_prompt_tokens,
      transform=transform,
      stop=stop,
      on_progress=on_progress,
    )
    rollouts, failures = rollout.score(completed, scorers)
    scores = metrics(rollouts, samples, getattr(task, 'extract', _text))
    if failures['reward/unscorable']:
      scores['unscorable'] = failures['reward/unscorable']
    measured |= {f'eval/{task.name}/{k}': x for k, x in scores.items()}
    everything += rollouts
  return measured, everything


def metrics(
  rollouts: Sequence[Rollout], samples: int, extract: Callable
) -> dict[str, float]:
  """avg@k, pass@j for powers of two up to k, maj@k; k = samples.

  A completion is right where its reward is 1 or more; an unscorable one is
  wrong.
  """
  groups = [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]
  right = [sum(is_right(r) for r in group) for group in groups]
  powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
  return {
    f'avg@{samples}': _mean(c / samples for c in right),
    **{
      f'pass@{k}': _mean(pass_at(samples, c, k) for c in right) for k in powers
    },
    f'maj@{samples}': _mean(majority(group, extract) for group in groups),
    'entropy': _mean(float(r.entropy.mean()) for r in rollouts),
    'length': _mean(r.completion.length for r in rollouts),
  }


def is_right(r: Rollout) -> bool:
  """Whether a completion earned a full reward."""
  return r.reward is not None and r.reward >= 1


def pass_at(n: int, correct: int, k: int) -> float:
  """Chance that k of n samples, drawn without replacement, hold a right one.

  Reference: Chen et al., `Evaluating Large Language Models Trained on Code
  <https://arxiv.org/abs/2107.03374>`_, 2021.

  >>> pass_at(4, 1, 4), pass_at(4, 1, 1)
  (1.0, 0.25)
  """
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(group: Sequence[Rollout], extract: Callable) -> float:
  """Chance that the answer most samples agree on is right.

  Completions without an answer do not vote; ties are divided evenly.
  """
  votes = collections.defaultdict(list)
  for r in group:
    answer = extract(r.completion)
    if answer is not None:
      votes[answer].append(is_right(r))
  most = max(map(len, votes.values()), default=0)
  winners = [all(rights) for rights in votes.values() if len(rights) == most]
  return _mean(winners) if winners else 0.0


def _text(completion):
  return completion.text.strip() or None


def _mean(values) -> float:
  values = list(values)
  return sum(values) / max(len(values), 1)


def table(measured: dict[str, float]) -> rich.table.Table:
  """One row a task, one column a measure."""
  tasks: dict[str, dict[str, float]] = {}
  for name, value in measured.items():
    if name.startswith('eval/'):
      _, task, measure = name.split('/', 2)
      tasks.setdefault(task, {})[measure] = value
  columns = dict.fromkeys(m for row in tasks.values() for m in row)
  out = rich.table.Table('task', *columns, box=rich.box.SIMPLE, padding=0)
  for task, row in tasks.items():
    out.add_row(task, *(f'{row[m]:.3f}' if m in row else '' for m in columns))
  return out


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m jax_rlvr.evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--step', type=int, help='of the checkpoint; the latest')
  parser.add_argument('--samples', type=int, default=8, help='k')
  parser.add_argument('--prompts', type=int, default=10**9, help='per task')
  parser.add_argument('--temperature', type=float, default=None)
  parser.add_argument('--top_k', type=int, help='draw from that many tokens')
  parser.add_argument('--top_p', type=float, help='draw from that mass')
  parser.add_argument(
    '--min_p',
    type=float,
    help='draw from tokens that likely beside the top one',
  )
  parser.add_argument('--json', type=pathlib.Path, help='where to write scores')
  arguments = parser.parse_args(argv)
  try:
    if arguments.samples < 1:
      raise ConfigError(f'--samples {arguments.samples}: give 1 or more')
    scores = _evaluate(arguments)
  except (ConfigError, ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  rich.console.Console().print(table(scores))
  if arguments.json:
    arguments.json.write_text(json.dumps(scores, indent=2) + '\n')
  return 0


def _evaluate(arguments) -> dict[str, float]:
  saved = checkpoint.read_manifest(arguments.workdir)
  mesh = layouts.make()
  actor = Actor(
    policy=saved.policy,
    tokenizer=saved.tokenizer,
    mesh=mesh,
    slots=saved.sampling['slots'],
    # Runs from before there was a choice.
    dtype=layouts.compute_dtype(
      saved.sampling.get('compute_dtype', 'float32'), mesh
    ),
  )
  params, step = checkpoint.read_params(
    arguments.workdir, saved.policy, mesh, layouts.SAMPLING, arguments.step
  )
  temperature = arguments.temperature
  if temperature is None:
    temperature = saved.sampling['eval_temperature']
  cuts = [
    cut(number)
    for cut, number in (
      (top_k, arguments.top_k),
      (top_p, arguments.top_p),
      (min_p, arguments.min_p),
    )
    if number is not None
  ]
  with Scorers(
    saved.tasks,
    saved.sampling['scorers'],
    saved.sampling['reward_deadline_s'],
  ) as scorers:
    scores, _ = run(
      actor,
      params,
      saved.tasks,
      scorers,
      key=prng.key(saved.sampling['seed'], Stream.EVALUATE, step),
      prompts=arguments.prompts,
      samples=arguments.samples,
      temperature=temperature,
      max_completion_tokens=saved.sampling['max_completion_tokens'],
      transform=chain(*cuts) if cuts else None,
      stop=saved.sampling.get('stop', ()),
    )
  return {'step': step} | scores


if __name__ == '__main__':
  sys.exit(main())
