"""GSM8K's real text with SmolLM2-135M-Instruct: a run that exercises all parts.

A model of this size solves about one problem in fifty; expect no curve. The
text comes through TensorFlow Datasets, or from a folder with train.jsonl and
test.jsonl:

  python -m jax_rlvr.train \
    --config "configs/smollm2_gsm8k.py:path='path/to/gsm8k'" \
    --workdir runs/smollm2_gsm8k
"""

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config
from jax_rlvr.filters import clip_cov, clip_ratio, token_mean, tracked
from jax_rlvr.policy import smollm2_path
from jax_rlvr.tasks import Gsm8k


def get_config(path=None, lr=1e-6, fraction=2e-3, **overrides) -> Config:
  settings = dict(
    policy=smollm2_path(),
    tasks=(Gsm8k(path=path),),
    advantage=group_norm,
    filters=optax.chain(
      tracked('clip_ratio', clip_ratio(1.0, 1.0)),
      tracked('clip_cov', clip_cov(fraction, lower=1.0, upper=5.0)),
      token_mean(),
    ),
    optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr)),
    steps=3,
    prompts_per_step=4,
    group_size=4,
    inner_steps=2,
    microbatch_tokens=1280,
    row_tokens=640,
    max_prompt_tokens=272,
    max_completion_tokens=128,
    slots=16,
    eval_every=3,
    eval_prompts=8,
    eval_samples=2,
    checkpoint_every=3,
    keep_checkpoints=1,
  )
  return Config(**settings | overrides)
