"""Which prompt is asked at which position of a run.

The order is a function of the seed and the position, so that one integer, the
cursor of the train state, says how far a run has come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Literal

import grain
import numpy as np

from jax_rlvr.config import ConfigError
from jax_rlvr.records import Prompt


def stream(
  sources: Sequence[Sequence[Prompt]], seed: int, weights: Sequence[float] = ()
) -> grain.MapDataset[Prompt]:
  """All prompts of the sources, shuffled and repeated: stream[i] for any i ≥ 0.

  Without weights the sources are one: each prompt comes once before any comes
  again, in a new order every time. With weights that holds for each source by
  itself, and the sources take turns.

  Args:
    sources: prompts, of each task.
    seed: of the order.
    weights: how often each source is asked, > 0, one a source. They are kept to
      a hundredth of the smallest, in any long enough stretch of the stream.

  Raises:
    ValueError: weights that are none, or an empty source.
  """
  empty = [i for i, prompts in enumerate(sources) if not len(prompts)]
  if empty or not sources:
    raise ValueError(f'no prompts in sources {empty} of {len(sources)}')
  if not len(weights):
    prompts = [prompt for source in sources for prompt in source]
    return grain.MapDataset.source(prompts).seed(seed).shuffle().repeat()
  if len(weights) != len(sources):
    raise ValueError(
      f'{len(weights)} weights for {len(sources)} sources; give one each'
    )
  if not all(np.isfinite(weight) and weight > 0 for weight in weights):
    raise ValueError(f'weights={tuple(weights)!r}; give numbers above 0')
  mixed = []
  for i, source in enumerate(sources):
    # Epochs are seeded one after the other: seeds that lie apart, lest one
    # source come in the order that another of its size had an epoch before.
    own = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
    mixed.append(grain.MapDataset.source(source).shuffle(seed=own).repeat())
  return grain.MapDataset.mix(mixed, weights=list(weights))


def fitting(
  prompts: Sequence[Prompt],
  render: Callable[[Prompt], Sized],
  limit: int,
  when_long: Literal['refuse', 'drop'],
) -> tuple[Sequence[Prompt], list[tuple[str, int]]]:
  """Prompts of at most `limit` tokens, and what became of the others.

  Args:
    prompts: of one task.
    render: the tokens of a prompt.
    limit: max_prompt_tokens.
    when_long: 'refuse' raises at the first prompt that is longer; 'drop' leaves
      such prompts out.

  Returns:
    The prompts kept; and (id, tokens) of each that was left out.

  Raises:
    ConfigError: a prompt is longer and refused, or none is left.
  """
  kept, dropped = [], []
  for prompt in prompts:
    length = len(render(prompt))
    if length <= limit:
      kept.append(prompt)
    elif when_long == 'drop':
      dropped.append((prompt.id, length))
    else:
      raise ConfigError(
        f'prompt {prompt.id!r} of task {prompt.task!r} has {length} tokens, '
        f'more than max_prompt_tokens={limit}; raise it, or leave such prompts '
        "out with long_prompts='drop'"
      )
  if dropped and not kept:
    shortest = min(length for _, length in dropped)
    raise ConfigError(
      f'all {len(dropped)} prompts of task {prompts[0].task!r} have more than '
      f'max_prompt_tokens={limit} tokens, the shortest {shortest}; raise it'
    )
  return kept, dropped
