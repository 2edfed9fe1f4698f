"""What a policy answers to a task's prompts, and what that is worth."""

import numpy as np

from jax_rlvr.analysis import forking
from jax_rlvr.records import Completion


def ask(policy, task, prompts, samples, max_new_tokens, **how):
  """Completes each prompt so many times.

  Args:
    policy: see `jax_rlvr.load_policy`.
    task: that rewards.
    prompts: P of them.
    samples: G of each.
    max_new_tokens: where completions are cut.
    how: for `LoadedPolicy.generate`.

  Returns:
    The prompts' ids, the completions [P][G], and their rewards [P, G].
  """
  ids = [policy.tokenizer.render(p.messages) for p in prompts]
  made = policy.generate(
    ids, samples=samples, max_new_tokens=max_new_tokens, slots=512, **how
  )
  rewards = [
    [
      task.reward(
        prompt,
        Completion(text=m.text, length=len(m.ids), truncated=m.truncated),
      )
      for m in group
    ]
    for prompt, group in zip(prompts, made, strict=True)
  ]
  return ids, made, np.array(rewards, float)


def texts(ids, made) -> forking.Texts:
  """Prompts [P] with their completions [P][G], one row each."""
  pairs = [
    (prompt, m.ids)
    for prompt, group in zip(ids, made, strict=True)
    for m in group
  ]
  return forking.texts(*zip(*pairs, strict=True))
