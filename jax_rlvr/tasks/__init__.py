"""Tasks: what is asked and what counts as right. One file a task.

A task is a frozen keyword-only dataclass whose fields are its arguments, all
JSON-able, so that a manifest can rebuild it. It has

* `name`: routes rewards and metrics; unique within a run;
* `prompts(split) -> Sequence[Prompt]`, split 'train' or 'test', the same every
  time and never empty;
* `reward(prompt, completion) -> float | None`, None where no judgement is
  possible; it runs in a worker process with a deadline;
* `traces(split) -> Sequence[Trace]`, only where a warm-up can imitate some.

Write your own in any importable module; nothing is registered. That module
should not import jax: every reward worker imports it.
"""

from jax_rlvr.tasks.addition import Addition
from jax_rlvr.tasks.arithmetic import Arithmetic
from jax_rlvr.tasks.gsm8k import Gsm8k
from jax_rlvr.tasks.mawps import Mawps

__all__ = ['Addition', 'Arithmetic', 'Gsm8k', 'Mawps']
