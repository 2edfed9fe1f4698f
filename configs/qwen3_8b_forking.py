"""Forking tokens on Qwen3-8B-Base at the paper's size.

Reproduces: `Beyond the 80/20 Rule <https://arxiv.org/abs/2506.01939>`_, 2025,
§5.2: DAPO on DAPO-Math-17k, its update on the top 20 % of tokens by entropy.
512 prompts of 16 completions a step, 16 updates a step, groups without a
difference replaced, answers beyond 16,384 tokens penalised up to 20,480.

Hardware: 16 v5p chips, or 32 v6e with
`:slots=128`; by the plans of
docs/pods.md, as no run of this size has been made here.

  pip install '.[math]'
  python -m jax_rlvr.train --config configs/qwen3_8b_forking.py \
    --workdir runs/qwen3_8b_forking

`path` is DAPO-Math-17k as Parquet in verl's schema, prompts being the questions
alone: open-r1/DAPO-Math-17k-Processed on the hub is such, while prompts of the
original ask for 'Answer:'. `eval_path` has aime24.json, aime25.json,
amc23.jsonl and math500.jsonl; `jax_rlvr.tasks` says where they come from.
`policy` may be a folder. With `:fraction=1.0` this is DAPO, what the paper
compares with.

The paper's score, DAPO → forking tokens: AIME24 33.33 → 34.58, AIME25 25.42 →
26.25, AMC23 77.81 → 77.19, MATH500 89.24 → 89.70, Minerva 39.77 → 40.26,
OlympiadBench 56.67 → 57.43; average 53.71 → 54.23. 16 samples at temperature 1.

Of the authors' script, not in the paper: gradients clipped at norm 1, weight
decay 0.1, prompts of up to 2,048 tokens, at most 10 times 1,536 prompts asked a
step, an evaluation every 5 steps. Published nowhere: the number of steps; Table
1 ends at update 1,360 of the 14B run, 85 steps.

Differs from the paper: prompts go through the tokenizer's chat template, the
paper's are 'User:', the question and 'Assistant:'; Minerva and OlympiadBench
are not evaluated here. Of the script and not here: 10 steps of warm-up, which
the paper excludes, a dual clip at 10, ±1 for right and wrong. Unlike the
authors' code, which chooses within each microbatch of each GPU, tokens are
chosen in the whole inner batch.
"""

import optax

from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config
from jax_rlvr.filters import clip_ratio, forking_tokens, token_mean, tracked
from jax_rlvr.tasks import aime24, aime25, amc23, math500, verl
from jax_rlvr.tasks.graders import Boxed, Overlong, Weighted


def get_config(
  path='data/dapo-math-17k.parquet',
  eval_path='data',
  lr=1e-6,
  fraction=0.2,
  max_completion_tokens=20_480,
  **overrides,
) -> Config:
  suffix = (
    '\nPlease reason step by step, and put your final answer within \\boxed{}.'
  )
  # All answers are integers.
  correct = Boxed(symbolic=False)
  overlong = Overlong(max_tokens=max_completion_tokens, buffer=4096)
  grader = Weighted(
    parts={'correct': correct, 'overlong': overlong},
    weights={'correct': 1.0, 'overlong': 1.0},
  )
  settings = dict(
    policy='Qwen/Qwen3-8B-Base',
    tasks=(
      verl(path, name='dapo_math', grader=grader, suffix=suffix, unique=True),
    ),
    eval_tasks=(
      aime24(f'{eval_path}/aime24.json', suffix=suffix),
      aime25(f'{eval_path}/aime25.json', suffix=suffix),
      amc23(f'{eval_path}/amc23.jsonl', suffix=suffix),
      math500(f'{eval_path}/math500.jsonl', suffix=suffix),
    ),
    advantage=group_norm,
    filters=optax.chain(
      tracked('clip_ratio', clip_ratio(0.2, 0.28)),
      tracked('forking_tokens', forking_tokens(fraction)),
      token_mean(),
    ),
    optimizer=optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=0.1)
    ),
    steps=85,
    prompts_per_step=512,
    group_size=16,
    inner_steps=16,
    max_prompt_tokens=2048,
    max_completion_tokens=max_completion_tokens,
    temperature=1.0,
    dynamic_sampling=True,
    max_asked=30.0,
    eval_every=5,
    eval_prompts=500,
    eval_samples=16,
    eval_temperature=1.0,
    checkpoint_every=5,
    # Keys and values of a slot take 3.3 GB.
    slots=256,
    microbatch_tokens=180_224,
    remat='attention',
    sampling_tensor=2,
    scorers=8,
  )
  return Config(**settings | overrides)
