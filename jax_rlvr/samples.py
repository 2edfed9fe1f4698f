"""A sample of each step's completions, with what the update saw of each token.

`rollouts/<step>.jsonl` of a run directory, one completion a line. Numbers of
tokens are lists as long as `ids`; nats where they are log-probabilities or
entropies.

* `task`, `prompt` (its id), `question` (its last message), `completion`,
  `truncated`, `reward`, `parts`, `advantage`, `ids`;
* `logprob`, `entropy`: the sampler's;
* `inner_step`, from 0, of which what follows was seen, before weights moved:
* `current_logprob`, `current_entropy`, `covariance`;
* `gradient`: the logprob's, as it leaves the chain of filters;
* `filters`: for each tracked filter, in the order of the chain, its name and
  [t, came, left] of the tokens whose logprob gradient it changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_rlvr import storage
from jax_rlvr.records import Rollout, Shown

# Completions of a step, about.
COUNT = 16


class Sample(NamedTuple):
  """A completion that is shown.

  Attributes:
    rollout: itself.
    advantage: in units of reward.
    inner_step: that learnt from it, from 0.
    place: of it in what that inner step shows.
  """

  rollout: Rollout
  advantage: float
  inner_step: int
  place: int


def rows(sequences: int, inner_steps: int, count: int = COUNT) -> list[int]:
  """Which sequences of every inner batch are shown, evenly.

  >>> rows(512, 1, 4), rows(512, 4, 8), rows(3, 1)
  ([0, 128, 256, 384], [0, 64], [0, 1, 2])
  """
  each = sequences // inner_steps
  wanted = min(-(-count // inner_steps), each)
  return [i * each // wanted for i in range(wanted)]


def chosen(
  rollouts: Sequence[Rollout],
  advantages: np.ndarray,
  sequences: int,
  inner_steps: int,
) -> list[Sample]:
  """Those of a step's rollouts that the update shows.

  Args:
    rollouts: of the step; there may be fewer than the update takes.
    advantages: [P, G], of them.
    sequences: B, that the update takes.
    inner_steps: that share them.
  """
  each = sequences // inner_steps
  return [
    Sample(rollouts[number], float(advantages.flat[number]), i, place)
    for i in range(inner_steps)
    for place, row in enumerate(rows(sequences, inner_steps))
    if (number := i * each + row) < len(rollouts)
  ]


def write(
  workdir: storage.Path,
  step: int,
  samples: Sequence[Sample],
  seen: Sequence[Shown],
  filters: Sequence[str],
) -> None:
  """Writes a step's file.

  Args:
    workdir: of the run.
    step: from 1.
    samples: to write.
    seen: by each inner step, host arrays.
    filters: names of `Shown.filters`.
  """
  folder = workdir / 'rollouts'
  folder.mkdir(exist_ok=True)
  with (folder / f'{step:06d}.jsonl').open('w') as file:
    for sample in samples:
      row = _row(sample, seen[sample.inner_step], filters)
      file.write(json.dumps(row) + '\n')


def _row(sample: Sample, seen: Shown, filters: Sequence[str]) -> dict[str, Any]:
  r = sample.rollout
  own = slice(len(r.prompt_ids), len(r.prompt_ids) + len(r.ids))
  changed = {}
  for name, links in zip(filters, seen.filters, strict=True):
    came, left = (x[sample.place, own] for x in links)
    changed[name] = [
      [int(t), *_digits([came[t], left[t]])]
      for t in np.flatnonzero(came != left)
    ]
  return {
    'task': r.prompt.task,
    'prompt': r.prompt.id,
    'question': r.prompt.messages[-1]['content'],
    'completion': r.completion.text,
    'truncated': r.completion.truncated,
    'reward': r.reward,
    'parts': dict(r.parts),
    'advantage': sample.advantage,
    'ids': r.ids.tolist(),
    'logprob': _rounded(r.logprob),
    'entropy': _rounded(r.entropy),
    'inner_step': sample.inner_step,
    'current_logprob': _rounded(seen.logprob[sample.place, own]),
    'current_entropy': _rounded(seen.entropy[sample.place, own]),
    'covariance': _digits(seen.covariance[sample.place, own]),
    'gradient': _digits(seen.gradient[sample.place, own]),
    'filters': changed,
  }


def _rounded(nats: np.ndarray) -> list[float]:
  return [round(float(x), 4) for x in nats]


def _digits(numbers: Sequence[float] | np.ndarray) -> list[float]:
  """With as many digits whatever the size: a mean's gradients are small."""
  return [float(f'{x:.4g}') for x in numbers]


def steps(workdir: storage.Path) -> list[int]:
  """Of which there are samples, ascending."""
  folder = workdir / 'rollouts'
  files = folder.glob('*.jsonl') if folder.exists() else ()
  return sorted(int(file.name.removesuffix('.jsonl')) for file in files)


def read(workdir: storage.Path, step: int) -> Iterator[dict[str, Any]]:
  """The completions of a step; a last line that was cut off is left out."""
  with (workdir / 'rollouts' / f'{step:06d}.jsonl').open() as file:
    for line in file:
      try:
        yield json.loads(line)
      except json.JSONDecodeError:
        return
