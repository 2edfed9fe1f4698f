"""Forking tokens on Qwen3-14B-Base at the paper's size.

Reproduces: `Beyond the 80/20 Rule <https://arxiv.org/abs/2506.01939>`_, 2025,
§5.2: configs/qwen3_8b_forking.py with a larger policy.

Hardware: 32 v5p chips; by the plan of docs/pods.md, as no run of this size has
been made here.

  python -m jax_rlvr.train --config configs/qwen3_14b_forking.py \
    --workdir runs/qwen3_14b_forking

The paper's score, DAPO → forking tokens: AIME24 45.21 → 50.42, AIME25 38.13 →
42.92, AMC23 89.53 → 91.56, MATH500 92.23 → 93.59, Minerva 42.16 → 43.20,
OlympiadBench 61.14 → 64.62; average 61.40 → 64.39.

Differs from the paper: as configs/qwen3_8b_forking.py does; all that is said
there holds here.
"""

import dataclasses

from jax_rlvr.config import Config, load


def get_config(
  path='data/dapo-math-17k.parquet',
  eval_path='data',
  lr=1e-6,
  fraction=0.2,
  max_completion_tokens=20_480,
  **overrides,
) -> Config:
  smaller = load(
    f'configs/qwen3_8b_forking.py:{path=},{eval_path=},{lr=},{fraction=},'
    f'{max_completion_tokens=}'
  ).config
  settings = dict(
    policy='Qwen/Qwen3-14B-Base',
    # Keys and values of a slot take 3.7 GB.
    slots=512,
    remat='attention',
    sampling_tensor=4,
  )
  return dataclasses.replace(smaller, **settings | overrides)
