"""Filters of token gradients: optax transformations, one file per evidence.

`ALL` is the menu: each public filter's name and factory.
"""

from jax_rlvr.filters.aggregate import (
  sequence_mean_token_mean as sequence_mean_token_mean,
)
from jax_rlvr.filters.aggregate import (
  sequence_mean_token_sum as sequence_mean_token_sum,
)
from jax_rlvr.filters.aggregate import token_mean as token_mean
from jax_rlvr.filters.base import stateless as stateless
from jax_rlvr.filters.base import tracked as tracked
from jax_rlvr.filters.covariance import clip_cov as clip_cov
from jax_rlvr.filters.covariance import covariance as covariance
from jax_rlvr.filters.covariance import kl_cov as kl_cov
from jax_rlvr.filters.entropy import entropy_bonus as entropy_bonus
from jax_rlvr.filters.entropy import forking_tokens as forking_tokens
from jax_rlvr.filters.ratio import clip_ratio as clip_ratio
from jax_rlvr.policy_gradient import policy_gradient as policy_gradient

ALL = {
  factory.__name__: factory
  for factory in (
    clip_ratio,
    clip_cov,
    kl_cov,
    forking_tokens,
    entropy_bonus,
    token_mean,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
  )
}
