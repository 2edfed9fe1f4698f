"""Warm-up: it imitates, and a stop does not show."""

import jax
import numpy as np
import optax
import pytest

from jax_rlvr import policy, sft
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import ConfigError, WarmUp
from jax_rlvr.records import Prompt, Trace, user
from tests.test_config import small

CONFIG = small()
WIDTH = 7


def trace(asked, completion, id=''):
  prompt = Prompt(messages=user(asked), answer=completion, id=id)
  return Trace(prompt=prompt, completion=completion)


class Sums:
  """A task of four traces."""

  def traces(self, split):
    assert split == 'train'
    return [trace(f'{a}+2=', str(a + 2)) for a in range(4)]


class Recorded:
  """A source that remembers what it was asked for."""

  def __init__(self, source):
    self.source, self.asked = source, []

  def __getitem__(self, i):
    self.asked.append(i)
    return self.source[i]


def warm_up(folder, *, steps, stop=None, asked=range(0)):
  """States and nats of every update, up to `stop` of them."""
  settings = WarmUp(
    steps=steps, batch_size=8, optimizer=optax.adam(1e-2), checkpoint_every=4
  )
  params = policy.init(CONFIG.policy, jax.random.key(0))
  done = []
  source = Recorded(sft.traces([Sums()], 3))
  with Checkpoints(folder, keep=1) as checkpoints:
    for state, nats in sft.warm_up(
      settings,
      CONFIG.policy,
      params,
      source,
      CONFIG.tokenizer,
      WIDTH,
      jax.device_put,
      checkpoints,
    ):
      done.append((int(state.step), float(nats)))
      if len(done) == stop:
        break
    # Batches of 8 follow each other.
    assert source.asked == list(asked)
    return jax.device_get(state), done


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  return warm_up(
    tmp_path_factory.mktemp('straight'), steps=50, asked=range(400)
  )


def test_nats_fall_on_memorised_traces(straight):
  _, done = straight
  assert [step for step, _ in done] == list(range(1, 51))
  nats = [x for _, x in done]
  assert nats[0] > 2 and max(nats[-5:]) < 0.05


def test_resumed_warm_up_equals_a_straight_one(straight, tmp_path):
  state, done = straight
  _, first = warm_up(tmp_path, steps=50, stop=42, asked=range(336))
  resumed, second = warm_up(tmp_path, steps=50, asked=range(320, 400))
  # Checkpoints every 4: it goes on after 40 of 42.
  assert second[0][0] == 41 and first + second[2:] == done
  assert jax.tree.structure(resumed) == jax.tree.structure(state)
  for a, b in zip(
    jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  # The end is in a checkpoint: a third time there is nothing to do.
  finished, third = warm_up(tmp_path, steps=50)
  assert [step for step, _ in third] == [50] and np.isnan(third[0][1])
  for a, b in zip(
    jax.tree.leaves(finished.params), jax.tree.leaves(state.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_rows_score_the_completion_and_its_end():
  rows = sft.rows([trace('1+2=', '3')], CONFIG.tokenizer, WIDTH)
  ids = CONFIG.tokenizer.encode('1+2=3') + [1, 0]
  np.testing.assert_array_equal(rows.ids, [ids])
  # Prompt of 4; '3' and the end token are scored, each by its predecessor.
  np.testing.assert_array_equal(rows.place, [[-1, -1, -1, -1, 4, 5, -1]])
  np.testing.assert_array_equal(rows.before[0, 4:6], [3, 4])


def test_trace_longer_than_a_row_is_named():
  rows = [trace('1+2=', '3'), trace('1+2=', '333', id='long/7')]
  # 4 + 3 + the end token.
  with pytest.raises(ConfigError, match=r"'long/7' has 8 tokens.* = 7; raise"):
    sft.rows(rows, CONFIG.tokenizer, WIDTH)


def test_tasks_without_traces_are_refused():
  with pytest.raises(ConfigError, match='none of the tasks has traces'):
    sft.traces([object()], 0)


def test_traces_are_shuffled_by_seed_and_repeated():
  source = sft.traces([object(), Sums(), Sums()], 3)
  texts = [source[i].prompt.text for i in range(16)]
  assert (
    sorted(texts[:8]) == sorted(texts[8:]) == sorted(2 * list(texts[:8]))[::2]
  )
  again = sft.traces([Sums(), Sums()], 3)
  assert texts == [again[i].prompt.text for i in range(16)]
  other = sft.traces([Sums(), Sums()], 4)
  assert texts != [other[i].prompt.text for i in range(16)]
