"""How a sampler that knows only whole batches is asked for completions."""

from collections.abc import Iterator, Sequence

import numpy as np


def batches(
  prompts: np.ndarray, samples: int, lengths: Sequence[int], slots: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Prompts of each batch, a row a completion, and its longest completion."""
  rows = np.repeat(prompts, samples, axis=0)
  for start in range(0, len(rows), slots):
    stop = start + slots
    yield rows[start:stop], max(lengths[start:stop])
