"""Batches of sequences ↔ the fixed rows that go through the policy.

The one place that shifts by one: the hidden state of a token's predecessor
scores it.
"""

from __future__ import annotations

import numpy as np

from jax_rlvr.records import Rows, Tokens


def pack(tokens: Tokens, row_tokens: int, rows: int) -> Rows:
  """Packs a batch, host arrays in, host arrays out.

  Sequences fill rows in their order. Neighbours with the same prompt share its
  tokens while they share a row. A row without mask takes no place.

  Args:
    tokens: B sequences with ids, lengths and mask.
    row_tokens: W; no sequence is longer.
    rows: R; `rows_needed` of them always do.

  Returns:
    R rows of W, the last ones empty where fewer do.

  Raises:
    ValueError: a sequence is longer than a row, or the rows are too few.
  """
  ids, mask, lengths = (
    np.asarray(x) for x in (tokens.ids, tokens.mask, tokens.lengths)
  )
  out = Rows(*np.zeros((6, rows, row_tokens), np.int32))
  out.group[:], out.place[:] = -1, -1
  row, used, group, segment = -1, row_tokens, -1, 0
  prompt, prompt_stop = None, 0
  for b in np.flatnonzero(mask.any(axis=1)):
    start, stop = int(mask[b].argmax()), int(lengths[b])
    if stop > row_tokens:
      raise ValueError(
        f'sequence {b} has {stop} tokens, more than a row of {row_tokens}'
      )
    shared = prompt is not None and np.array_equal(ids[b, :start], prompt)
    needed = stop - start if shared else stop
    if used + needed > row_tokens:
      row, used, group, shared = row + 1, 0, -1, False
      if row == rows:
        raise ValueError(f'the batch does not fit in {rows} rows')
    if not shared:
      prompt, group, segment = ids[b, :start], group + 1, 0
      own = slice(used, used + start)
      out.ids[row, own] = prompt
      out.positions[row, own] = np.arange(start)
      out.group[row, own] = group
      used = prompt_stop = used + start
    segment += 1
    own = slice(used, used + stop - start)
    out.ids[row, own] = ids[b, start:stop]
    out.positions[row, own] = np.arange(start, stop)
    out.group[row, own] = group
    out.segment[row, own] = segment
    out.before[row, own] = np.arange(used, used + stop - start) - 1
    out.before[row, used] = prompt_stop - 1
    out.place[row, own] = np.where(
      mask[b, start:stop], b * ids.shape[1] + np.arange(start, stop), -1
    )
    used += stop - start
  return out


def rows_needed(
  prompts: int, samples: int, max_prompt: int, max_completion: int,
  row_tokens: int,
) -> int:  # fmt: skip
  """Rows that P prompts with G completions each need at the most.

  Every row that a prompt opens takes as many of its completions as fit beside
  it at full length.
  """
  fit = (row_tokens - max_prompt) // max_completion
  return prompts * -(-samples // fit)


def padded(ids: np.ndarray, mask: np.ndarray) -> Rows:
  """Sequences [B, T], padded at the end, as rows of their own."""
  batch, length = ids.shape
  columns = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
  place = np.arange(batch * length, dtype=np.int32).reshape(ids.shape)
  return Rows(
    ids=ids,
    positions=columns,
    group=np.zeros_like(columns),
    segment=np.zeros_like(columns),
    before=np.maximum(columns - 1, 0),
    place=np.where(mask, place, -1),
  )
