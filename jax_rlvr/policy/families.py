"""Shapes of published models, as their config.json on the hub has them.

Where a base model and its instructed kin differ, in `norm_eps` or `max_tokens`,
these are the latter's; `load` reads a folder's own. The numbers of parameters
are those of the published weights.
"""

from __future__ import annotations

import functools

from jax_rlvr.policy.config import PolicyConfig, RopeScaling


def _llama3(*, factor: float, **shape) -> PolicyConfig:
  scaling = RopeScaling(
    kind='llama3',
    factor=factor,
    low_frequency_factor=1.0,
    high_frequency_factor=4.0,
    original_max_tokens=8192,
  )
  return PolicyConfig(
    vocab_size=128_256,
    rope_theta=500_000.0,
    rope_scaling=scaling,
    max_tokens=131_072,
    **shape,
  )


_smollm2 = functools.partial(
  PolicyConfig, vocab_size=49_152, head_size=64, max_tokens=8192
)
_qwen25 = functools.partial(
  PolicyConfig,
  qkv_bias=True,
  rope_theta=1_000_000.0,
  norm_eps=1e-6,
  max_tokens=32_768,
)
_qwen3 = functools.partial(
  PolicyConfig,
  vocab_size=151_936,
  head_size=128,
  qk_norm=True,
  rope_theta=1_000_000.0,
  norm_eps=1e-6,
  max_tokens=40_960,
)
_gemma = functools.partial(
  PolicyConfig,
  activation='gelu',
  post_norms=True,
  unit_offset=True,
  scale_embeddings=True,
  norm_eps=1e-6,
)


def _gemma2(*, layers: int, **shape) -> PolicyConfig:
  return _gemma(
    vocab_size=256_000,
    layers=layers,
    window=4096,
    local=tuple(i % 2 == 0 for i in range(layers)),
    attention_softcap=50.0,
    logit_softcap=30.0,
    max_tokens=8192,
    **shape,
  )


def _gemma3(*, layers: int, **shape) -> PolicyConfig:
  return _gemma(
    layers=layers,
    local=tuple(i % 6 != 5 for i in range(layers)),
    qk_norm=True,
    rope_theta=1_000_000.0,
    local_rope_theta=10_000.0,
    **shape,
  )


# Language models of the multimodal ones.
_gemma3_large = functools.partial(
  _gemma3,
  vocab_size=262_208,
  window=1024,
  rope_scaling=RopeScaling(kind='linear', factor=8.0),
  max_tokens=131_072,
)
_gemma3_small = functools.partial(
  _gemma3, vocab_size=262_144, window=512, max_tokens=32_768
)

SHAPES = {
  'smollm2-135m': _smollm2(
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    feed_forward=1536,
    rope_theta=100_000.0,
  ),
  'smollm2-360m': _smollm2(
    layers=32,
    width=960,
    heads=15,
    kv_heads=5,
    feed_forward=2560,
    rope_theta=100_000.0,
  ),
  'smollm2-1.7b': _smollm2(
    layers=24,
    width=2048,
    heads=32,
    kv_heads=32,
    feed_forward=8192,
    rope_theta=130_000.0,
  ),
  'llama-3.2-1b': _llama3(
    factor=32.0,
    layers=16,
    width=2048,
    heads=32,
    kv_heads=8,
    head_size=64,
    feed_forward=8192,
  ),
  'llama-3.2-3b': _llama3(
    factor=32.0,
    layers=28,
    width=3072,
    heads=24,
    kv_heads=8,
    head_size=128,
    feed_forward=8192,
  ),
  'llama-3.1-8b': _llama3(
    factor=8.0,
    layers=32,
    width=4096,
    heads=32,
    kv_heads=8,
    head_size=128,
    feed_forward=14_336,
    tied_embeddings=False,
  ),
  'mistral-7b-v0.3': PolicyConfig(
    vocab_size=32_768,
    layers=32,
    width=4096,
    heads=32,
    kv_heads=8,
    head_size=128,
    feed_forward=14_336,
    rope_theta=1_000_000.0,
    tied_embeddings=False,
    max_tokens=32_768,
  ),
  'qwen2.5-0.5b': _qwen25(
    vocab_size=151_936,
    layers=24,
    width=896,
    heads=14,
    kv_heads=2,
    head_size=64,
    feed_forward=4864,
  ),
  'qwen2.5-1.5b': _qwen25(
    vocab_size=151_936,
    layers=28,
    width=1536,
    heads=12,
    kv_heads=2,
    head_size=128,
    feed_forward=8960,
  ),
  'qwen2.5-3b': _qwen25(
    vocab_size=151_936,
    layers=36,
    width=2048,
    heads=16,
    kv_heads=2,
    head_size=128,
    feed_forward=11_008,
  ),
  'qwen2.5-7b': _qwen25(
    vocab_size=152_064,
    layers=28,
    width=3584,
    heads=28,
    kv_heads=4,
    head_size=128,
    feed_forward=18_944,
    tied_embeddings=False,
  ),
  'qwen2.5-14b': _qwen25(
    vocab_size=152_064,
    layers=48,
    width=5120,
    heads=40,
    kv_heads=8,
    head_size=128,
    feed_forward=13_824,
    tied_embeddings=False,
  ),
  'qwen2.5-32b': _qwen25(
    vocab_size=152_064,
    layers=64,
    width=5120,
    heads=40,
    kv_heads=8,
    head_size=128,
    feed_forward=27_648,
    tied_embeddings=False,
  ),
  'qwen3-0.6b': _qwen3(
    layers=28,
    width=1024,
    heads=16,
    kv_heads=8,
    feed_forward=3072,
  ),
  'qwen3-1.7b': _qwen3(
    layers=28,
    width=2048,
    heads=16,
    kv_heads=8,
    feed_forward=6144,
  ),
  'qwen3-4b': _qwen3(
    layers=36,
    width=2560,
    heads=32,
    kv_heads=8,
    feed_forward=9728,
  ),
  'qwen3-8b': _qwen3(
    layers=36,
    width=4096,
    heads=32,
    kv_heads=8,
    feed_forward=12_288,
    tied_embeddings=False,
  ),
  'qwen3-14b': _qwen3(
    layers=40,
    width=5120,
    heads=40,
    kv_heads=8,
    feed_forward=17_408,
    tied_embeddings=False,
  ),
  'qwen3-32b': _qwen3(
    layers=64,
    width=5120,
    heads=64,
    kv_heads=8,
    feed_forward=25_600,
    tied_embeddings=False,
  ),
  'gemma-2-2b': _gemma2(
    layers=26,
    width=2304,
    heads=8,
    kv_heads=4,
    head_size=256,
    feed_forward=9216,
  ),
  'gemma-2-9b': _gemma2(
    layers=42,
    width=3584,
    heads=16,
    kv_heads=8,
    head_size=256,
    feed_forward=14_336,
  ),
  'gemma-2-27b': _gemma2(
    layers=46,
    width=4608,
    heads=32,
    kv_heads=16,
    head_size=128,
    feed_forward=36_864,
    query_scale=144**-0.5,
  ),
  'gemma-3-270m': _gemma3_small(
    layers=18,
    width=640,
    heads=4,
    kv_heads=1,
    head_size=256,
    feed_forward=2048,
  ),
  'gemma-3-1b': _gemma3_small(
    layers=26,
    width=1152,
    heads=4,
    kv_heads=1,
    head_size=256,
    feed_forward=6912,
  ),
  'gemma-3-4b': _gemma3_large(
    layers=34,
    width=2560,
    heads=8,
    kv_heads=4,
    head_size=256,
    feed_forward=10_240,
  ),
  'gemma-3-12b': _gemma3_large(
    layers=48,
    width=3840,
    heads=16,
    kv_heads=8,
    head_size=256,
    feed_forward=15_360,
  ),
  'gemma-3-27b': _gemma3_large(
    layers=62,
    width=5376,
    heads=32,
    kv_heads=16,
    head_size=128,
    feed_forward=21_504,
    query_scale=168**-0.5,
  ),
}
