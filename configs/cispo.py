"""CISPO on the quickstart's sums: the clipped ratio is a weight, not a mask.

Method: `MiniMax-M1 <https://arxiv.org/abs/2506.13585>`_, 2025: REINFORCE with
each token weighed by its clipped ratio, so that no token falls silent.

  python -m jax_rlvr.train --config configs/cispo.py --workdir runs/cispo

Numbers: low 1.0 is no lower bound, as in the paper, which does not publish its
upper one; high 4.0 clips at 5: ScaleRL's and TRL's. Four updates a batch are
ours. The paper's dynamic sampling is left out (`:dynamic_sampling=True`), its
length penalty has nothing to do here.

Score, seed 0, 80 steps: held-out pass@1 0.23 → 0.79, pass@8 0.75 → 0.91,
entropy 1.16 → 0.16 nats. The rate is ours: 1e-3 ends lower.

Policy, warm-up, batches and hardware are those of configs/quickstart.py.
"""

import dataclasses

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config, load
from jax_rlvr.filters import cispo, token_mean, tracked


def get_config(lr=5e-4, low=1.0, high=4.0, **overrides) -> Config:
  quickstart = load(f'configs/quickstart.py:{lr=}').config
  settings = dict(
    advantage=group_norm,
    filters=optax.chain(tracked('cispo', cispo(low, high)), token_mean()),
    steps=80,
    inner_steps=4,
  )
  return dataclasses.replace(quickstart, **settings | overrides)
