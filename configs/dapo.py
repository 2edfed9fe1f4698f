"""DAPO on the quickstart's sums: clip-higher, dynamic sampling, token mean.

Method: `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025: ratios may rise
further than they may fall, every token of the batch weighs the same, and groups
that are all right or all wrong are dropped and replaced by others.

  python -m jax_rlvr.train --config configs/dapo.py --workdir runs/dapo

Numbers: clip 0.2, 0.28: §4.1. It has 16 updates a batch of 512 prompts; 4 of 64
here. No answer is ever overlong here, so its penalty is left out;
configs/qwen3_8b_forking.py has it.

Score, seed 0, 80 steps: held-out pass@1 0.23 → 0.88, pass@8 0.75 → 0.94,
entropy 1.16 → 0.11 nats. The rate is ours.

Policy, warm-up, batches and hardware are those of configs/quickstart.py. A step
asks more prompts the more of them are solved.
"""

import dataclasses

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config, load
from jax_rlvr.filters import clip_ratio, token_mean, tracked


def get_config(lr=5e-4, **overrides) -> Config:
  quickstart = load(f'configs/quickstart.py:{lr=}').config
  settings = dict(
    advantage=group_norm,
    filters=optax.chain(
      tracked('clip_ratio', clip_ratio(0.2, 0.28)),
      token_mean(),
    ),
    steps=80,
    inner_steps=4,
    dynamic_sampling=True,
    max_asked=10.0,
  )
  return dataclasses.replace(quickstart, **settings | overrides)
