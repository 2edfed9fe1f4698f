"""Filters that hold the policy near a reference."""

from __future__ import annotations

import jax.numpy as jnp

from jax_rlvr import masked
from jax_rlvr.evidence import bounded, within
from jax_rlvr.filters.base import Filter, evidence, reporting

# x = logprob − ref_logprob of tokens drawn from the policy.
_VALUES = {
  'k1': lambda x: x,
  'k2': lambda x: x**2 / 2,
  'k3': lambda x: jnp.expm1(-x) + x,
}
_GRADIENTS = {
  'k1': jnp.ones_like,
  'k2': lambda x: x,
  'k3': lambda x: -jnp.expm1(-x),
}


def kl_penalty(coef=0.04, value='k3', gradient='k3') -> Filter:
  """Adds coef · KL(current ‖ reference), estimated on the sampled token.

  With x = logprob − ref_logprob: k1 = x, k2 = x²/2, k3 = e⁻ˣ − 1 + x. Value and
  gradient are named apart, because an estimator that is good as one is bad as
  the other: on policy, the gradient of k1 is 0 in the mean, that of k2 is the
  KL's own, that of k3 is that of KL(reference ‖ current). Tokens with |x| > 20
  are not pulled.

  Args:
    coef: weight of the penalty, advantage per nat.
    value: the estimator whose mean is reported.
    gradient: the estimator that is differentiated; 'k2' under value 'k3' is
      what verl calls k3+.

  Reads: logprob, ref_logprob. Writes: logprob. Kind: penalty.
  Neutral: coef 0.
  Reports: `kl`, nats, its mean over the completion tokens.
  Defaults: coef 0.04, k3: GRPO (DeepSeekMath §4.2); verl has 1e-3. RLVR runs of
  the two core papers have none.

  >>> filters = optax.chain(clip_ratio(), kl_penalty(1e-3), token_mean())

  References: Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_,
  2024; Schulman, `Approximating KL divergence
  <http://joschu.net/blog/kl-approx.html>`_, 2020.
  """
  for name, chosen in (('value', value), ('gradient', gradient)):
    if chosen not in _VALUES:
      raise ValueError(
        f'{name}={chosen!r} is unknown; choose from {sorted(_VALUES)}'
      )

  def body(grads, stats, tokens, key):
    del key
    mask = tokens.mask
    reference = evidence(tokens, 'ref_logprob', 'kl_penalty')
    gap = stats.logprob - reference
    x = bounded(gap, mask)
    pull = jnp.where(within(gap, mask), coef * _GRADIENTS[gradient](x), 0.0)
    kl = masked.mean(_VALUES[value](x), mask)
    return grads._replace(logprob=grads.logprob + pull), {'kl': kl}

  return reporting(body, 'kl')
