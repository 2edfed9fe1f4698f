"""Clip-Cov in place of GRPO's plain chain on configs/smollm2_arithmetic.py.

The fraction is fifty times the paper's: a batch has about a thousand completion
tokens, where the paper's have tens of thousands.

  python -m jax_rlvr.train --config configs/smollm2_arithmetic_clip_cov.py \
    --workdir runs/smollm2_clip_cov
"""

import dataclasses

import optax

from jax_rlvr.config import Config, load
from jax_rlvr.filters import clip_cov, clip_ratio, token_mean, tracked


def get_config(fraction=1e-2, **overrides) -> Config:
  grpo = load('configs/smollm2_arithmetic.py').config
  filters = optax.chain(
    tracked('clip_ratio', clip_ratio(1.0, 1.0)),
    tracked('clip_cov', clip_cov(fraction, lower=1.0, upper=5.0)),
    token_mean(),
  )
  return dataclasses.replace(grpo, **{'filters': filters} | overrides)
