"""KL-Cov on the quickstart's sums: a few tokens are held where they were.

Method: `The Entropy Mechanism <https://arxiv.org/abs/2505.22617>`_, 2025: the
tokens whose log-probability and advantage vary together most, those that make
entropy collapse, pay for moving away from the policy that drew them. There is
no ratio clip: its equation 14.

  python -m jax_rlvr.train --config configs/kl_cov.py --workdir runs/kl_cov

Numbers: coef 1.0: §4.3. The paper's fraction is 2e-3 (7B) of 10⁴ and more
tokens, at 8 updates a batch; here there are 4, each of some 380 tokens, of
which 2e-2 are seven. In the first of them nothing has moved yet: with
`:inner_steps=1` this is the plain policy gradient.
configs/qwen2_5_7b_kl_cov.py is the paper's.

Score, seed 0, 80 steps: held-out pass@1 0.23 → 0.81, pass@8 0.75 → 0.93,
entropy 1.16 → 0.15 nats. The rate is ours, the best of 1e-3,
5e-4 and 3e-4.

Policy, warm-up, batches and hardware are those of configs/quickstart.py.
"""

import dataclasses

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config, load
from jax_rlvr.filters import kl_cov, token_mean, tracked


def get_config(lr=5e-4, fraction=2e-2, coef=1.0, **overrides) -> Config:
  quickstart = load(f'configs/quickstart.py:{lr=}').config
  settings = dict(
    advantage=group_norm,
    filters=optax.chain(
      tracked('kl_cov', kl_cov(fraction, coef)),
      token_mean(),
    ),
    steps=80,
    inner_steps=4,
  )
  return dataclasses.replace(quickstart, **settings | overrides)
