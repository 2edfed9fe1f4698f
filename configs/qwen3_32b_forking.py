"""Forking tokens on Qwen3-32B-Base at the paper's size.

Reproduces: `Beyond the 80/20 Rule <https://arxiv.org/abs/2506.01939>`_, 2025,
§5.2: configs/qwen3_8b_forking.py with a larger policy.

Hardware: 64 v5p chips, or 128 v6e with `:slots=256,remat=full`; by the plans of
docs/pods.md, as no run of this size has been made here. The base model is not
public: give a folder of one by `:policy=`, or another model of that size.

  python -m jax_rlvr.train --config configs/qwen3_32b_forking.py \
    --workdir runs/qwen3_32b_forking

The paper's score, DAPO → forking tokens: AIME24 55.83 → 63.54, AIME25 45.63 →
56.67, AMC23 91.88 → 94.22, MATH500 94.36 → 94.88, Minerva 45.70 → 45.82,
OlympiadBench 66.16 → 69.02; average 66.59 → 70.69.

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
    policy='Qwen/Qwen3-32B-Base',
    # Keys and values of a slot take 5.9 GB.
    slots=512,
    remat='attention',
    sampling_tensor=8,
  )
  return dataclasses.replace(smaller, **settings | overrides)
