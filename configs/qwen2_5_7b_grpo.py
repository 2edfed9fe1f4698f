"""GRPO on Qwen2.5-7B: what Clip-Cov and KL-Cov are measured against.

Reproduces: `The Entropy Mechanism <https://arxiv.org/abs/2505.22617>`_, 2025,
§4.3, the row 'GRPO' of Table 2: the base model on DAPO-Math-17k, 256 prompts of
8 completions a step, 8 updates a step, groups of equal rewards replaced.

Hardware: 16 v5p chips, or 32 v6e with `:sampling_tensor=2,slots=512`;
by the plans of docs/pods.md, as no run of this size has been made here.

  python -m jax_rlvr.train --config configs/qwen2_5_7b_grpo.py \
    --workdir runs/qwen2_5_7b_grpo

`path` is DAPO-Math-17k as Parquet in verl's schema, prompts being the questions
alone: open-r1/DAPO-Math-17k-Processed on the hub is such, while prompts of the
original ask for 'Answer:'. `eval_path` has aime24.json, aime25.json and
amc23.jsonl; `jax_rlvr.tasks` says where they come from. `policy` may be a
folder.

The paper's score: AIME24 21.2, AIME25 9.6, AMC 58.7 (average of 32 samples at
temperature 0.6); MATH500 78.8, OMNI 27.9, OlympiadBench 40.7, Minerva 36.7
(greedy); average 38.6.

Of the authors' scripts, not in the paper: lr 5e-7 (verl's copy of them has
1e-6), gradients clipped at norm 1, prompts of up to 2,048 tokens, at most 10
times 256 prompts asked a step. Published nowhere: the sentence that asks for a
boxed answer, here verl's; and the number of steps: Figure 11 ends near 2,560
updates, 320 steps.

Differs from the paper: AMC is the 40 problems of AMC23; the four greedy sets
are not evaluated here; prompts that replace dropped ones are asked as many as
are missing, not 256 at a time.
"""

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config
from jax_rlvr.filters import clip_ratio, token_mean, tracked
from jax_rlvr.tasks import aime24, aime25, amc23, verl
from jax_rlvr.tasks.graders import Boxed
from jax_rlvr.tasks.math_sets import SUFFIX


def get_config(
  path='data/dapo-math-17k.parquet', eval_path='data', lr=5e-7, **overrides
) -> Config:
  settings = dict(
    policy='Qwen/Qwen2.5-7B',
    tasks=(
      verl(
        path,
        name='dapo_math',
        # All answers are integers.
        grader=Boxed(symbolic=False),
        suffix=SUFFIX,
        unique=True,
      ),
    ),
    eval_tasks=(
      aime24(f'{eval_path}/aime24.json'),
      aime25(f'{eval_path}/aime25.json'),
      amc23(f'{eval_path}/amc23.jsonl'),
    ),
    advantage=group_norm,
    filters=optax.chain(
      tracked('clip_ratio', clip_ratio(0.2, 0.2)),
      token_mean(),
    ),
    optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr)),
    steps=320,
    prompts_per_step=256,
    group_size=8,
    inner_steps=8,
    max_prompt_tokens=2048,
    max_completion_tokens=8192,
    temperature=1.0,
    dynamic_sampling=True,
    max_asked=10.0,
    eval_every=4,
    eval_samples=32,
    eval_temperature=0.6,
    # Keys and values of a slot take 0.6 GB.
    slots=1024,
    microbatch_tokens=163_840,
    remat='attention',
    sampling_tensor=4,
    scorers=8,
  )
  return Config(**settings | overrides)
