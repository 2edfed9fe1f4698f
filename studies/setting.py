"""What the runs of all studies have in common: a policy, four inner steps.

Prompts, tokens and updates are the same for every method of a study, and so is
the policy of a seed that they begin with: the quickstart's after its warm-up,

  python -m jax_rlvr.train --config configs/quickstart.py:seed=1,steps=0 \
    --workdir runs/warm/1
  python -m jax_rlvr.export --workdir runs/warm/1 --out runs/policy/1 \
    --dtype float32

or SmolLM2 as it is.
"""

import dataclasses

from jax_rlvr.config import Config, load


def get_config(
  on='quickstart', seed=0, start='runs/policy', **overrides
) -> Config:
  """The setting of a method.

  Args:
    on: quickstart or smollm2.
    seed: of everything random.
    start: folder of the quickstart's policies by seed.
    overrides: of Config.
  """
  if on == 'quickstart':
    base = load('configs/quickstart.py:lr=5e-4').config
    settings = dict(
      policy=f'{start}/{seed}',
      tokenizer=None,
      warm_up=None,
      steps=80,
      eval_every=4,
      checkpoint_every=10,
      keep_every=10,
    )
  elif on == 'smollm2':
    base = load('configs/smollm2_arithmetic.py').config
    settings = dict(steps=8, eval_every=2, eval_samples=4, checkpoint_every=8)
  else:
    raise ValueError(f'{on=} must be quickstart or smollm2')
  settings |= dict(seed=seed, inner_steps=4, keep_checkpoints=1)
  return dataclasses.replace(base, **settings | overrides)
