r"""Mathematics as others train and evaluate on it; files are yours to fetch.

Questions end with verl's sentence, and answers are to be in \boxed{}. All other
arguments are those of `Dataset`: `math500(path, suffix='')`.
"""

from __future__ import annotations

from typing import Any

from jax_rlvr.tasks import graders
from jax_rlvr.tasks.dataset import Dataset, verl
from jax_rlvr.tasks.sources import Json, Path

# https://github.com/volcengine/verl, examples/data_preprocess/math_dataset.py
SUFFIX = (
  " Let's think step by step and output the final answer within \\boxed{}."
)


def math_train(path: Path, **rest: Any) -> Dataset:
  """The 7,470 problems of MATH's train split that have an answer.

  From https://github.com/rllm-org/rllm (MIT), rllm/data/train/math/math.json,
  whose other four rows have none. Shares no problem with MATH-500.

  References: Hendrycks et al., Measuring Mathematical Problem Solving With the
  MATH Dataset, https://arxiv.org/abs/2103.03874, 2021.
  """
  return _problems('train', path, 'math', graders.Boxed(), rest)


def math500(path: Path, **rest: Any) -> Dataset:
  """The 500 of MATH's test problems that are mostly evaluated.

  From https://github.com/hkust-nlp/simpleRL-reason,
  examples/simplelr_math_eval/data/math500/test.jsonl.

  References: Lightman et al., Let's Verify Step by Step,
  https://arxiv.org/abs/2305.20050, 2023.
  """
  return _problems('test', path, 'math500', graders.Boxed(), rest)


def amc23(path: Path, **rest: Any) -> Dataset:
  """The 40 problems of AMC 12 2023 with a number as answer.

  From https://github.com/hkust-nlp/simpleRL-reason,
  examples/simplelr_math_eval/data/amc23/test.jsonl; answers are as '27.0'.
  """
  grader = graders.Boxed(symbolic=False)
  return _problems('test', path, 'amc23', grader, rest)


def aime24(path: Path, **rest: Any) -> Dataset:
  """The 30 problems of AIME 2024, whose answers are integers.

  From https://github.com/Kwai-Klear/ERC, data/aime960_math_verify_uni.json, or
  https://github.com/BytedTsinghua-SIA/DAPO, eval/aime-2024.parquet: that one
  has each problem 32 times, of which one is asked, in a prompt of its own: for
  it give `suffix=''` and a grader that reads 'Answer: …'.
  """
  return _competition(path, 'aime24', rest)


def aime25(path: Path, **rest: Any) -> Dataset:
  """The 30 problems of AIME 2025, whose answers are integers.

  From https://github.com/Kwai-Klear/ERC, data/aime960_math_verify25_uni.json.
  """
  return _competition(path, 'aime25', rest)


def _problems(
  split: str, path: Path, name: str, grader: Any, rest: dict[str, Any]
) -> Dataset:
  defaults: dict[str, Any] = {
    'name': name,
    'grader': grader,
    split: Json(path),
    'prompt': 'problem',
    'suffix': SUFFIX,
  }
  return Dataset(**(defaults | rest))


def _competition(path: Path, name: str, rest: dict[str, Any]) -> Dataset:
  defaults: dict[str, Any] = {
    'name': name,
    'grader': graders.Boxed(symbolic=False),
    'split': 'test',
    'suffix': SUFFIX,
    'unique': True,
  }
  return verl(path, **(defaults | rest))
