"""Shape of a policy, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
  """A decoder: RoPE, RMSNorm, grouped-query attention, SwiGLU.

  Attributes:
    vocab_size: V.
    layers: L.
    width: D.
    heads: N, query heads.
    kv_heads: K, key and value heads; divides N.
    head_size: H.
    feed_forward: F.
    rope_theta: base of the rotary frequencies.
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
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tied_embeddings: bool = True
  max_tokens: int = 8192

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f'{self.heads} query heads do not divide into {self.kv_heads} '
        'key/value heads; make heads a multiple of kv_heads'
      )
    if self.head_size % 2:
      raise ValueError(
        f'head_size={self.head_size} is odd; RoPE rotates pairs: make it even'
      )
