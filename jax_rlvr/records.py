"""The nouns that flow down the line, each documented once.

Axes: `P` prompts, `G` completions per prompt, `B = P * G` sequences, `T` tokens
of prompt + completion, `V` vocabulary, `L` layers, `N`/`K` query/key heads, `H`
head size, `D` model width, `F` feed-forward width.

Alignment: index t of every [B, T] array speaks of the token AT t, so
`logprob[t] = log p(token[t] | token[<t])` and `mask[0]` is False. Completion
tokens include the end token.

Host records are frozen dataclasses; device records are NamedTuples, hence
pytrees. This module imports no jax: reward workers import it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  import numpy as np
  from jaxtyping import Bool, Float, Int, UInt

  Array = Any  # of the host or of the devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """What the policy is asked, and what a verifier needs to know.

  Attributes:
    messages: the conversation so far, each `{'role': …, 'content': …}`.
      Tokenizers with a chat template render it; others join the contents.
    answer: the reference answer a reward compares with.
    task: name of the task that asks; rewards and metrics are routed by it.
    id: stable name of the prompt within its task.
    extra: further JSON values of the prompt that a verifier reads.
  """

  messages: tuple[Mapping[str, str], ...]
  answer: str
  task: str = ''
  id: str = ''
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def text(self) -> str:
    """The contents of all messages, joined."""
    return ''.join(message['content'] for message in self.messages)


def user(text: str) -> tuple[Mapping[str, str], ...]:
  """The conversation of one user message."""
  return ({'role': 'user', 'content': text},)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What a reward sees of a completion.

  Attributes:
    text: decoded without the end token.
    length: completion tokens, the end token included.
    truncated: the token limit came before an end token.
  """

  text: str
  length: int = 0
  truncated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
  """A prompt with a completion to imitate: supervised warm-up learns these."""

  prompt: Prompt
  completion: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
  """One completion of one prompt with the sampler's own numbers.

  Attributes:
    prompt: what was asked.
    prompt_ids: int32 [prompt length].
    ids: int32 [completion length], the end token included.
    logprob: float32 [completion length], nats, of the temperature-scaled full
      softmax: the trainer's own quantity.
    sampled_logprob: the same under the distribution that was drawn from.
    entropy: float32 [completion length], nats, of the temperature-scaled
      softmax.
    versions: int32 [completion length], steps that the weights had seen which
      drew each token.
    completion: the text that rewards see.
    reward: None where the completion could not be scored.
    outcome: the part of the reward that says right or wrong; groups are told
      apart by it.
    parts: components of the reward, by name.
    failed: the policy's logits were not finite after the last token: nothing
      is learnt from it.
    finished: False for the beginning of a completion, to go on with.
  """

  prompt: Prompt
  prompt_ids: np.ndarray
  ids: np.ndarray
  logprob: np.ndarray
  sampled_logprob: np.ndarray
  entropy: np.ndarray
  versions: np.ndarray
  completion: Completion
  reward: float | None = None
  outcome: float | None = None
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
  failed: bool = False
  finished: bool = True


class TokenStats(NamedTuple):
  """Per-token statistics of a policy; also the shape of token gradients.

  All of the policy gradient reaches the weights through these.

  Attributes:
    logprob: float32 [B, T], nats; 0 outside the mask.
    entropy: float32 [B, T], nats; 0 outside the mask. None where not wanted.
    p2: Σ π² over the vocabulary; this and what follows only where asked for,
      and without a gradient.
    p2_logp: Σ π² log π, nats.
    logit: of the token, over the temperature.
    confidence: logsumexp − mean of the logits over the temperature.
  """

  logprob: Float[Array, 'B T']
  entropy: Float[Array, 'B T'] | None = None
  p2: Float[Array, 'B T'] | None = None
  p2_logp: Float[Array, 'B T'] | None = None
  logit: Float[Array, 'B T'] | None = None
  confidence: Float[Array, 'B T'] | None = None


class Tokens(NamedTuple):
  """The evidence of a batch: all that filters and the update may read.

  Attributes:
    mask: bool [B, T], True on completion tokens. A row without any does not
      exist for any filter, count or aggregation.
    advantage: float32 [B, T], in units of reward.
    old_logprob: float32 [B, T], the ratio's denominator, nats.
    serial: uint32 [B, T], one number per token of the batch: ties and random
      draws go by it. Array position if None.
    sampled_logprob: float32 [B, T], of the distribution drawn from.
    old_entropy: float32 [B, T], at rollout, nats.
    ref_logprob: float32 [B, T], of the frozen reference policy.
    ids: int32 [B, T], the tokens themselves, prompt first.
    lengths: int32 [B], tokens of prompt + completion.
    fresh: bool [B, T], drawn with the weights of this step; all if None.
  """

  mask: Bool[Array, 'B T']
  advantage: Float[Array, 'B T']
  old_logprob: Float[Array, 'B T']
  serial: UInt[Array, 'B T'] | None = None
  sampled_logprob: Float[Array, 'B T'] | None = None
  old_entropy: Float[Array, 'B T'] | None = None
  ref_logprob: Float[Array, 'B T'] | None = None
  ids: Int[Array, 'B T'] | None = None
  lengths: Int[Array, ' B'] | None = None
  fresh: Bool[Array, 'B T'] | None = None


class Rows(NamedTuple):
  """How tokens go through the policy: R rows of W, sequences packed in them.

  Completions of one prompt that share a row share its prompt tokens there.

  Attributes:
    ids: int32 [R, W].
    positions: int32 [R, W], place of each token in its own sequence.
    group: int32 [R, W], one number a prompt within the row; −1 on padding.
      One a sequence, where completions do not share their prompt's tokens.
    segment: int32 [R, W], 0 on prompt tokens, else one number a completion: a
      token sees its own segment's past and its group's prompt. All 0 where
      nothing is shared.
    before: int32 [R, W], column whose hidden state scores the token.
    place: int32 [R, W], flat index of the token in its [B, T] batch; −1 where
      nothing is scored.
  """

  ids: Int[Array, 'R W']
  positions: Int[Array, 'R W']
  group: Int[Array, 'R W']
  segment: Int[Array, 'R W']
  before: Int[Array, 'R W']
  place: Int[Array, 'R W']


class TrainState(NamedTuple):
  """All that training changes; what a checkpoint holds.

  Attributes:
    step: int32 scalar, batches of prompts trained on.
    cursor: int32 scalar, prompts taken from the stream.
    params: plain nested dict of arrays.
    optimizer: state of the weight-space optax chain.
    filters: state of the token-space optax chain.
    carried: groups of completions to go on with, as texts; see
      `rollout.collect`.
    reference: params of the frozen reference policy, as they are computed
      with; None where there is none. Checkpoints do not hold it.
  """

  step: np.int32 | Int[Array, '']
  cursor: np.int32 | Int[Array, '']
  params: Any
  optimizer: Any
  filters: Any
  carried: tuple[str, ...] = ()
  reference: Any = None


class Tracked(NamedTuple):
  """State of a tracked filter: its own state and the scalars it reports.

  `report` maps metric names below `filters/` to float32 scalars.
  """

  inner: Any
  report: dict[str, Array]


class Watched(NamedTuple):
  """State of a tracked filter that shows what it did to every token.

  It lives within one update; see `policy_gradient.watched_gradients`.

  Attributes:
    tracked: the filter's own state.
    came, left: float32 [B, T], logprob gradients before and after it.
  """

  tracked: Tracked
  came: Float[Array, 'B T']
  left: Float[Array, 'B T']


class Shown(NamedTuple):
  """What an inner step saw of some of its sequences, before weights move.

  Attributes:
    logprob, entropy: float32 [S, T], nats, of the current policy.
    covariance: float32 [S, T], see `evidence.covariance`.
    gradient: float32 [S, T], the logprob gradient that leaves the chain.
    filters: (came, left) float32 [S, T] of each tracked filter, in order.
  """

  logprob: Float[Array, 'S T']
  entropy: Float[Array, 'S T']
  covariance: Float[Array, 'S T']
  gradient: Float[Array, 'S T']
  filters: tuple[tuple[Float[Array, 'S T'], Float[Array, 'S T']], ...] = ()


class Report(NamedTuple):
  """State of a filter that explains itself: scalars of its last update.

  `scalars` maps names to float32; they become metrics where the filter, or a
  chain around it, is tracked. `mark` is empty: its type says something.
  """

  scalars: dict[str, Array]
  mark: Any = ()


class Rescaled(NamedTuple):
  """State of a filter that made the selected tokens the denominator."""


class Aggregated(NamedTuple):
  """State of an aggregation that is not a mean over tokens."""
