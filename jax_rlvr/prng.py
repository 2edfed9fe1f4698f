"""Every random number is a function of (seed, stream, step).

No key is ever checkpointed: a resumed run draws what a straight one would.
"""

import enum

import jax


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
