"""A killed run loses nothing."""

import random

from jax_rlvr import metrics
from tests.chaos import harness

# Two checkpoints between evaluations, and a reference that is reset between.
SMALL = (
  f'{harness.RECIPE}:steps=12,digits=1,held_out=20,warm_up_steps=60,'
  'prompts_per_step=16,eval_every=4,eval_prompts=20,checkpoint_every=2,'
  'reference_every=5,hangs=997'
)


def test_run_killed_five_times_ends_bit_for_bit_as_one_left_alone(tmp_path):
  straight, killed = tmp_path / 'straight', tmp_path / 'killed'
  harness.finish(SMALL, straight)
  draw = random.Random()
  kinds = ['kill', 'kill', 'kill in a save', 'kill', 'kill in a save']
  harness.disturbed(SMALL, killed, kinds, 12, draw)
  assert not list(harness.differences(straight, killed))
  assert harness.steps_of(killed) == 12
  # The law, read off both logs, is among what does not differ.
  assert 'law/a' in metrics.read(killed / 'eval.jsonl')[-1]
