"""A trained or pretrained policy in research code."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_rlvr import checkpoint, policy
from jax_rlvr import mesh as layouts
from jax_rlvr.packing import padded
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.records import TokenStats
from jax_rlvr.sampling import Sampled, sample
from jax_rlvr.token_stats import token_stats
from jax_rlvr.tokenizer import Tokenizer

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int, Key


def load_policy(
  path: str | os.PathLike[str], step: int | None = None
) -> LoadedPolicy:
  """Loads a policy onto the devices that are here.

  Args:
    path: a Hugging Face folder, a GGUF file, or a run's work directory.
    step: of the run's checkpoint; the latest if None.

  Raises:
    FileNotFoundError, ValueError: one line that names what is missing or wrong.
  """
  path = pathlib.Path(path)
  mesh = layouts.make()
  if (path / 'manifest.json').exists():
    config, tokenizer = checkpoint.read_policy(path)
    params, _ = checkpoint.read_params(
      path, config, mesh, layouts.TRAINING, step
    )
    return LoadedPolicy(config, params, path, tokenizer)
  if step is not None:
    raise ValueError(f'{path} is no run, so it has no {step=}; leave it out')
  pretrained = policy.load(path)
  shardings = layouts.shardings(
    mesh, policy.abstract_params(pretrained.config), layouts.TRAINING
  )
  params = pretrained.read(shardings)
  return LoadedPolicy(pretrained.config, params, path, pretrained.tokenizer)


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
  """Weights with what it takes to use them.

  Index t of every [B, T] array speaks of the token at t; logits at t are those
  of the token after it. Sequences are padded at the end.

  Attributes:
    config: shape of the policy.
    params: a pytree of float32 arrays.
    path: where they come from.
  """

  config: PolicyConfig
  params: Any = dataclasses.field(repr=False)
  path: pathlib.Path
  _tokenizer: Tokenizer | None = dataclasses.field(repr=False)

  @property
  def tokenizer(self) -> Tokenizer:
    """The policy's own.

    Raises:
      ValueError: the files brought none.
    """
    if self._tokenizer is None:
      raise ValueError(
        f'{self.path} has no tokenizer files; put tokenizer.json and '
        'tokenizer_config.json there'
      )
    return self._tokenizer

  def logits(
    self,
    tokens: Int[Array, 'B T'],
    lengths: Int[Array, ' B'] | None = None,
  ) -> Float[Array, 'B T V']:
    """Float32 logits of the token after each; 0 past a sequence's end.

    They take B · T · V numbers: `token_stats` does not.
    """
    logits = _logits(self.config, self.params, jnp.asarray(tokens))
    if lengths is None:
      return logits
    return jnp.where(_within(tokens, lengths)[..., None], logits, 0.0)

  def token_stats(
    self,
    tokens: Int[Array, 'B T'],
    lengths: Int[Array, ' B'] | None = None,
    *,
    temperature: float = 1.0,
  ) -> TokenStats:
    """Log-probability and entropy of every token but each first one, nats."""
    ids = np.asarray(tokens, np.int32)
    scored = np.arange(ids.shape[1]) > np.zeros((len(ids), 1))
    if lengths is not None:
      scored &= _within(ids, lengths)
    rows = padded(ids, scored)
    return _stats(self.config, self.params, rows, temperature)

  def generate(
    self,
    tokens: Int[Array, 'P T'],
    lengths: Int[Array, ' P'] | None = None,
    *,
    key: Key[Array, ''],
    max_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    end_ids: tuple[int, ...] | None = None,
  ) -> Sampled:
    """Completes each prompt `samples` times.

    Args:
      tokens: prompts.
      lengths: of the prompts; T if None.
      key: of all that is drawn.
      max_tokens: where completions are cut.
      samples: G, completions per prompt.
      temperature: 0 for argmax.
      end_ids: what ends a completion; the tokenizer's if None.

    Returns:
      ids and their numbers, [P, G, max_tokens], with lengths [P, G].
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if lengths is None:
      lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    if end_ids is None:
      end_ids = self.tokenizer.end_ids
    return sample(
      self.config,
      self.params,
      tokens,
      jnp.asarray(lengths, jnp.int32),
      jax.random.split(key, (tokens.shape[0], samples)),
      np.float32(temperature),
      np.array(end_ids, np.int32),
      max_tokens=max_tokens,
    )


def _within(tokens, lengths):
  return np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
  return policy.logits(config, params, policy.forward(config, params, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _stats(config, params, rows, temperature):
  return token_stats(config, params, rows, temperature=temperature)
