"""Forking tokens: where entropy sits, and what becomes of it in training.

Decoding at a temperature of their own (Eq. 5, Fig. 3) is
`sampling.entropy_temperature`, a transform: what is learnt from stays the
log-probability of the policy.

Reference: Wang et al., `Beyond the 80/20 Rule: High-Entropy Minority Tokens
Drive Effective Reinforcement Learning for LLM Reasoning
<https://arxiv.org/abs/2506.01939>`_, 2025, §3–4.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import rich.box
import rich.markup
import rich.table

from jax_rlvr import masked

if TYPE_CHECKING:
  from jaxtyping import Bool, Float, Int
  from numpy.typing import ArrayLike

  from jax_rlvr.loaded import LoadedPolicy
  from jax_rlvr.tokenizer import Tokenizer


def percentiles(
  entropy: ArrayLike,
  percents: ArrayLike = (0, 20, 40, 50, 60, 80, 90, 95, 99, 100),
) -> Float[np.ndarray, ' percents']:
  """Entropies in nats that so many per cent of the tokens [N] do not exceed."""
  return np.percentile(np.asarray(entropy, float), np.asarray(percents, float))


def share_below(entropy: ArrayLike, nats: float = 0.01) -> float:
  """Share of tokens [N] whose entropy is lower; 0.5064 for Qwen3-8B."""
  return float(np.mean(np.asarray(entropy, float) < nats))


class Ranked(NamedTuple):
  """Tokens of the vocabulary, highest mean entropy first, [K] each.

  Attributes:
    ids: int, of the tokens.
    entropy: mean over the places where a token was drawn, nats.
    count: of those places.
  """

  ids: Int[np.ndarray, ' K']
  entropy: Float[np.ndarray, ' K']
  count: Int[np.ndarray, ' K']


def ranked(ids: ArrayLike, entropy: ArrayLike, more_than: int = 100) -> Ranked:
  """Ranks tokens by the mean entropy of what they were drawn from.

  Args:
    ids: [N], completion tokens of many completions.
    entropy: [N], nats, of the distribution that each was drawn from.
    more_than: tokens that occur no more often are left out.

  Defaults: more than 100: 80/20 §3, of a million tokens.
  """
  found, place, count = np.unique(
    np.asarray(ids), return_inverse=True, return_counts=True
  )
  mean = np.bincount(place, np.asarray(entropy, float)) / count
  kept = count > more_than
  found, mean, count = found[kept], mean[kept], count[kept]
  # Of equal ones the lower id first.
  order = np.lexsort((found, -mean))
  return Ranked(found[order], mean[order], count[order])


def written(tokenizer: Tokenizer, token: int) -> str:
  """A token as it stands within a text, with blanks that can be seen."""
  once = tokenizer.decode([token])
  # Many decoders leave a text's first blank out.
  text = tokenizer.decode([token, token]).removeprefix(once) or once
  for blank, shown in (' ', '␣'), ('\n', '⏎'), ('\t', '⇥'):
    text = text.replace(blank, shown)
  return text or f'⟨{token}⟩'


def table(of: Ranked, tokenizer: Tokenizer, rows: int = 20) -> rich.table.Table:
  """The highest and the lowest side by side, to print with rich."""
  shown = rich.table.Table(
    'highest', 'nats', 'times', 'lowest', 'nats', 'times',
    box=rich.box.SIMPLE,
  )  # fmt: skip
  cells = [
    (rich.markup.escape(written(tokenizer, token)), f'{nats:.3g}', str(n))
    for token, nats, n in zip(
      of.ids.tolist(), of.entropy.tolist(), of.count.tolist(), strict=True
    )
  ]
  rows = min(rows, len(cells))
  for high, low in zip(cells[:rows], cells[::-1][:rows], strict=True):
    shown.add_row(*high, *low)
  return shown


def cloud(
  of: Ranked,
  tokenizer: Tokenizer,
  file: str | os.PathLike[str],
  *,
  words: int = 100,
  lowest: bool = False,
  size: tuple[int, int] = (800, 400),
) -> None:
  """Draws the tokens of highest mean entropy as a word cloud.

  Args:
    of: the tokens.
    tokenizer: that writes them.
    file: PNG to write.
    words: drawn at the most; those that the font, DejaVu Sans, has no signs
      for are boxes.
    lowest: draw those of lowest mean entropy instead, the lowest largest.
    size: in pixels, width and height.

  Raises:
    ImportError: wordcloud is not installed (extra `report`).
    ValueError: there are no tokens.
  """
  if not len(of.ids):
    raise ValueError('no token occurs often enough; give a lower more_than')
  if lowest:
    chosen = of.ids[::-1][:words]
    # Low entropies differ by powers of ten: their ranks are drawn.
    sizes = np.linspace(1.0, 0.1, len(chosen))
  else:
    chosen = of.ids[:words]
    sizes = np.maximum(of.entropy[:words], 1e-6)
  texts = {}
  for token, size_of in zip(chosen.tolist(), sizes.tolist(), strict=True):
    texts.setdefault(written(tokenizer, token), size_of)
  wordcloud = importlib.import_module('wordcloud')
  fonts = importlib.import_module('matplotlib.font_manager')
  drawn = wordcloud.WordCloud(
    width=size[0], height=size[1], background_color='white', max_words=words,
    prefer_horizontal=1.0, random_state=0,
    # Has the signs that stand for blanks.
    font_path=fonts.findfont('DejaVu Sans'),
  )  # fmt: skip
  drawn.generate_from_frequencies(texts).to_file(os.fspath(file))


def sampled(
  rollouts: Iterable[Mapping[str, Any]],
) -> tuple[Int[np.ndarray, ' N'], Float[np.ndarray, ' N']]:
  """ids and entropies, [N] each, of the lines of `rollouts/<step>.jsonl`."""
  lines = list(rollouts)
  ids = [np.array(line['ids'], int) for line in lines]
  entropy = [np.array(line['entropy'], float) for line in lines]
  if not lines:
    return np.zeros(0, int), np.zeros(0)
  return np.concatenate(ids), np.concatenate(entropy)


class Texts(NamedTuple):
  """Fixed prompts and completions that policies are asked about.

  Attributes:
    ids: int32 [B, T], the prompt first, padded at the end.
    lengths: int32 [B], tokens of prompt + completion.
    mask: bool [B, T], True on completion tokens.
  """

  ids: Int[np.ndarray, 'B T']
  lengths: Int[np.ndarray, ' B']
  mask: Bool[np.ndarray, 'B T']


def texts(
  prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Texts:
  """Pads B prompts with a completion each, both as ids."""
  starts = np.array([len(p) for p in prompts])
  lengths = starts + [len(c) for c in completions]
  ids = np.zeros((len(prompts), lengths.max()), np.int32)
  place = np.arange(ids.shape[1])[None]
  within = place < lengths[:, None]
  ids[within] = list(
    itertools.chain.from_iterable(
      [*p, *c] for p, c in zip(prompts, completions, strict=True)
    )
  )
  mask = within & (place >= starts[:, None])
  return Texts(ids, lengths.astype(np.int32), mask)


def entropies(
  policy: LoadedPolicy, of: Texts, *, temperature: float = 1.0, rows: int = 64
) -> Float[np.ndarray, 'B T']:
  """A policy's entropy before each completion token, nats; 0 elsewhere.

  Args:
    policy: a checkpoint, see `jax_rlvr.load_policy`.
    of: the same for all checkpoints that are to be compared; the paper takes
      completions of the final policy.
    temperature: of the softmax.
    rows: sequences at one time.
  """
  found = []
  for start in range(0, len(of.ids), rows):
    ids, lengths = (
      # All of one shape, so that they are compiled once.
      np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
      for x in (of.ids[start : start + rows], of.lengths[start : start + rows])
    )
    stats = policy.token_stats(
      jnp.asarray(ids), jnp.asarray(lengths), temperature=temperature
    )
    found.append(np.asarray(stats.entropy, float))
  entropy = np.concatenate(found)[: len(of.ids)]
  return np.where(of.mask, entropy, 0.0)


def top(
  entropy: ArrayLike, mask: ArrayLike, fraction: float = 0.2
) -> Bool[np.ndarray, 'B T']:
  """Positions [B, T] of the highest entropies, as `filters.forking_tokens`.

  max(1, ⌈fraction · N⌉) of the N that the mask has; of equal ones those that
  come first.
  """
  mask = jnp.asarray(mask)
  count = masked.share(fraction, masked.count(mask), up=True)
  serial = jnp.arange(mask.size, dtype=jnp.uint32).reshape(mask.shape)
  score = jnp.asarray(entropy, jnp.float32)
  return np.asarray(masked.largest(score, mask, jnp.maximum(count, 1), serial))


def overlap(
  entropy: ArrayLike, other: ArrayLike, mask: ArrayLike, fraction: float = 0.2
) -> float:
  """Share of one policy's top positions that are another's too; all [B, T].

  Two policies that have nothing to do with one another share `fraction`.
  Table 1 of the paper has it fall to 0.867 of the base's over 1,360 steps.
  """
  ours, theirs = top(entropy, mask, fraction), top(other, mask, fraction)
  return float((ours & theirs).sum() / max(ours.sum(), 1))


def evolution(
  entropies: Sequence[ArrayLike], mask: ArrayLike, fraction: float = 0.2
) -> tuple[Float[np.ndarray, ' C'], Float[np.ndarray, ' C']]:
  """Overlap of each of C checkpoints with the first and with the last."""
  tops = [top(entropy, mask, fraction) for entropy in entropies]
  size = max(int(tops[0].sum()), 1)
  with_first, with_last = (
    np.array([(each & end).sum() / size for each in tops])
    for end in (tops[0], tops[-1])
  )
  return with_first, with_last


class Bins(NamedTuple):
  """Change of entropy by its percentile under the base policy, [bins] each.

  Attributes:
    entropy: mean under the base policy, nats.
    change: mean of later − base, nats.
    size: mean of |later − base|, nats.
  """

  entropy: Float[np.ndarray, ' bins']
  change: Float[np.ndarray, ' bins']
  size: Float[np.ndarray, ' bins']


def change_by_percentile(
  base: ArrayLike, later: ArrayLike, mask: ArrayLike, bins: int = 20
) -> Bins:
  """Where in the distribution of base entropies training has changed them.

  Bins are of equal size by rank, ties as they come: many entropies are the
  same, and edges between values would leave bins empty.

  Args:
    base, later: [B, T], of the same tokens under both policies.
    mask: [B, T], tokens that count.
    bins: of equally many tokens.

  Raises:
    ValueError: there are fewer tokens than bins.

  Defaults: 20 bins: Fig. 4.
  """
  mask = np.asarray(mask)
  base, later = (np.asarray(x, float)[mask] for x in (base, later))
  if base.size < bins:
    raise ValueError(f'{base.size} tokens are fewer than {bins=}')
  parts = np.array_split(np.argsort(base, kind='stable'), bins)

  def mean(x):
    return np.array([x[part].mean() for part in parts])

  return Bins(mean(base), mean(later - base), mean(np.abs(later - base)))
