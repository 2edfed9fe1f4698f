"""A run whose programs compile in a minute or two, for plans to be checked."""

import dataclasses

from jax_rlvr.config import load
from jax_rlvr.policy import PolicyConfig


def get_config(**overrides):
  settings = dict(
    policy=PolicyConfig(
      vocab_size=8192,
      layers=4,
      width=1024,
      heads=8,
      kv_heads=4,
      head_size=128,
      feed_forward=2048,
      tied_embeddings=False,
    ),
    warm_up=None,
    prompts_per_step=8,
    group_size=2,
    inner_steps=1,
    max_prompt_tokens=1,
    max_completion_tokens=255,
    row_tokens=256,
    microbatch_tokens=4096,
    slots=16,
    tensor=2,
  )
  config = load('configs/quickstart.py').config
  return dataclasses.replace(config, **settings | overrides)
