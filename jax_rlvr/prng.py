"""Every random number is a function of (seed, stream, step).

No key is ever checkpointed: a resumed run draws what a straight one would.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import jax
import numpy as np


class Stream(enum.IntEnum):
  """One stream per use. Append only: the numbers are part of every run."""

  INIT = 0
  ORDER = 1
  SAMPLE = 2
  STEP = 3
  WARM_UP = 4
  EVALUATE = 5


def key(seed: int, stream: Stream, step) -> jax.Array:
  """The typed key of a stream at a step; `step` may be traced."""
  root = jax.random.fold_in(jax.random.key(seed), int(stream))
  return jax.random.fold_in(root, step)


def sample_keys(
  key: jax.Array, positions: Sequence[int], samples: int
) -> jax.Array:
  """[P, G] keys: of each prompt by its position, of each sample by its number.

  So a completion does not depend on what is sampled beside it.
  """
  fold = jax.random.fold_in
  of_prompt = jax.vmap(fold, (None, 0))(key, np.array(positions, np.uint32))
  of_sample = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
  return of_sample(of_prompt, np.arange(samples, dtype=np.uint32))
