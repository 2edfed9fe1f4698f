"""Clip-Cov on Qwen2.5-32B at the paper's size.

Reproduces: `The Entropy Mechanism <https://arxiv.org/abs/2505.22617>`_, 2025,
§4.3, the row 'w. Clip-Cov' of Table 2 for 32B.

Hardware: 64 v5p chips, or 128 v6e with `:slots=512,remat=full`; by the plans of
docs/pods.md, as no run of this size has been made here.

  python -m jax_rlvr.train --config configs/qwen2_5_32b_clip_cov.py \
    --workdir runs/qwen2_5_32b_clip_cov

The paper's score: AIME24 32.3, AIME25 22.7, AMC 67.2, MATH500 87.0, OMNI 42.0,
OlympiadBench 57.2, Minerva 46.0; average 50.3. GRPO has 45.8, with clip-higher
47.2.

Of the authors' scripts, not in the paper: lr 1e-6; clip 1.0, 1.0. Published
nowhere: the number of steps; Figure 11 ends near 1,090 updates, 136 steps.

Differs from the paper: as configs/qwen2_5_7b_clip_cov.py does; all that is said
there holds here.
"""

import dataclasses

import optax

from jax_rlvr.config import Config, load
from jax_rlvr.filters import clip_cov, clip_ratio, token_mean, tracked


def get_config(
  path='data/dapo-math-17k.parquet',
  eval_path='data',
  lr=1e-6,
  fraction=2e-4,
  **overrides,
) -> Config:
  grpo = load(f'configs/qwen2_5_7b_grpo.py:{path=},{eval_path=},{lr=}').config
  settings = dict(
    policy='Qwen/Qwen2.5-32B',
    filters=optax.chain(
      tracked('clip_ratio', clip_ratio(1.0, 1.0)),
      tracked('clip_cov', clip_cov(fraction, lower=1.0, upper=5.0)),
      token_mean(),
    ),
    steps=136,
    # Keys and values of a slot take 2.7 GB.
    slots=1024,
    remat='attention',
    sampling_tensor=8,
  )
  return dataclasses.replace(grpo, **settings | overrides)
