"""Shape of a policy, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary frequencies are stretched to longer sequences.

  Attributes:
    kind: 'linear' divides all frequencies by `factor`; 'llama3' those of long
      wavelength, with a ramp between the two bounds.
    factor: of the stretch.
    low_frequency_factor, high_frequency_factor: bounds of the ramp, in
      wavelengths per `original_max_tokens`; llama3 only.
    original_max_tokens: of the model before it was stretched; llama3 only.
  """

  kind: Literal['linear', 'llama3']
  factor: float
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_max_tokens: int = 8192

  def __post_init__(self):
    if self.kind not in ('linear', 'llama3'):
      raise ValueError(
        f"RoPE scaling {self.kind!r} is unknown; choose 'linear' or 'llama3'"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
  """A decoder with RoPE, RMSNorm, grouped-query attention and a gated MLP.

  The defaults are Llama's; what other families do otherwise is a field each.

  Attributes:
    vocab_size: V.
    layers: L.
    width: D.
    heads: N, query heads.
    kv_heads: K, key and value heads; divides N.
    head_size: H.
    feed_forward: F.
    activation: of the MLP's gate: 'silu', or 'gelu' by its tanh formula.
    rope_theta: base of the rotary frequencies.
    rope_scaling: of the layers that see everything; None for none.
    local_rope_theta: base in the layers with a window; `rope_theta` if None.
    window: tokens that a local layer's token sees, itself included.
    local: for each layer, whether it has the window; all do if empty and
      `window` is given.
    query_scale: factor of the attention scores; head_size^−½ if None.
    attention_softcap: scores go through softcap · tanh(score / softcap).
    logit_softcap: so do the logits.
    qkv_bias: queries, keys and values have a bias.
    qk_norm: each query and key head goes through a norm before it is rotated.
    post_norms: what a block writes goes through a norm, too.
    unit_offset: norms multiply by 1 + weight.
    scale_embeddings: embeddings are multiplied by √D.
    norm_eps: added to the mean square in RMSNorm.
    tied_embeddings: the output head is the embedding, transposed.
    max_tokens: longest sequence the policy was made for.
  """

  vocab_size: int
  layers: int
  width: int
  heads: int
  kv_heads: int
  head_size: int
  feed_forward: int
  activation: Literal['silu', 'gelu'] = 'silu'
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  local_rope_theta: float | None = None
  window: int | None = None
  local: tuple[bool, ...] = ()
  query_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  qkv_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  unit_offset: bool = False
  scale_embeddings: bool = False
  norm_eps: float = 1e-5
  tied_embeddings: bool = True
  max_tokens: int = 8192

  def __post_init__(self):
    # As they come back from JSON.
    if isinstance(self.rope_scaling, dict):
      scaling = RopeScaling(**self.rope_scaling)
      object.__setattr__(self, 'rope_scaling', scaling)
    object.__setattr__(self, 'local', tuple(self.local))
    if self.heads % self.kv_heads:
      raise ValueError(
        f'{self.heads} query heads do not divide into {self.kv_heads} '
        'key/value heads; make heads a multiple of kv_heads'
      )
    if self.head_size % 2:
      raise ValueError(
        f'head_size={self.head_size} is odd; RoPE rotates pairs: make it even'
      )
    if self.activation not in ('silu', 'gelu'):
      raise ValueError(
        f"activation={self.activation!r} is unknown; choose 'silu' or 'gelu'"
      )
    if self.local and len(self.local) != self.layers:
      raise ValueError(
        f'local names {len(self.local)} layers of {self.layers}; name each'
      )
    if any(self.local) and self.window is None:
      raise ValueError('local layers need a window; give one, in tokens')

  @property
  def is_local(self) -> tuple[bool, ...]:
    """For each layer, whether its tokens see a window only."""
    if self.window is None:
      return (False,) * self.layers
    return self.local or (True,) * self.layers

  def forward_flops(self, lengths: Sequence[int]) -> float:
    """FLOPs of reading sequences of so many tokens, and scoring each token.

    Two a multiply-add; matrix products and attention, where a token sees itself
    and its past.
    """
    heads = (2 * self.heads + 2 * self.kv_heads) * self.head_size
    layer = self.width * (heads + 3 * self.feed_forward)
    weights = self.layers * layer + self.width * self.vocab_size
    n = np.asarray(lengths, np.float64)
    seen = 0.0
    for local in self.is_local:
      far = np.maximum(n - (self.window or 0), 0) if local else 0.0
      seen += np.sum(n * (n + 1) / 2 - far * (far + 1) / 2)
    attention = 4 * self.heads * self.head_size * seen
    return float(2 * weights * np.sum(n) + attention)
