"""The quickstart with every part of a run's state in use, and bad rewards."""

import dataclasses
import pathlib

import optax

from jax_rlvr import config
from jax_rlvr.filters import (
  clip_cov,
  clip_ratio,
  kl_penalty,
  token_mean,
  tracked,
)
from tests.chaos.hanging import HangingAddition

QUICKSTART = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py'


def get_config(
  hangs=4001, digits=2, held_out=500, warm_up_steps=300, **overrides
) -> config.Config:
  spec = f'{QUICKSTART}:{digits=},{held_out=},{warm_up_steps=}'
  quickstart = config.load(spec).config
  (addition,) = quickstart.tasks
  settings = {
    field.name: getattr(quickstart, field.name)
    for field in dataclasses.fields(quickstart)
  }
  settings |= dict(
    tasks=(HangingAddition(**dataclasses.asdict(addition), hangs=hangs),),
    filters=optax.chain(
      tracked('clip_ratio', clip_ratio(1.0, 1.0)),
      tracked('clip_cov', clip_cov(2e-3, lower=1.0, upper=5.0)),
      tracked('kl_penalty', kl_penalty(1e-3)),
      token_mean(),
    ),
    inner_steps=2,
    balance_rewards=True,
    reference=True,
    reference_every=50,
    oversample=1.25,
    dynamic_sampling=True,
    reward_deadline_s=3.0,
    steps=200,
    eval_every=50,
    eval_prompts=100,
    checkpoint_every=10,
  )
  return config.Config(**settings | overrides)
