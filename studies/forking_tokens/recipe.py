"""DAPO's update on the tokens of highest, or lowest, entropy, or on all.

  python -m jax_rlvr.train --workdir runs/top_20 \
    --config studies/forking_tokens/recipe.py:fraction=0.2,seed=1
"""

import dataclasses

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config, load
from jax_rlvr.filters import clip_ratio, forking_tokens, token_mean, tracked


def get_config(
  on='quickstart',
  seed=0,
  fraction=1.0,
  keep='top',
  rescale=True,
  **overrides,
) -> Config:
  """Clip-higher, as DAPO has it, on a share of the tokens.

  Args:
    on, seed: see studies/setting.py.
    fraction: of the tokens that are updated; 1 is all of them.
    keep: top or bottom, by entropy.
    rescale: divide by the updated tokens, as version 2 of the paper and its
      code; else by all, as version 1.
    overrides: of Config.
  """
  chosen = forking_tokens(fraction, keep, rescale)
  filters = optax.chain(
    tracked('clip_ratio', clip_ratio(0.2, 0.28)),
    tracked('forking_tokens', chosen),
    token_mean(),
  )
  settings = dict(advantage=group_norm, filters=filters)
  common = load(f'studies/setting.py:{on=},{seed=}').config
  return dataclasses.replace(common, **settings | overrides)
