"""KL-Cov on Qwen2.5-32B at the paper's size: its best scores.

Reproduces: `The Entropy Mechanism <https://arxiv.org/abs/2505.22617>`_, 2025,
§4.3, the row 'w. KL-Cov' of Table 2 for 32B.

Hardware: 64 v5p chips, or 128 v6e with `:slots=512,remat=full`; by the plans of
docs/pods.md, as no run of this size has been made here.

  python -m jax_rlvr.train --config configs/qwen2_5_32b_kl_cov.py \
    --workdir runs/qwen2_5_32b_kl_cov

The paper's score: AIME24 36.8, AIME25 30.8, AMC 74.5, MATH500 84.6, OMNI 39.1,
OlympiadBench 49.0, Minerva 46.3; average 52.2. GRPO has 45.8, with clip-higher
47.2.

Of the authors' scripts, not in the paper: lr 1e-6. Published nowhere: the
number of steps; Figure 11 ends near 1,090 updates, 136 steps.

Differs from the paper: as configs/qwen2_5_7b_kl_cov.py does; all that is said
there holds here. The fraction is a tenth of that for 7B.
"""

import dataclasses

import optax

from jax_rlvr.config import Config, load
from jax_rlvr.filters import kl_cov, token_mean, tracked


def get_config(
  path='data/dapo-math-17k.parquet',
  eval_path='data',
  lr=1e-6,
  fraction=2e-4,
  coef=1.0,
  **overrides,
) -> Config:
  grpo = load(f'configs/qwen2_5_7b_grpo.py:{path=},{eval_path=},{lr=}').config
  settings = dict(
    policy='Qwen/Qwen2.5-32B',
    filters=optax.chain(
      tracked('kl_cov', kl_cov(fraction, coef)),
      token_mean(),
    ),
    steps=136,
    # Keys and values of a slot take 2.7 GB.
    slots=1024,
    remat='attention',
    sampling_tensor=8,
  )
  return dataclasses.replace(grpo, **settings | overrides)
