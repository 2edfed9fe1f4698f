"""GRPO with clip-higher on Qwen2.5-7B: the stronger baseline of Clip-Cov.

Reproduces: `The Entropy Mechanism <https://arxiv.org/abs/2505.22617>`_, 2025,
§4.3, the row 'w. Clip-higher' of Table 2: configs/qwen2_5_7b_grpo.py, whose
ratios may rise to 1.28.

Hardware: 16 v5p chips, or 32 v6e with `:sampling_tensor=2,slots=512`.

  python -m jax_rlvr.train --config configs/qwen2_5_7b_clip_higher.py \
    --workdir runs/qwen2_5_7b_clip_higher

The paper's score: AIME24 18.1, AIME25 11.5, AMC 56.6, MATH500 79.2, OMNI 29.8,
OlympiadBench 43.3, Minerva 40.4; average 38.8.

Differs from the paper: as configs/qwen2_5_7b_grpo.py does; all that is said
there of data and numbers holds here.
"""

import dataclasses

import optax

from jax_rlvr.config import Config, load
from jax_rlvr.filters import clip_ratio, token_mean, tracked


def get_config(
  path='data/dapo-math-17k.parquet', eval_path='data', lr=5e-7, **overrides
) -> Config:
  grpo = load(f'configs/qwen2_5_7b_grpo.py:{path=},{eval_path=},{lr=}').config
  filters = optax.chain(
    tracked('clip_ratio', clip_ratio(0.2, 0.28)),
    token_mean(),
  )
  return dataclasses.replace(grpo, **{'filters': filters} | overrides)
