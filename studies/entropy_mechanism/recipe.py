"""The papers' baselines and methods, one at a time, all else equal.

  python -m jax_rlvr.train --workdir runs/clip_cov \
    --config studies/entropy_mechanism/recipe.py:method=clip_cov,seed=1
"""

import dataclasses

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config, load
from jax_rlvr.filters import (
  clip_cov,
  clip_ratio,
  entropy_bonus,
  kl_cov,
  kl_penalty,
  token_mean,
  tracked,
)


def get_config(
  on='quickstart',
  seed=0,
  method='grpo',
  fraction=1e-2,
  coef=1.0,
  **overrides,
) -> Config:
  """See the method's name below.

  Args:
    on, seed: see studies/setting.py.
    method: grpo, clip_higher, clip_cov, kl_cov, bonus, kl or on_policy.
    fraction: of the tokens that clip_cov and kl_cov choose; the paper's 2e-4
      and 2e-3 would be none of the 400 tokens that an update has here.
    coef: of kl_cov, bonus and kl.
    overrides: of Config.
  """
  ppo = tracked('clip_ratio', clip_ratio(0.2, 0.2))
  chains = {
    'grpo': (ppo,),
    'clip_higher': (tracked('clip_ratio', clip_ratio(0.2, 0.28)),),
    'clip_cov': (
      tracked('clip_ratio', clip_ratio(1.0, 1.0)),
      tracked('clip_cov', clip_cov(fraction, lower=1.0, upper=5.0)),
    ),
    'kl_cov': (tracked('kl_cov', kl_cov(fraction, coef)),),
    'bonus': (ppo, entropy_bonus(coef)),
    'kl': (ppo, tracked('kl', kl_penalty(coef))),
    # One update a batch, whose ratios are 1: the policy gradient of Fig. 8.
    'on_policy': (),
  }
  common = f'studies/setting.py:{on=},{seed=}'
  settings = dict(
    advantage=group_norm,
    filters=optax.chain(*chains[method], token_mean()),
    reference=method == 'kl',
  )
  if method == 'on_policy':
    settings['inner_steps'] = 1
  return dataclasses.replace(load(common).config, **settings | overrides)
