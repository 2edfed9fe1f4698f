"""Filters of token gradients: optax transformations, one file per evidence.

`ALL` is the menu: name and factory of every filter that is imported here; the
tools of `base` are none. A new filter joins by its import.
"""

import inspect

from jax_rlvr.filters import base
from jax_rlvr.filters import recipes as recipes
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
  name: value
  for name, value in tuple(globals().items())
  if inspect.isfunction(value)
  and value.__module__.startswith(f'{__name__}.')
  and value.__module__ != base.__name__
}
