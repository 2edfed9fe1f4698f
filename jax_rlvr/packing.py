"""Batches of sequences ↔ the fixed rows that go through the policy.

The one place that shifts by one: the hidden state of a token's predecessor
scores it.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from jax_rlvr.records import Rows, Tokens


class Group(NamedTuple):
  """Completions that share their prompt's tokens where they share a row.

  Attributes:
    silent: none of them has an advantage.
    prompt: its tokens.
    lengths: tokens of each completion, decreasing.
    members: which sequences of the batch they are.
  """

  silent: bool
  prompt: int
  lengths: list[int]
  members: list[int]


# Of one row: its groups, and which of their completions are there.
Content = dict[int, list[int]]


def pack(
  tokens: Tokens,
  row_tokens: int,
  rows: int,
  shards: int = 1,
  share_prompts: bool = True,
  own: Sequence[int] | None = None,
) -> Rows:
  """Packs a batch, host arrays in, host arrays out.

  Best-fit decreasing, a group at a time: each completion goes to the fullest
  row with room for it where its prompt is, else to the fullest with room for
  both, else to a new one. Groups without any advantage come last: they fill
  gaps, and rows of nothing else have no gradient to compute. A sequence without
  mask takes no place.

  Rows lie in `shards` equal blocks, filled rows first. Row i is about as much
  work in every block, and blocks differ by one at the most in filled rows and
  in rows with an advantage. What shares a row does not depend on the order of
  the batch; where sizes are equal, `tokens.serial` decides.

  Args:
    tokens: B sequences with ids, lengths and mask.
    row_tokens: W; no sequence is longer.
    rows: R, a multiple of shards; `rows_needed` of them always do.
    shards: parts in which the rows will be cut.
    share_prompts: completions of a prompt share its tokens where they share a
      row. Else each sequence is a group of its own and all of it segment 0, so
      that a token sees just the past of its group.
    own: shards whose rows are made, ascending; all if None.

  Raises:
    ValueError: a sequence is longer than a row, or the rows are too few.
  """
  if rows % shards:
    raise ValueError(f'{rows=} is no multiple of {shards=}')
  groups = _groups(tokens, row_tokens, share_prompts)
  # Either may need fewer rows; where none does, whole groups repeat less.
  contents = min(
    (_best_fit(groups, row_tokens, whole) for whole in (True, False)), key=len
  )
  if len(contents) > rows:
    raise ValueError(f'the batch does not fit in {rows} rows')
  contents.sort(key=lambda content: _work(groups, content), reverse=True)
  own = range(shards) if own is None else own
  each = rows // shards
  out = Rows(*np.zeros((6, len(own) * each, row_tokens), np.int32))
  out.group[:], out.place[:] = -1, -1
  for i, content in enumerate(contents):
    turn, shard = divmod(i, shards)
    # To and fro, or the first shard would have the most work every time.
    shard = shards - 1 - shard if turn % 2 else shard
    if shard in own:
      row = Rows(*(x[own.index(shard) * each + turn] for x in out))
      _write(row, tokens, groups, content, share_prompts)
  return out


def rows_needed(
  prompts: int,
  samples: int,
  max_prompt: int,
  max_completion: int,
  row_tokens: int,
  shards: int = 1,
  share_prompts: bool = True,
) -> int:
  """Rows that P prompts with G completions each need at the most.

  `pack` keeps within the smaller of two bounds, where a number "fits" at full
  length. A group opens a row only when those it opened before have no room for
  its next completion: all but its last hold as many as fit beside one prompt.
  And where groups may be split, a row is opened only when no other has room for
  the sequence: all but the last hold as many sequences as fit.
  """
  fit = row_tokens // (max_prompt + max_completion)
  needed = -(-prompts * samples // fit)
  if share_prompts:
    fit = (row_tokens - max_prompt) // max_completion
    needed = min(needed, prompts * -(-samples // fit))
  return -(-needed // shards) * shards


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


def _groups(tokens: Tokens, row_tokens: int, share: bool) -> list[Group]:
  """In the order in which they find their rows."""
  ids, mask, stops, advantage = (
    np.asarray(x)
    for x in (tokens.ids, tokens.mask, tokens.lengths, tokens.advantage)
  )
  serial = np.arange(len(ids)) if tokens.serial is None else tokens.serial[:, 0]
  starts = mask.argmax(axis=1)
  lengths = stops - starts
  found: dict[Hashable, list[int]] = {}
  for b in np.lexsort((serial, -lengths)).tolist():
    if not mask[b, starts[b]]:
      continue
    if stops[b] > row_tokens:
      raise ValueError(
        f'sequence {b} has {stops[b]} tokens, more than a row of {row_tokens}'
      )
    prompt = ids[b, : starts[b]].tobytes()
    found.setdefault(prompt if share else b, []).append(b)
  silent = ~(advantage != 0).any(axis=1)
  groups = [
    Group(
      silent=bool(silent[members].all()),
      prompt=int(starts[members[0]]),
      lengths=lengths[members].tolist(),
      members=members,
    )
    for members in found.values()
  ]

  def rank(group: Group):
    total = group.prompt + sum(group.lengths)
    first = int(serial[group.members[0]])
    return group.silent, -total, group.prompt, group.lengths, first

  return sorted(groups, key=rank)


def _best_fit(
  groups: list[Group], row_tokens: int, whole: bool
) -> list[Content]:
  """Rows of at most `row_tokens`.

  If `whole`, what is left of a group stays together where a row can hold it.
  """
  contents: list[Content] = []
  opened: list[tuple[int, int]] = []  # (room, row), in order.
  for g, group in enumerate(groups):
    mine: list[tuple[int, int]] = []  # Of those, where its prompt is.
    rest = group.prompt + sum(group.lengths)
    for j, length in enumerate(group.lengths):
      needed = length
      found = _fullest(mine, needed)
      if found is None:
        needed += group.prompt
        together = whole and rest <= row_tokens
        found = _fullest(opened, rest if together else needed)
      if found is None:
        found = row_tokens, len(contents)
        contents.append({})
      room, row = found
      contents[row].setdefault(g, []).append(j)
      bisect.insort(mine, (room - needed, row))
      rest -= length
    for room_and_row in mine:
      bisect.insort(opened, room_and_row)
  return contents


def _fullest(
  rows: list[tuple[int, int]], needed: int
) -> tuple[int, int] | None:
  """Takes the row with the least room that is enough out of the list."""
  i = bisect.bisect_left(rows, (needed,))
  return rows.pop(i) if i < len(rows) else None


def _work(groups: list[Group], content: Content) -> tuple[bool, int]:
  """Whether a row has any advantage, and the pairs of tokens in attention."""
  pairs = 0
  for g, chosen in content.items():
    prompt = groups[g].prompt
    pairs += prompt * (prompt + 1)
    for j in chosen:
      length = groups[g].lengths[j]
      pairs += length * (2 * prompt + length + 1)
  return not all(groups[g].silent for g in content), pairs // 2


def _write(
  row: Rows, tokens: Tokens, groups: list[Group], content: Content, share: bool
) -> None:
  """Fills one row: each prompt, then its completions."""
  ids, mask = np.asarray(tokens.ids), np.asarray(tokens.mask)
  used = 0
  for number, (g, chosen) in enumerate(content.items()):
    _, start, lengths, members = groups[g]
    prompt_stop = used + start
    prompt = slice(used, prompt_stop)
    row.ids[prompt] = ids[members[0], :start]
    row.positions[prompt] = np.arange(start)
    used = prompt_stop
    for segment, j in enumerate(chosen, 1):
      b, stop = members[j], start + lengths[j]
      own = slice(used, used + lengths[j])
      row.ids[own] = ids[b, start:stop]
      row.positions[own] = np.arange(start, stop)
      row.segment[own] = segment if share else 0
      row.before[own] = np.arange(used, own.stop) - 1
      row.before[used] = prompt_stop - 1
      places = np.arange(b * ids.shape[1] + start, b * ids.shape[1] + stop)
      row.place[own] = np.where(mask[b, start:stop], places, -1)
      used = own.stop
    row.group[prompt.start : used] = number
