"""Filters of token gradients: optax transformations, one file per evidence.

`ALL` is the menu: each public filter's name and factory, in the order in which
a chain would have them.
"""

from jax_rlvr.filters.aggregate import (
  sequence_mean_token_mean as sequence_mean_token_mean,
)
from jax_rlvr.filters.aggregate import (
  sequence_mean_token_sum as sequence_mean_token_sum,
)
from jax_rlvr.filters.aggregate import token_mean as token_mean
from jax_rlvr.filters.aggregate import token_sum as token_sum
from jax_rlvr.filters.base import per_microbatch as per_microbatch
from jax_rlvr.filters.base import stateless as stateless
from jax_rlvr.filters.base import tracked as tracked
from jax_rlvr.filters.covariance import clip_cov as clip_cov
from jax_rlvr.filters.covariance import kl_cov as kl_cov
from jax_rlvr.filters.divergence import kl_penalty as kl_penalty
from jax_rlvr.filters.entropy import entropy_above as entropy_above
from jax_rlvr.filters.entropy import entropy_bonus as entropy_bonus
from jax_rlvr.filters.entropy import forking_tokens as forking_tokens
from jax_rlvr.filters.off_policy import icepop as icepop
from jax_rlvr.filters.off_policy import opsm as opsm
from jax_rlvr.filters.off_policy import sequence_mask as sequence_mask
from jax_rlvr.filters.off_policy import tis as tis
from jax_rlvr.filters.ratio import cispo as cispo
from jax_rlvr.filters.ratio import clip_ratio as clip_ratio
from jax_rlvr.filters.ratio import gmpo as gmpo
from jax_rlvr.filters.ratio import gspo as gspo
from jax_rlvr.policy_gradient import policy_gradient as policy_gradient

ALL = {
  factory.__name__: factory
  for factory in (
    gspo,
    gmpo,
    cispo,
    clip_ratio,
    clip_cov,
    kl_cov,
    forking_tokens,
    entropy_above,
    tis,
    icepop,
    sequence_mask,
    opsm,
    entropy_bonus,
    kl_penalty,
    token_mean,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_sum,
  )
}
