"""What run directories say, packed for the page: see `assets/data.js`.

Numbers of tokens are columns over all samples of a run, the rest is JSON.
"""

from __future__ import annotations

import collections
import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_rlvr import metrics, samples, storage
from jax_rlvr import tokenizer as tokenizers
from jax_rlvr.analysis import entropy_law
from jax_rlvr.config import ConfigError
from jax_rlvr.tokenizer import Tokenizer

# Beyond these a curve has more points than a screen, and a step more tokens
# than a page.
POINTS = 1_000
LEAST_STEPS = 16


def read(workdir: storage.Path, max_tokens: int) -> dict[str, Any]:
  """A run, with the columns of its samples as arrays.

  Args:
    workdir: of the run.
    max_tokens: in the samples: if there are more, steps are left out evenly,
      and at last the ends of completions.

  Raises:
    ConfigError: the directory holds no run, or one that has no step yet.
  """
  rows, scores = metrics.logged(workdir)
  if not rows:
    missing = 'no step is logged yet' if workdir.exists() else 'no such folder'
    raise ConfigError(f'{workdir} holds no run: {missing}')
  return {
    'name': workdir.name,
    'recipe': _recipe(workdir),
    'steps': rows[-1]['step'],
    'metrics': series(rows),
    'scores': series(scores),
    'law': law(rows, scores),
    'samples': _samples(workdir, max_tokens),
  }


def _recipe(workdir: storage.Path) -> str:
  file = workdir / 'manifest.json'
  run = json.loads(file.read_text()).get('run') if file.exists() else None
  if not run:
    return ''
  given = ', '.join(f'{k}={v}' for k, v in run['overrides'].items())
  return f'{run["recipe"]}: {given}' if given else run['recipe']


def series(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  """Columns of JSONL rows; means of neighbours where there are many.

  Returns:
    `step`, and `values`: a list as long for each name, None where a row has no
    such number or no finite one.
  """
  width = -(-len(rows) // POINTS)
  groups = [rows[i : i + width] for i in range(0, len(rows), width)]
  names = dict.fromkeys(name for row in rows for name in row if name != 'step')

  def mean(group, name):
    found = [row[name] for row in group if name in row]
    value = sum(found) / len(found) if found else math.nan
    return float(f'{value:.5g}') if math.isfinite(value) else None

  return {
    'step': [group[-1]['step'] for group in groups],
    'values': {name: [mean(group, name) for group in groups] for name in names},
  }


def law(
  rows: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
  """The entropy law of a run with its 95 % band; None of too few points."""
  points = entropy_law.pairs(rows, scores)
  try:
    found = entropy_law.fit(points.entropy, points.score)
    entropies = np.linspace(0, 1.05 * points.entropy.max(), 64)
    low, high = found.band(entropies)
  except ValueError:
    return None
  try:
    early = entropy_law.forecast(*points)
    forecast = {'points': early.fitted, 'rmse': early.rmse,
                'ceiling': early.law.ceiling}  # fmt: skip
  except ValueError:
    forecast = None
  columns = [*points, entropies, found.score(entropies), low, high]
  step, entropy, score, *curves = (
    [float(f'{x:.5g}') for x in column] for column in columns
  )
  return {
    'a': found.a, 'b': found.b, 'ceiling': found.ceiling,
    'step': step, 'entropy': entropy, 'score': score,
    'curve': curves, 'forecast': forecast,
  }  # fmt: skip


def _samples(workdir: storage.Path, max_tokens: int) -> dict[str, Any] | None:
  """Completions by step, and columns of their tokens, end to end."""
  tokenizer = _tokenizer(workdir)
  steps = samples.steps(workdir)
  if not steps or not (last := _completions(workdir, steps[-1])):
    return None
  each = sum(len(row['ids']) for row in last)
  steps = _evenly(steps, max(max_tokens // each, LEAST_STEPS))
  kept = {step: _completions(workdir, step) for step in steps}
  total = sum(len(row['ids']) for rows in kept.values() for row in rows)
  count = sum(map(len, kept.values()))
  limit = max_tokens // max(count, 1) if total > max_tokens else total
  pieces: dict[str, int] = {}
  numbers, shown = [], []
  for step in steps:
    scaled = _scaled(kept[step])
    for row in kept[step]:
      n = min(len(row['ids']), limit)
      texts = _pieces(tokenizer, row['ids'][:n])
      columns = _columns(row, scaled)
      columns['id'] = np.array(row['ids'], np.uint32)
      numbers.append(
        {name: x[:n] for name, x in columns.items()}
        | {
          'piece': np.array(
            [pieces.setdefault(text, len(pieces)) for text in texts], np.uint32
          )
        }
      )
      shown.append({'step': step, 'tokens': n} | _facts(row, tokenizer))
  names = dict.fromkeys(name for columns in numbers for name in columns)
  # What a run has known only since it went on is unknown before.
  unknown = [np.full(row['tokens'], np.nan) for row in shown]
  return {
    'steps': steps,
    'rows': shown,
    'pieces': list(pieces),
    'columns': {
      name: np.concatenate(
        [x.get(name, nan) for x, nan in zip(numbers, unknown, strict=True)]
      )
      for name in names
    },
  }


def _completions(workdir: storage.Path, step: int) -> list[dict[str, Any]]:
  """Those of a step that have tokens; the oldest runs tell of none."""
  return [row for row in samples.read(workdir, step) if row.get('ids')]


def _tokenizer(workdir: storage.Path) -> Tokenizer | None:
  if not (workdir / 'tokenizer').exists():
    return None
  with storage.local_copy(workdir / 'tokenizer') as folder:
    return tokenizers.load(folder)


def _evenly(steps: Sequence[int], count: int) -> list[int]:
  """At most so many, the first and the last among them."""
  places = np.linspace(0, len(steps) - 1, min(count, len(steps)))
  return [steps[i] for i in np.unique(places.round().astype(int))]


def _facts(
  row: Mapping[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
  names = ('task', 'prompt', 'question', 'truncated')
  facts = {name: row[name] for name in names if name in row}
  ends = tokenizer.end_ids if tokenizer else ()
  return facts | {
    'reward': row['reward'] if _is_finite(row['reward']) else None,
    'length': len(row['ids']),
    'inner': row.get('inner_step'),
    'parts': {k: x for k, x in row.get('parts', {}).items() if _is_finite(x)},
    'ended': bool(row['ids']) and row['ids'][-1] in ends,
  }


def _is_finite(x: float | None) -> bool:
  return x is not None and math.isfinite(x)


def _pieces(tokenizer: Tokenizer | None, ids: Sequence[int]) -> list[str]:
  """The text that each token adds; '' within a character.

  Of a few tokens at a time: what comes before does not change a text's end.
  """
  if tokenizer is None:
    return [f'⟨{i}⟩' for i in ids]
  pieces, start = [], 0
  before = ''
  for i in range(len(ids)):
    if i - start > 32 and pieces[-1]:
      start = i - 8
      before = tokenizer.decode(ids[start:i])
    text = tokenizer.decode(ids[start : i + 1])
    if text.endswith('\ufffd') and i + 1 < len(ids):
      pieces.append('')
      continue
    pieces.append(text[len(before) :])
    before = text
  return pieces


def _columns(
  row: Mapping[str, Any], scaled: Mapping[str, bool]
) -> dict[str, np.ndarray]:
  """Of a completion's tokens, as many as its file knows."""
  n = len(row['ids'])
  logprob = np.array(row['logprob'], float)
  current = np.array(row.get('current_logprob', logprob), float)
  found = {
    'advantage': np.full(n, row['advantage'], float),
    'entropy': np.array(row.get('current_entropy', row['entropy']), float),
    'probability': np.exp(current),
  }
  if 'current_logprob' in row:
    x = np.where(current == logprob, 0.0, current - logprob)
    found['ratio'] = np.exp(np.clip(x, -20, 20))
    for name in ('covariance', 'gradient'):
      found[name] = np.array(row[name], float)
  for name, changed in row.get('filters', {}).items():
    came, left = np.full((2, n), np.nan)
    for t, before, after in changed:
      came[t], left[t] = before, after
    found |= {f'{name}/came': came, f'{name}/left': left}
    found[f'{name}/did'] = did(came, left, scaled[name])
  return found


# What a filter did to a token; the page knows them by these numbers.
KEPT, CLIPPED, PENALISED, SCALED = range(4)


def did(came: np.ndarray, left: np.ndarray, scaled: bool) -> np.ndarray:
  """Of each token: kept, clipped, penalised or scaled.

  Args:
    came, left: gradients, NaN where a filter let a token pass as it was.
    scaled: whether the filter multiplies whatever it does not clip.
  """
  changed = np.where(scaled & (came != 0), SCALED, PENALISED)
  changed = np.where((left == 0) & (came != 0), CLIPPED, changed)
  return np.where(np.isnan(left), KEPT, changed).astype(float)


def _scaled(rows: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
  """Whether a step's filters multiply all that they leave by one number."""
  factors = collections.defaultdict(set)
  for row in rows:
    for name, changed in row.get('filters', {}).items():
      factors[name] |= {
        left / came for _, came, left in changed if came and left
      }
  return {
    name: bool(x) and min(x) > 0 and max(x) < 1.01 * min(x)
    for name, x in factors.items()
  }


def pack(runs: Sequence[dict[str, Any]]) -> bytes:
  """Runs as the page reads them, compressed.

  The length of a JSON text (uint32, little-endian), the text, and the columns
  that it tells the places of: 4 bytes a token, all first bytes first.
  """
  blob = bytearray()

  def placed(column: np.ndarray) -> dict[str, Any]:
    whole = column.dtype == np.uint32
    column = column.astype('<u4') if whole else _short(column)
    where = {'start': len(blob), 'count': len(column), 'whole': whole}
    blob.extend(column.view(np.uint8).reshape(-1, 4).T.tobytes())
    return where

  described = []
  for run in runs:
    found = run['samples']
    if found:
      columns = {name: placed(x) for name, x in found['columns'].items()}
      found = found | {'columns': columns}
    described.append(run | {'samples': found})
  text = json.dumps(described, ensure_ascii=False, allow_nan=False).encode()
  return gzip.compress(
    len(text).to_bytes(4, 'little') + text + bytes(blob), 6, mtime=0
  )


def _short(x: np.ndarray) -> np.ndarray:
  """Float32 with 14 bits of fraction, which are enough to read: 1 in 32,000."""
  bits = x.astype('<f4').view('<u4')
  rounded = (bits + np.uint32(1 << 8)) & np.uint32(0xFFFFFE00)
  return np.where(np.isfinite(x), rounded, bits).astype('<u4')
