"""From prompts to evidence."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_rlvr import mesh as layouts
from jax_rlvr import policy, rollout
from jax_rlvr.records import Completion, Prompt, Rollout, user
from jax_rlvr.tokenizer import train_characters

TOKENIZER = train_characters('0123456789+=')
POLICY = policy.PolicyConfig(
  vocab_size=TOKENIZER.vocab_size,
  layers=1,
  width=16,
  heads=2,
  kv_heads=1,
  head_size=8,
  feed_forward=16,
)
PROMPTS = [
  Prompt(messages=user(f'{i}+{i * i}='), answer=str(i + i * i), id=str(i))
  for i in range(20)
]


def complete(slots, prompts=PROMPTS, samples=2, first=0):
  actor = rollout.Actor(
    policy=POLICY, tokenizer=TOKENIZER, mesh=layouts.make(), slots=slots
  )
  params = policy.init(POLICY, jax.random.key(0))
  positions = range(first, first + len(prompts))
  keys = rollout.sample_keys(jax.random.key(1), positions, samples)
  return list(
    actor.complete(
      params, prompts, keys, temperature=1.0, max_completion_tokens=6
    )
  )


@pytest.fixture(scope='module')
def slabs():
  # 16 slots of 2 samples: slabs of 8 prompts, the last one short.
  return complete(slots=16)


def test_groups_come_whole_and_in_order(slabs):
  assert [len(slab) for slab in slabs] == [16, 16, 8]
  rollouts = sum(slabs, [])
  assert [r.prompt.id for r in rollouts] == [
    str(i) for i in range(20) for _ in range(2)
  ]


def test_rollout_holds_what_was_sampled(slabs):
  rollouts = sum(slabs, [])
  for r in rollouts:
    assert r.prompt_ids.tolist() == TOKENIZER.encode(r.prompt.text)
    size = len(r.ids)
    assert 1 <= size <= 6 and r.completion.length == size
    for x in (r.logprob, r.sampled_logprob, r.entropy):
      assert x.shape == (size,) and x.dtype == np.float32
    assert (r.logprob < 0).all() and (r.entropy > 0).all()
    ended = r.ids[-1] in TOKENIZER.end_ids
    assert r.completion.truncated == (not ended)
    kept = r.ids[:-1] if ended else r.ids
    assert r.completion.text == TOKENIZER.decode(kept)
    assert r.reward is None
  assert {r.completion.truncated for r in rollouts} == {True, False}


def test_slabs_of_another_size_give_the_same_completions(slabs):
  # One slab of 24 with 4 repeats; and positions 16 … 19 on their own.
  (whole,) = complete(slots=1000)
  (tail,) = complete(slots=16, prompts=PROMPTS[16:], first=16)
  for a, b in [(sum(slabs, []), whole), (slabs[-1], tail)]:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
      assert x.prompt == y.prompt
      np.testing.assert_array_equal(x.ids, y.ids)
      np.testing.assert_allclose(x.logprob, y.logprob, atol=1e-5)


def test_sample_keys_depend_on_position_and_sample_only():
  def data(positions, samples, seed=0):
    keys = rollout.sample_keys(jax.random.key(seed), positions, samples)
    return np.asarray(jax.random.key_data(keys))

  keys = data([3, 5, 2**31], 4)
  np.testing.assert_array_equal(keys[1:2, :2], data([5], 2))
  assert len({tuple(k) for k in keys.reshape(12, -1)}) == 12
  assert (keys != data([3, 5, 2**31], 4, seed=1)).any()


def made(prompt_ids, ids, reward, truncated=False):
  size = len(ids)
  return Rollout(
    prompt=PROMPTS[0],
    prompt_ids=np.array(prompt_ids, np.int32),
    ids=np.array(ids, np.int32),
    logprob=-np.arange(1, size + 1, dtype=np.float32),
    sampled_logprob=-10 * np.arange(1, size + 1, dtype=np.float32),
    entropy=np.arange(size, dtype=np.float32),
    completion=Completion(text='', length=size, truncated=truncated),
    reward=reward,
  )


ROLLOUTS = [
  made([5, 6], [7, 1], 1.0),
  made([5, 6], [8, 9, 2], None, truncated=True),
  made([4], [3, 1], 0.5),
  made([4], [1], 0.5),
]


def test_outcomes_leave_the_unscorable_out():
  rewards, valid, lengths = rollout.outcomes(ROLLOUTS, 2)
  np.testing.assert_array_equal(rewards, [[1, 0], [0.5, 0.5]])
  np.testing.assert_array_equal(valid, [[True, False], [True, True]])
  np.testing.assert_array_equal(lengths, [[2, 3], [2, 1]])


def test_tokens_speak_of_the_token_at_their_index():
  advantages = np.array([[3, 0], [-1, 2]], np.float32)
  tokens = rollout.tokens(ROLLOUTS, advantages, 6)
  literal = {
    'ids': [
      [5, 6, 7, 1, 0, 0],
      [5, 6, 8, 9, 2, 0],
      [4, 3, 1, 0, 0, 0],
      [4, 1, 0, 0, 0, 0],
    ],
    'mask': [
      [0, 0, 1, 1, 0, 0],
      [0, 0, 1, 1, 1, 0],
      [0, 1, 1, 0, 0, 0],
      [0, 1, 0, 0, 0, 0],
    ],
    'advantage': [
      [0, 0, 3, 3, 0, 0],
      [0, 0, 0, 0, 0, 0],
      [0, -1, -1, 0, 0, 0],
      [0, 2, 0, 0, 0, 0],
    ],
    'old_logprob': [
      [0, 0, -1, -2, 0, 0],
      [0, 0, -1, -2, -3, 0],
      [0, -1, -2, 0, 0, 0],
      [0, -1, 0, 0, 0, 0],
    ],
    'old_entropy': [
      [0, 0, 0, 1, 0, 0],
      [0, 0, 0, 1, 2, 0],
      [0, 0, 1, 0, 0, 0],
      [0, 0, 0, 0, 0, 0],
    ],
    'lengths': [4, 5, 3, 2],
  }
  for name, value in literal.items():
    np.testing.assert_array_equal(getattr(tokens, name), value, name)
  np.testing.assert_array_equal(tokens.sampled_logprob, 10 * tokens.old_logprob)
  np.testing.assert_array_equal(tokens.serial.ravel(), np.arange(24))
  assert tokens.mask.dtype == bool and tokens.serial.dtype == np.uint32
  assert tokens.ref_logprob is None


def test_summary_of_four_rollouts():
  summary = rollout.summary(ROLLOUTS, 2)
  assert summary == pytest.approx(
    {
      # 1, 0.5, 0.5: mean 2/3, variance 1/18.
      'reward/mean': 2 / 3,
      'reward/std': (1 / 18) ** 0.5,
      # Entropies 0 1, 0 1 2, 0 1, 0: 5 over 8 tokens; means ½, 1, ½, 0.
      'entropy/token_mean': 5 / 8,
      'entropy/sequence_mean': 2 / 4,
      'length/mean': 8 / 4,
      'length/max': 3,
      'length/clipped_share': 1 / 4,
      # A lone scored completion has no variance, and equal ones have none.
      'groups/zero_variance_share': 1.0,
    }
  )
  varied = [*ROLLOUTS[:3], dataclasses.replace(ROLLOUTS[3], reward=0.0)]
  share = rollout.summary(varied, 2)['groups/zero_variance_share']
  assert share == 1 / 2


def test_summary_of_nothing_scorable_is_finite():
  lost = [dataclasses.replace(r, reward=None) for r in ROLLOUTS]
  summary = rollout.summary(lost, 2)
  assert summary['reward/mean'] == 0
  assert summary['groups/zero_variance_share'] == 1
