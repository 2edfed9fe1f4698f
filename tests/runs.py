"""Run directories as training leaves them, of untrained policies."""

import dataclasses
import json
import math

import jax
import numpy as np

from jax_rlvr import policy
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.records import TrainState
from jax_rlvr.tokenizer import train_characters

TOKENIZER = train_characters('0123456789+=')
POLICY = policy.PolicyConfig(
  vocab_size=TOKENIZER.vocab_size,
  layers=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_size=8,
  feed_forward=24,
)


def write(workdir, steps=(1, 2)):
  """Checkpoints of random weights, each drawn with its step as the seed."""
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    for step in steps:
      params = policy.init(POLICY, jax.random.key(step))
      state = TrainState(np.int32(step), np.int32(0), params, {}, {})
      checkpoints.save(state)
  TOKENIZER.save(workdir / 'tokenizer')
  manifest = {'policy': dataclasses.asdict(POLICY)}
  (workdir / 'manifest.json').write_text(json.dumps(manifest))


def log(workdir, steps, evaluations, planned=200, scale=2.0):
  """Logs of a run whose entropy is scale · s^−0.7, by R = 0.6 − 0.2 e^H."""
  workdir.mkdir(parents=True, exist_ok=True)

  def entropy(step):
    return scale * step**-0.7

  def row(step):
    return {
      'step': step,
      'reward/mean': 0.5,
      'entropy/sequence_mean': entropy(step),
      'covariance/prompts': entropy(step) - entropy(step + 1),
      'kl/old': math.nan if step < 50 else 0.25,
      'time/rollout_s': 2.0,
      'time/update_s': 1.0,
      'filters/clip_cov/kept': 1 - step / 1000,
      'of/no/interest': 7.0,
    }

  def evaluation(step):
    score = 0.6 - 0.2 * math.exp(entropy(step + 1))
    return {'step': step, 'eval/sums/avg@8': score, 'eval/sums/entropy': 0.1}

  for name, rows in (
    ('metrics.jsonl', map(row, range(1, steps + 1))),
    ('eval.jsonl', map(evaluation, evaluations)),
  ):
    text = ''.join(json.dumps(each) + '\n' for each in rows)
    (workdir / name).write_text(text)
  file = workdir / 'manifest.json'
  manifest = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps(manifest | {'steps': planned}))
  return workdir


def sample(workdir, steps):
  """Completions of random tokens, as training leaves them of each step."""
  draw = np.random.default_rng(0)
  (workdir / 'rollouts').mkdir()
  for step in steps:
    rows = [
      {
        'ids': draw.integers(0, TOKENIZER.vocab_size, 40).tolist(),
        'entropy': draw.exponential(size=40).round(4).tolist(),
      }
      for _ in range(16)
    ]
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (workdir / 'rollouts' / f'{step:06d}.jsonl').write_text(text)
