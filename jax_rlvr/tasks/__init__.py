"""Tasks: what is asked and what counts as right. One file a task.

A task is a frozen keyword-only dataclass whose fields are its arguments, JSON
values and dataclasses of such, so that a manifest can rebuild it. It has

* `name`: routes rewards and metrics; unique within a run;
* `prompts(split) -> Sequence[Prompt]`, split 'train' or 'test', the same every
  time and never empty;
* `reward(prompt, completion) -> float | dict | None`, None where no judgement
  is possible, a dict of 'reward', 'outcome' and parts where a reward has some;
  it runs in a worker process with a deadline;
* `rewards(prompts, completions) -> list`, only where many are judged at once;
* `extract(completion) -> Hashable | None`, only where a final answer can be
  told: it votes in maj@k;
* `traces(split) -> Sequence[Trace]`, only where a warm-up can imitate some.

Rows of your own make a task without a class: `Dataset(name=…, train=Json(…),
grader=…)`. Else write your own in any importable module; nothing is registered.
That module should not import jax: every reward worker imports it.
"""

from jax_rlvr.tasks.addition import Addition
from jax_rlvr.tasks.arithmetic import Arithmetic
from jax_rlvr.tasks.countdown import Countdown
from jax_rlvr.tasks.dataset import Dataset, verl
from jax_rlvr.tasks.gsm8k import Gsm8k
from jax_rlvr.tasks.gym import ReasoningGym
from jax_rlvr.tasks.math_sets import aime24, aime25, amc23, math500, math_train
from jax_rlvr.tasks.mawps import Mawps
from jax_rlvr.tasks.sources import Json, Parquet, Rows, Tfds

__all__ = [
  'Addition',
  'Arithmetic',
  'Countdown',
  'Dataset',
  'Gsm8k',
  'Json',
  'Mawps',
  'Parquet',
  'ReasoningGym',
  'Rows',
  'Tfds',
  'aime24',
  'aime25',
  'amc23',
  'math500',
  'math_train',
  'verl',
]
