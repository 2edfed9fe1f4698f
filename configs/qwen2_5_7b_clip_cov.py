"""Clip-Cov on Qwen2.5-7B at the paper's size.

Reproduces: `The Entropy Mechanism <https://arxiv.org/abs/2505.22617>`_, 2025,
§4.3, the row 'w. Clip-Cov' of Table 2: configs/qwen2_5_7b_grpo.py with another
chain of filters.

Hardware: 16 v5p chips, or 32 v6e with `:sampling_tensor=2,slots=512`.

  python -m jax_rlvr.train --config configs/qwen2_5_7b_clip_cov.py \
    --workdir runs/qwen2_5_7b_clip_cov

The paper's score: AIME24 22.1, AIME25 15.8, AMC 58.2, MATH500 80.4, OMNI 30.5,
OlympiadBench 44.1, Minerva 41.1; average 40.4.

Of the authors' scripts, not in the paper: clip 1.0, 1.0.

Differs from the paper: an open band, and one token at the least, as the authors
run it. Unlike their code, which chooses within each microbatch of each GPU,
tokens are chosen in the whole inner batch, as the paper writes. For the rest as
configs/qwen2_5_7b_grpo.py does; all that is said there holds here.
"""

import dataclasses

import optax

from jax_rlvr.config import Config, load
from jax_rlvr.filters import clip_cov, clip_ratio, token_mean, tracked


def get_config(
  path='data/dapo-math-17k.parquet',
  eval_path='data',
  lr=5e-7,
  fraction=2e-4,
  **overrides,
) -> Config:
  grpo = load(f'configs/qwen2_5_7b_grpo.py:{path=},{eval_path=},{lr=}').config
  filters = optax.chain(
    tracked('clip_ratio', clip_ratio(1.0, 1.0)),
    tracked('clip_cov', clip_cov(fraction, lower=1.0, upper=5.0)),
    token_mean(),
  )
  return dataclasses.replace(grpo, **{'filters': filters} | overrides)
