"""Tunix's vanilla sampler."""

from __future__ import annotations

import functools
import os

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import tunix  # noqa: E402
from flax import nnx  # noqa: E402
from peers.batches import batches  # noqa: E402
from tunix.generate import sampler  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402


class _Words:
  """A tokenizer whose words are ids, with no end in reach."""

  def __init__(self, vocab_size):
    self.vocab_size = vocab_size

  def encode(self, text, **_):
    return [int(word) for word in text.split()]

  def decode(self, ids, **_):
    return ''

  def bos_id(self):
    return 0  # so that none is put before the prompt

  def eos_id(self):
    return self.vocab_size

  def pad_id(self):
    return 0


def build(shape: dict) -> tuple[dict, dict]:
  """Versions, and what can be asked for by name."""
  model = llama.Llama3(
    llama.ModelConfig(
      vocab_size=shape['vocab_size'],
      num_layers=shape['layers'],
      embed_dim=shape['width'],
      hidden_dim=shape['feed_forward'],
      num_heads=shape['heads'],
      num_kv_heads=shape['kv_heads'],
      head_dim=shape['head_size'],
      rope_theta=10_000,
      norm_eps=1e-5,
      weight_tying=True,
    ),
    rngs=nnx.Rngs(0),
  )
  _randomize(model)

  @functools.cache
  def make(cache_size):
    cache = sampler.CacheConfig(
      cache_size=cache_size,
      num_layers=shape['layers'],
      num_kv_heads=shape['kv_heads'],
      head_dim=shape['head_size'],
    )
    return sampler.Sampler(model, _Words(shape['vocab_size']), cache)

  def generate(prompts, samples, lengths, slots):
    made = []
    length = prompts.shape[1]
    # One cache for all batches: outside a benchmark nobody knows their lengths.
    run = make(length + max(lengths))
    for rows, new in batches(prompts, samples, lengths, slots):
      out = run(
        [' '.join(map(str, row)) for row in rows],
        max_generation_steps=new,
        max_prompt_length=length,
        temperature=1.0,
        top_p=1.0,
        seed=0,
      )
      made += map(len, out.tokens)
    return made

  versions = {'tunix': tunix.__version__, "tunix's jax": jax.__version__}
  return versions, {'tunix': generate}


def _randomize(model):
  """Fills all matrices: some start as zeros, and time must not profit."""
  leaves, tree = jax.tree.flatten(nnx.state(model))
  keys = jax.random.split(jax.random.key(0), len(leaves))
  leaves = [
    0.02 * jax.random.normal(key, x.shape) if x.ndim > 1 else x
    for key, x in zip(keys, leaves, strict=True)
  ]
  assert all(x.dtype == 'float32' for x in leaves)
  nnx.update(model, tree.unflatten(leaves))
