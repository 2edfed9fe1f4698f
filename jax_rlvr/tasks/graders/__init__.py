"""Graders: whether an answer is right. One file a grader.

A grader is a frozen keyword-only dataclass whose fields are its arguments, all
JSON-able or graders themselves, so that a manifest can rebuild it. It has

* `grader(prompt, completion) -> float | dict | None`: the reward; or a dict of
  'reward', where wanted 'outcome', the part that says right or wrong, and
  components by name; or None where no judgement is possible. It runs in a
  worker process with a deadline, as tasks' rewards do;
* `extract(completion) -> str | None`, only where there is one: the final answer
  as it votes, the same text for answers that are the same;
* `require()`, only where something must be installed: raises what it lacks, so
  that a task can do so before the run.

None of these modules imports jax, and what is heavy they import when called.

Example:
  >>> from jax_rlvr.records import Completion, Prompt, user
  >>> prompt = Prompt(messages=user('What is 3 * 4?'), answer='12')
  >>> Number()(prompt, Completion(text='3 * 4 = **12.0**.'))
  1.0
"""

from jax_rlvr.tasks.graders.boxed import Boxed
from jax_rlvr.tasks.graders.choice import Choice
from jax_rlvr.tasks.graders.code import Code
from jax_rlvr.tasks.graders.countdown import Countdown
from jax_rlvr.tasks.graders.exact import Exact
from jax_rlvr.tasks.graders.function import Function
from jax_rlvr.tasks.graders.gym import Gym
from jax_rlvr.tasks.graders.length import Finished, Overlong
from jax_rlvr.tasks.graders.number import Number
from jax_rlvr.tasks.graders.weighted import Weighted

__all__ = [
  'Boxed',
  'Choice',
  'Code',
  'Countdown',
  'Exact',
  'Finished',
  'Function',
  'Gym',
  'Number',
  'Overlong',
  'Weighted',
]
