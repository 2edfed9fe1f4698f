"""Forking tokens on the quickstart's sums: DAPO's update on the top 20 %.

Method: `Beyond the 80/20 Rule <https://arxiv.org/abs/2506.01939>`_, 2025: only
the tokens of highest entropy, where a completion forks, get a gradient, and
only they are counted in the mean.

  python -m jax_rlvr.train --config configs/forking_tokens.py \
    --workdir runs/forking_tokens

Numbers: fraction 0.2, clip 0.2, 0.28: §5.2. It has 16 updates a batch of 512
prompts; 4 of 64 here. The paper's average gains 0.5 points at 8B and 4.1 at
32B: expect none here. DAPO's dynamic sampling is left out
(`:dynamic_sampling=True`), its overlong penalty has nothing to do;
configs/qwen3_8b_forking.py has both.

Score, seed 0, 80 steps: held-out pass@1 0.23 → 0.71, pass@8 0.75 → 0.93,
entropy 1.16 → 0.31 nats. The rate is ours: 1e-3 ends lower.

Policy, warm-up, batches and hardware are those of configs/quickstart.py.
"""

import dataclasses

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config, load
from jax_rlvr.filters import clip_ratio, forking_tokens, token_mean, tracked


def get_config(lr=5e-4, fraction=0.2, **overrides) -> Config:
  quickstart = load(f'configs/quickstart.py:{lr=}').config
  settings = dict(
    advantage=group_norm,
    filters=optax.chain(
      tracked('clip_ratio', clip_ratio(0.2, 0.28)),
      tracked('forking_tokens', forking_tokens(fraction)),
      token_mean(),
    ),
    steps=80,
    inner_steps=4,
  )
  return dataclasses.replace(quickstart, **settings | overrides)
