"""Published methods as ready chains, by the names of their papers.

Each prints its own composition:

>>> print(dapo())
advantage=group_norm,
filters=optax.chain(
  clip_ratio(0.2, 0.28),
  token_mean(),
),

A method is what it prints: take it as it is into a config, or copy the print
and change it. Off-policy corrections, penalties and selections are further
lines of the same chain.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import optax

from jax_rlvr import advantages
from jax_rlvr.filters.aggregate import (
  sequence_mean_token_mean,
  sequence_mean_token_sum,
  token_mean,
)
from jax_rlvr.filters.base import tracked
from jax_rlvr.filters.covariance import clip_cov as clip_cov_filter
from jax_rlvr.filters.covariance import kl_cov as kl_cov_filter
from jax_rlvr.filters.entropy import forking_tokens
from jax_rlvr.filters.ratio import cispo as cispo_head
from jax_rlvr.filters.ratio import clip_ratio
from jax_rlvr.filters.ratio import gmpo as gmpo_head
from jax_rlvr.filters.ratio import gspo as gspo_head

# A function with the arguments it will be called with.
call = functools.partial


@dataclasses.dataclass(frozen=True)
class Method:
  """An advantage estimator and a chain of filters.

  Attributes:
    advantage: (rewards, valid, lengths) [P, G] → advantages [P, G].
    steps: the chain's filters in order, each a factory with its arguments; the
      last is the aggregation.
  """

  advantage: Callable[..., Any]
  steps: tuple[functools.partial, ...]

  @property
  def filters(self) -> optax.GradientTransformationExtraArgs:
    """The chain, every filter tracked under its name."""
    *steps, aggregate = self.steps
    named = (tracked(step.func.__name__, step()) for step in steps)
    return optax.chain(*named, aggregate())

  def __str__(self) -> str:
    steps = ''.join(f'  {_written(step)},\n' for step in self.steps)
    advantage = _written(self.advantage)
    return f'advantage={advantage},\nfilters=optax.chain(\n{steps}),'


def _written(f) -> str:
  """The source of a call, or the name of a function."""
  if not isinstance(f, functools.partial):
    return f.__name__
  arguments = [repr(x) for x in f.args]
  arguments += [f'{name}={x!r}' for name, x in f.keywords.items()]
  if f.func in advantages.ALL.values():
    return f'functools.partial({", ".join([f.func.__name__, *arguments])})'
  return f'{f.func.__name__}({", ".join(arguments)})'


def grpo() -> Method:
  """GRPO: group-normalised advantages, PPO's clip, a mean per sequence.

  Numbers: clip 0.2, 0.2: customary, as DeepSeekMath names none. Its reference
  KL, `kl_penalty(0.04)`, is left out, as in the RLVR runs of the core papers.

  Reference: `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, 2024.
  """
  steps = call(clip_ratio, 0.2, 0.2), call(sequence_mean_token_mean)
  return Method(advantages.group_norm, steps)


def dr_grpo(length: float = 3000) -> Method:
  """Dr. GRPO: neither the group's deviation nor a sequence's length divides.

  Args:
    length: the completion budget, tokens.

  Numbers: length 3000: understand-r1-zero's `generate_max_length`; clip 0.2,
  0.2: PPO.

  Reference: `Understanding R1-Zero-Like Training
  <https://arxiv.org/abs/2503.20783>`_, 2025.
  """
  steps = call(clip_ratio, 0.2, 0.2), call(sequence_mean_token_sum, length)
  return Method(advantages.group_mean, steps)


def dapo() -> Method:
  """DAPO: clip-higher and a mean over tokens.

  Its dynamic sampling and overlong reward belong to the rollout, not here.

  Numbers: clip 0.2, 0.28: DAPO §4.1. Scripts also have dual=10.0; the paper
  does not.

  Reference: `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025.
  """
  steps = call(clip_ratio, 0.2, 0.28), call(token_mean)
  return Method(advantages.group_norm, steps)


def rloo() -> Method:
  """RLOO: REINFORCE over whole sequences against the mean of the others.

  Numbers: none; one update a batch, so there is no clip. verl runs it under
  PPO's clip and a token mean.

  Reference: `Back to Basics <https://arxiv.org/abs/2402.14740>`_, 2024.
  """
  return Method(advantages.leave_one_out, (call(sequence_mean_token_sum),))


def reinforce_plus_plus() -> Method:
  """REINFORCE++: advantages whitened over the batch, without groups.

  The paper's KL within the reward is left out.

  Numbers: clip 0.2, 0.2: PPO.

  Reference: `REINFORCE++ <https://arxiv.org/abs/2501.03262>`_, 2025.
  """
  steps = call(clip_ratio, 0.2, 0.2), call(token_mean)
  return Method(advantages.batch_norm, steps)


def reinforce_plus_plus_baseline() -> Method:
  """REINFORCE++-baseline: the group's mean taken off, then whitened.

  The paper's KL is left out.

  Numbers: clip 0.2, 0.2: PPO.

  Reference: `REINFORCE++ <https://arxiv.org/abs/2501.03262>`_, 2025.
  """
  steps = call(clip_ratio, 0.2, 0.2), call(token_mean)
  return Method(advantages.group_mean_batch_norm, steps)


def opo() -> Method:
  """OPO: the length-weighted baseline, strictly on policy.

  Numbers: none; for one inner step a batch, so there is no clip.

  Reference: `On-Policy RL with Optimal Reward Baseline
  <https://arxiv.org/abs/2505.23585>`_, 2025.
  """
  return Method(advantages.length_weighted, (call(token_mean),))


def gspo() -> Method:
  """GSPO: one ratio and one clip a sequence.

  Numbers: 3e-4, 4e-4: GSPO §5.1, four inner steps a batch.

  Reference: `GSPO <https://arxiv.org/abs/2507.18071>`_, 2025.
  """
  steps = call(gspo_head, 3e-4, 4e-4), call(sequence_mean_token_mean)
  return Method(advantages.group_norm, steps)


def gmpo() -> Method:
  """GMPO: the geometric mean of token ratios clipped in log space.

  Numbers: 0.4, 0.4: GMPO; verl's `geo_mean`, TRL's `gmpo`.

  Reference: `GMPO <https://arxiv.org/abs/2507.20673>`_, 2025.
  """
  steps = call(gmpo_head, 0.4, 0.4), call(sequence_mean_token_mean)
  return Method(advantages.group_norm, steps)


def cispo() -> Method:
  """CISPO: the clipped ratio as a weight, so that no token falls silent.

  Numbers: 1.0 is no lower bound: MiniMax-M1; 4.0 clips at 5: ScaleRL and TRL.

  Reference: `MiniMax-M1 <https://arxiv.org/abs/2506.13585>`_, 2025.
  """
  steps = call(cispo_head, 1.0, 4.0), call(token_mean)
  return Method(advantages.group_norm, steps)


def lite_ppo() -> Method:
  """Lite PPO: group mean, batch deviation, a mean over tokens.

  Numbers: clip 0.2, 0.2: PPO.

  Reference: `Tricks or Traps? <https://arxiv.org/abs/2508.08221>`_, 2025.
  """
  steps = call(clip_ratio, 0.2, 0.2), call(token_mean)
  return Method(advantages.group_mean_batch_std, steps)


def pass_at_k(k: int = 4) -> Method:
  """Pass@k: only what a completion adds to the best of k counts.

  Args:
    k: completions a prompt will be allowed.

  Numbers: k 4 is ours, half of the usual group; verl takes the whole group.
  Clip 0.2, 0.2: PPO.

  Reference: `Inference Time Objectives <https://arxiv.org/abs/2503.19595>`_,
  2025.
  """
  steps = call(clip_ratio, 0.2, 0.2), call(token_mean)
  return Method(call(advantages.pass_at_k, k=k), steps)


def clip_cov(fraction: float = 2e-4) -> Method:
  """Clip-Cov: a few random tokens of high covariance fall silent.

  Args:
    fraction: share of the completion tokens.

  Numbers: fraction 2e-4 and band 1.0, 5.0: Entropy Mechanism §4.3; clip 1.0,
  1.0: the authors' scripts.

  Reference: `The Entropy Mechanism <https://arxiv.org/abs/2505.22617>`_, 2025.
  """
  steps = (
    call(clip_ratio, 1.0, 1.0),
    call(clip_cov_filter, fraction, 1.0, 5.0),
    call(token_mean),
  )
  return Method(advantages.group_norm, steps)


def kl_cov(fraction: float = 2e-3) -> Method:
  """KL-Cov: the tokens of highest covariance are held near the old policy.

  Args:
    fraction: share of the completion tokens.

  Numbers: fraction 2e-3 for 7B, 2e-4 for 32B, and coef 1.0: Entropy Mechanism
  §4.3. No ratio clip: its equation 14.

  Reference: `The Entropy Mechanism <https://arxiv.org/abs/2505.22617>`_, 2025.
  """
  steps = call(kl_cov_filter, fraction, 1.0), call(token_mean)
  return Method(advantages.group_norm, steps)


def beyond_80_20(fraction: float = 0.2) -> Method:
  """Beyond the 80/20 rule: DAPO on forking tokens only.

  Args:
    fraction: share of the completion tokens.

  Numbers: fraction 0.2, clip 0.2, 0.28: 80/20 §5.2. Scripts also have
  dual=10.0; the paper does not.

  Reference: `Beyond the 80/20 Rule <https://arxiv.org/abs/2506.01939>`_, 2025.
  """
  steps = (
    call(clip_ratio, 0.2, 0.28),
    call(forking_tokens, fraction),
    call(token_mean),
  )
  return Method(advantages.group_norm, steps)


ALL = {
  recipe.__name__: recipe
  for recipe in (
    grpo,
    dr_grpo,
    dapo,
    rloo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    opo,
    gspo,
    gmpo,
    cispo,
    lite_ppo,
    pass_at_k,
    clip_cov,
    kl_cov,
    beyond_80_20,
  )
}
