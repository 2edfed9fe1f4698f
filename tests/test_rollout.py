"""From prompts to evidence."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import optax
import pytest

from jax_rlvr import config, policy, prng, rollout
from jax_rlvr import mesh as layouts
from jax_rlvr.actor import Actor
from jax_rlvr.advantages import group_mean
from jax_rlvr.checkpoint import Checkpoints, abstract_like
from jax_rlvr.records import Completion, Prompt, Rollout, TrainState, user
from jax_rlvr.sampling import stops
from jax_rlvr.scoring import Score
from jax_rlvr.tasks import Addition
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


ACTOR = Actor(policy=POLICY, tokenizer=TOKENIZER, mesh=layouts.make(), slots=16)
PARAMS = policy.init(POLICY, jax.random.key(0))


def complete(prompts=PROMPTS, samples=2, first=0, **rest):
  positions = range(first, first + len(prompts))
  keys = prng.sample_keys(jax.random.key(1), positions, samples)
  found = {}
  for segment in ACTOR.complete(
    PARAMS, prompts, keys, temperature=1.0, max_completion_tokens=6, **rest
  ):
    found |= segment.finished
  return [found[number] for number in range(len(prompts) * samples)]


@pytest.fixture(scope='module')
def rollouts():
  return complete()


def test_rollout_holds_what_was_sampled(rollouts):
  for number, r in enumerate(rollouts):
    assert r.prompt == PROMPTS[number // 2]
    assert r.prompt_ids.tolist() == TOKENIZER.encode(r.prompt.text)
    size = len(r.ids)
    assert 1 <= size <= 6 and r.completion.length == size
    for x in (r.logprob, r.sampled_logprob, r.entropy):
      assert x.shape == (size,) and x.dtype == np.float32
    assert (r.logprob < 0).all() and (r.entropy > 0).all()
    assert r.versions.tolist() == [0] * size
    ended = r.ids[-1] in TOKENIZER.end_ids
    assert r.completion.truncated == (not ended)
    kept = r.ids[:-1] if ended else r.ids
    assert r.completion.text == TOKENIZER.decode(kept)
    assert r.reward is None and r.finished and not r.failed
  assert {r.completion.truncated for r in rollouts} == {True, False}


def test_completions_depend_on_their_position(rollouts):
  tail = complete(prompts=PROMPTS[16:], first=16)
  for x, y in zip(tail, rollouts[32:], strict=True):
    np.testing.assert_array_equal(x.ids, y.ids)
    np.testing.assert_allclose(x.logprob, y.logprob, atol=1e-5)


def test_begun_completions_go_on_under_a_new_version(rollouts):
  long = [n for n, r in enumerate(rollouts) if len(r.ids) > 3]
  begun = {
    n: dataclasses.replace(
      rollouts[n],
      finished=False,
      **{
        name: getattr(rollouts[n], name)[:2]
        for name in (
          'ids', 'logprob', 'sampled_logprob', 'entropy', 'versions'
        )
      },
    )
    for n in long[:3]
  }  # fmt: skip
  again = complete(begun=begun, version=5)
  for n, (x, y) in enumerate(zip(again, rollouts, strict=True)):
    np.testing.assert_array_equal(x.ids, y.ids)
    old = 2 if n in begun else 0
    assert x.versions.tolist() == [0] * old + [5] * (len(x.ids) - old)


def test_stop_texts_end_completions_and_are_cut(rollouts):
  stop = ('7', '=2')
  hit = 0
  for x, y in zip(complete(stop=stop), rollouts, strict=True):
    text = y.completion.text
    first = min((text.find(s) for s in stop if s in text), default=None)
    if first is None:
      np.testing.assert_array_equal(x.ids, y.ids)
      continue
    hit += 1
    assert x.completion.text == text[:first]
    assert not x.completion.truncated
    # The token that completes it is the last.
    size = len(x.ids)
    np.testing.assert_array_equal(x.ids, y.ids[:size])
    before, after = (TOKENIZER.decode(y.ids[:n]) for n in (size - 1, size))
    assert any(s in after for s in stop)
    assert not any(s in before for s in stop)
    assert len(x.logprob) == size
  assert hit > 3


@pytest.mark.parametrize('text', ['', 'no', '4 '])
def test_stop_text_that_cannot_match_is_refused(text):
  with pytest.raises(ValueError, match='can never match'):
    stops(TOKENIZER, ('1', text))


CONFIG = config.Config(
  policy=POLICY,
  tokenizer=TOKENIZER,
  tasks=(Addition(),),
  advantage=group_mean,
  filters=optax.identity(),
  optimizer=optax.identity(),
  steps=3,
  prompts_per_step=4,
  group_size=4,
  max_prompt_tokens=6,
  max_completion_tokens=12,
)


class Judge:
  """Scores at once; what a group earns is its prompt's to say."""

  def __init__(
    self, reward=lambda prompt, completion: float(completion.length)
  ):
    self.reward = reward

  def submit(self, prompt, completion):
    future = concurrent.futures.Future()
    reward = self.reward(prompt, completion)
    score = reward if isinstance(reward, Score) else scored(reward)
    future.set_result(score)
    return future

  def gather(self, futures):
    return [future.result() for future in futures], {}


def scored(reward, outcome=None, **parts):
  outcome = reward if outcome is None else outcome
  return Score(reward=reward, outcome=outcome, parts=parts)


def steps(count, judge=None, through=lambda state: state, **knobs):
  """Rollouts and scalars of some steps, and the last state."""
  settings = dataclasses.replace(CONFIG, **knobs)
  actor = dataclasses.replace(ACTOR, slots=knobs.pop('slots', 8))
  state = TrainState(np.int32(0), np.int32(0), PARAMS, (), ())
  found = []
  for step in range(count):
    state = state._replace(step=np.int32(step))
    rollouts, state, scalars = rollout.collect(
      state, STREAM, actor, judge or Judge(), settings
    )
    found.append((rollouts, scalars))
    state = through(state)
  return found, state


STREAM = PROMPTS * 20


def same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.prompt == y.prompt and x.completion == y.completion
    for name in ('ids', 'logprob', 'entropy', 'versions'):
      np.testing.assert_array_equal(getattr(x, name), getattr(y, name))


def test_step_takes_its_prompts_in_order():
  found, state = steps(2)
  for step, (rollouts, scalars) in enumerate(found):
    asked = STREAM[step * 4 : step * 4 + 4]
    assert [r.prompt for r in rollouts[::4]] == asked
    assert scalars['rollout/stale_share'] == scalars['rollout/carried'] == 0
    assert [r.reward for r in rollouts] == [len(r.ids) for r in rollouts]
  assert state.cursor == 8 and not state.carried


def test_oversampling_carries_unfinished_groups_over_with_their_version():
  found, state = steps(3, oversample=1.5)
  (first, one), (second, two), _ = found
  # Six groups are begun; four that are whole are enough.
  assert len(first) == len(second) == 16 and one['groups/asked'] == 6
  assert one['rollout/stale_share'] == 0 == one['rollout/carried']
  assert two['rollout/carried'] > 0 and two['rollout/stale_share'] > 0
  stale = [r for r in second if (r.versions == 0).any()]
  assert stale and all(sorted(r.versions) == list(r.versions) for r in stale)
  assert {*np.concatenate([r.versions for r in second])} == {0, 1}
  # The same weights all along: what was cut is as if it had not been.
  straight, _ = steps(3, prompts_per_step=12)
  known = {}
  for r in straight[0][0]:
    known.setdefault(r.prompt.id, []).append(r)
  for start in range(0, 16, 4):
    group = second[start : start + 4]
    if any((r.versions == 0).any() for r in group):
      for x, y in zip(group, known[group[0].prompt.id], strict=True):
        np.testing.assert_array_equal(x.ids, y.ids)
        np.testing.assert_allclose(x.logprob, y.logprob, atol=1e-5)
  assert len(state.carried) == 2


def test_what_is_carried_over_survives_a_checkpoint(tmp_path):
  def through(state):
    with Checkpoints(tmp_path / str(state.step)) as saved:
      saved.save(state)
      saved.wait()
      return saved.restore(abstract_like(state._replace(carried=())))

  straight, _ = steps(3, oversample=1.5)
  resumed, _ = steps(3, oversample=1.5, through=through)
  for (a, _), (b, _) in zip(straight, resumed, strict=True):
    same(a, b)


def test_dynamic_sampling_drops_equal_rewards_and_asks_again():
  # Groups of even prompts earn the same, whatever they say.
  def reward(prompt, completion):
    return float(completion.length) if int(prompt.id) % 2 else 1.0

  found, state = steps(1, Judge(reward), dynamic_sampling=True)
  ((rollouts, scalars),) = found
  assert len(rollouts) == 16
  assert all(int(r.prompt.id) % 2 for r in rollouts)
  assert scalars['groups/dropped'] >= 4
  assert state.cursor == scalars['groups/asked'] and not state.carried


def test_dynamic_sampling_looks_at_outcomes_not_at_penalties():
  # All are penalised for their length; only odd prompts differ in outcome.
  def reward(prompt, completion):
    right = completion.length % 2 if int(prompt.id) % 2 else 1
    penalty = -completion.length / 12
    return scored(right + penalty, float(right), length=penalty)

  found, _ = steps(1, Judge(reward), dynamic_sampling=True, group_size=8)
  ((rollouts, scalars),) = found
  assert all(int(r.prompt.id) % 2 for r in rollouts)
  assert all(r.reward == r.outcome + r.parts['length'] for r in rollouts)
  penalties = [-r.completion.length / 12 for r in rollouts]
  assert min(penalties) <= scalars['reward/parts/length'] <= max(penalties)


def test_inner_batches_can_have_like_rewards():
  # Prompt i earns i + a little: 0, 1, 2, 3 are dealt 3 0 | 2 1.
  judge = Judge(lambda prompt, c: int(prompt.id) + c.length / 100)
  ((rollouts, _),), _ = steps(1, judge, inner_steps=2, balance_rewards=True)
  assert [r.prompt.id for r in rollouts[::4]] == ['3', '0', '2', '1']
  assert rollout.balanced([5, 4, 3, 2, 1, 0], 3) == [0, 5, 1, 4, 2, 3]
  assert sorted(rollout.balanced(list(range(12)), 2)) == list(range(12))


def test_dynamic_sampling_goes_on_with_what_there_is(caplog):
  judge = Judge(lambda prompt, completion: 1.0)
  found, state = steps(1, judge, dynamic_sampling=True, max_asked=2.0)
  ((rollouts, scalars),) = found
  assert not rollouts and scalars['groups/asked'] == 8 == state.cursor
  assert 'goes on with 0 of 4 groups: of 8 prompts' in caplog.text
  assert scalars['reward/mean'] == 1


def test_short_batches_are_filled_with_rows_without_mask():
  tokens = rollout.tokens(ROLLOUTS, np.ones(4, np.float32), 6, rows=6, step=0)
  assert tokens.mask.shape == (6, 6) and not tokens.mask[4:].any()
  assert (tokens.fresh == tokens.mask).all()
  later = rollout.tokens(ROLLOUTS, np.ones(4, np.float32), 6, step=1)
  assert not later.fresh.any()


def made(prompt_ids, ids, reward, truncated=False):
  size = len(ids)
  return Rollout(
    prompt=PROMPTS[0],
    prompt_ids=np.array(prompt_ids, np.int32),
    ids=np.array(ids, np.int32),
    logprob=-np.arange(1, size + 1, dtype=np.float32),
    sampled_logprob=-10 * np.arange(1, size + 1, dtype=np.float32),
    entropy=np.arange(size, dtype=np.float32),
    versions=np.zeros(size, np.int32),
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
      'length/p50': 2,
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
