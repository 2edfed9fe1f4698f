"""A run directory as training leaves it, of a policy that was not trained."""

import dataclasses
import json

import jax
import numpy as np

from jax_rlvr import policy
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.records import TrainState
from jax_rlvr.tokenizer import train_characters

TOKENIZER = train_characters('0123456789+=')
POLICY = policy.PolicyConfig(
  vocab_size=TOKENIZER.vocab_size,
  layers=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_size=8,
  feed_forward=24,
)


def write(workdir, steps=(1, 2)):
  """Checkpoints of random weights, each drawn with its step as the seed."""
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    for step in steps:
      params = policy.init(POLICY, jax.random.key(step))
      state = TrainState(np.int32(step), np.int32(0), params, {}, {})
      checkpoints.save(state)
  TOKENIZER.save(workdir / 'tokenizer')
  manifest = {'policy': dataclasses.asdict(POLICY)}
  (workdir / 'manifest.json').write_text(json.dumps(manifest))
