"""A method that selects in the whole inner batch, or in each microbatch.

  python -m jax_rlvr.train --workdir runs/clip_cov_16 \
    --config studies/exactness/recipe.py:method=clip_cov,microbatches=16,seed=1
"""

import dataclasses

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config, load
from jax_rlvr.filters import (
  clip_cov,
  clip_ratio,
  forking_tokens,
  kl_cov,
  per_microbatch,
  token_mean,
  tracked,
)


def chain(method, microbatches, sequences):
  """The filters of a method.

  Args:
    method: clip_cov, kl_cov or forking_tokens.
    microbatches: that the references' codes would cut an inner batch into, and
      select, centre and average in; 0 is this package's own way, which does not
      depend on them.
    sequences: of an inner batch.
  """
  chains = {
    'clip_cov': (
      clip_ratio(1.0, 1.0),
      tracked('clip_cov', clip_cov(1e-2, lower=1.0, upper=5.0)),
    ),
    'kl_cov': (tracked('kl_cov', kl_cov(2e-2, 1.0)),),
    'forking_tokens': (
      clip_ratio(0.2, 0.28),
      tracked('forking_tokens', forking_tokens(0.2)),
    ),
  }
  whole = optax.chain(*chains[method], token_mean())
  if not microbatches:
    return whole
  # Theirs is a mean of microbatches' means.
  return optax.chain(
    per_microbatch(whole, rows=sequences // microbatches),
    optax.scale(1 / microbatches),
  )


def get_config(
  on='quickstart', seed=0, method='clip_cov', microbatches=0, **overrides
) -> Config:
  """See `chain`; on, seed: see studies/setting.py."""
  c = load(f'studies/setting.py:{on=},{seed=}').config
  sequences = c.sequences // c.inner_steps
  filters = chain(method, microbatches, sequences)
  settings = dict(advantage=group_norm, filters=filters)
  return dataclasses.replace(c, **settings | overrides)
