"""A trained or pretrained policy in research code."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from jax_rlvr import checkpoint, manifest, metrics, policy, prng, storage
from jax_rlvr import mesh as layouts
from jax_rlvr.packing import padded
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.records import TokenStats
from jax_rlvr.sampling import (
  Completed,
  Engine,
  Group,
  Transform,
  never,
  stops,
  written,
)
from jax_rlvr.token_stats import token_stats
from jax_rlvr.tokenizer import Tokenizer

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int


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
  mesh = layouts.make()
  run = storage.path(path)
  if (run / 'manifest.json').exists():
    config, tokenizer = manifest.read_policy(run)
    params, _ = checkpoint.read_params(
      run, config, mesh, layouts.TRAINING, step
    )
    return LoadedPolicy(config, params, run, tokenizer)
  path = pathlib.Path(path)
  if step is not None:
    raise ValueError(f'{path} is no run, so it has no {step=}; leave it out')
  pretrained = policy.load(path)
  shardings = layouts.shardings(
    mesh, policy.abstract_params(pretrained.config), layouts.TRAINING
  )
  params = pretrained.read(shardings)
  return LoadedPolicy(pretrained.config, params, path, pretrained.tokenizer)


@dataclasses.dataclass(frozen=True)
class Generated:
  """A completion.

  Attributes:
    text: without the end token or stop text; '' where there is no tokenizer.
    ids: int32 [T], the end token included.
    logprobs: float32 [T], nats, of the softmax at the temperature.
    sampled_logprobs: of the distribution drawn from, after the transform.
    entropies: float32 [T], nats, of the same softmax as `logprobs`.
    truncated: the limit came before an end.
  """

  text: str
  ids: np.ndarray = dataclasses.field(repr=False)
  logprobs: np.ndarray = dataclasses.field(repr=False)
  sampled_logprobs: np.ndarray = dataclasses.field(repr=False)
  entropies: np.ndarray = dataclasses.field(repr=False)
  truncated: bool = False


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
  path: storage.Path
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
    prompts: Sequence[str | Sequence[Mapping[str, str]] | Sequence[int]],
    samples: int = 1,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    transform: Transform | None = None,
    stop: Sequence[str] = (),
    end_ids: Sequence[int] | None = None,
    slots: int = 64,
    stream: Callable[[int, int, str], None] | None = None,
    progress: bool = False,
  ) -> list[list[Generated]]:
    """Completes each prompt `samples` times.

    A completion depends on the seed, the number of its prompt and its own, not
    on what is completed beside it.

    Args:
      prompts: each a text, a conversation for the chat template, or ids.
      samples: completions of each prompt.
      max_new_tokens: where completions are cut, the end token included.
      temperature: 0 for argmax.
      seed: of all that is drawn.
      transform: of the distribution that is drawn from, see
        `jax_rlvr.sampling`.
      stop: texts that end a completion, which is cut before them.
      end_ids: tokens that end a completion; the tokenizer's if None.
      slots: completions that are decoded at one time.
      stream: called with the numbers of prompt and sample, and the text so far,
        whenever some tokens have come; the last time with all of it.
      progress: show a bar.

    Returns:
      A list for each prompt, of its completions.

    Raises:
      ValueError: a prompt is empty, a stop text cannot be written, or what it
        takes does not fit on the devices.
    """
    encoded = [np.array(self._encoded(prompt), np.int32) for prompt in prompts]
    if not encoded:
      return []
    mesh = jax.tree.leaves(self.params)[0].sharding.mesh
    dtype = layouts.compute_dtype('auto', mesh)
    engine = Engine(
      policy=self.config,
      mesh=mesh,
      slots=slots,
      prompt_tokens=max(map(len, encoded)),
      completion_tokens=max_new_tokens,
      dtype=dtype,
      cache=policy.suited(self.config, dtype, mesh),
    )
    keys = prng.sample_keys(jax.random.key(seed), range(len(encoded)), samples)
    limits = np.full(samples, max_new_tokens)
    groups = [
      Group(ids, data, limits)
      for ids, data in zip(
        encoded, np.asarray(jax.random.key_data(keys)), strict=True
      )
    ]
    if end_ids is None:
      end_ids = self.tokenizer.end_ids
    found: list[list[Any]] = [[None] * samples for _ in prompts]
    console = rich.console.Console(stderr=True, quiet=not progress)
    with metrics.progress(console) as bars:
      bar = bars.add_task('generate', total=len(prompts) * samples, note='')
      for made in engine.complete(
        engine.unstacked(self.params),
        groups,
        temperature=temperature,
        end_ids=end_ids,
        transform=transform,
        stop=stops(self.tokenizer, stop) if stop else never,
      ):
        bars.update(bar, completed=made.done, note=made.note)
        for c in made.finished:
          found[c.group][c.sample] = self._generated(c, end_ids, stop)
        if stream:
          for c in made.finished + made.running:
            text = self._generated(c, end_ids, stop).text
            stream(c.group, c.sample, text)
    return found

  def _encoded(self, prompt) -> Sequence[int]:
    if isinstance(prompt, str):
      return self.tokenizer.encode(prompt)
    if len(prompt) and isinstance(prompt[0], Mapping):
      return self.tokenizer.render(prompt)
    return prompt

  def _generated(self, c: Completed, end_ids, stop) -> Generated:
    text = ''
    if self._tokenizer:
      text = written(self._tokenizer, c, end_ids, stop)
    numbers = (c.logprob, c.sampled_logprob, c.entropy)
    return Generated(
      text,
      np.array(c.ids, np.int32),
      *(np.array(x, np.float32) for x in numbers),
      truncated=not c.ended,
    )


def _within(tokens, lengths):
  return np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
  return policy.logits(config, params, policy.forward(config, params, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _stats(config, params, rows, temperature):
  return token_stats(config, params, rows, temperature=temperature)
