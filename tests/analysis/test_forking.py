"""Where entropy sits, by hand and by loops; and policies that change."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

import jax_rlvr
from jax_rlvr import filters
from jax_rlvr.analysis import forking
from jax_rlvr.records import Tokens, TokenStats
from jax_rlvr.sampling import entropy_temperature
from tests import runs


def test_percentiles_and_the_share_near_zero():
  entropy = [0.0, 0.005, 0.01, 0.5, 2.0]
  np.testing.assert_allclose(
    forking.percentiles(entropy, (0, 50, 80, 100)), [0, 0.01, 0.8, 2.0]
  )
  assert forking.share_below(entropy) == 0.4
  assert forking.share_below(entropy, nats=1.0) == 0.8


def test_tokens_are_ranked_by_mean_entropy_above_a_frequency():
  ids = [7, 7, 7, 2, 2, 2, 5, 5, 9, 9, 9]
  entropy = [0.1, 0.2, 0.6, 1.0, 0.0, 2.0, 9.0, 9.0, 0.3, 0.3, 0.3]
  found = forking.ranked(ids, entropy, more_than=2)
  # 5 occurs twice alone; 7 and 9 both have 0.3, within rounding.
  assert found.ids.tolist()[0] == 2 and set(found.ids[1:]) == {7, 9}
  np.testing.assert_allclose(found.entropy, [1.0, 0.3, 0.3])
  assert found.count.tolist() == [3, 3, 3]
  assert forking.ranked(ids, entropy, more_than=1).ids[0] == 5
  assert forking.ranked([4, 3], [1.0, 1.0], 0).ids.tolist() == [3, 4]
  assert not forking.ranked([], []).ids.size


class Words:
  """Decodes as SentencePiece does: a text's first blank is left out."""

  pieces = (' so', ' [b]', 'ly', '\n', '')

  def decode(self, ids):
    return ''.join(self.pieces[i] for i in ids).removeprefix(' ')


def test_tokens_are_written_as_they_stand_in_a_text():
  found = [forking.written(Words(), i) for i in range(5)]
  assert found == ['␣so', '␣[b]', 'ly', '⏎', '⟨4⟩']
  # A tokenizer without blanks.
  (digit,) = runs.TOKENIZER.encode('7')
  assert forking.written(runs.TOKENIZER, digit) == '7'


RANKED = forking.Ranked(
  np.array([0, 1, 2]), np.array([2.0, 0.5, 0.001]), np.array([5, 6, 7])
)


def test_table_has_both_ends():
  console = rich.console.Console(width=80, record=True, quiet=False)
  with console.capture() as shown:
    console.print(forking.table(RANKED, Words(), rows=2))
  lines = [line.split() for line in shown.get().splitlines()]
  assert ['␣so', '2', '5', 'ly', '0.001', '7'] in lines
  # Not taken for markup.
  assert ['␣[b]', '0.5', '6', '␣[b]', '0.5', '6'] in lines
  assert len([line for line in lines if len(line) == 6]) == 3


def test_cloud_is_a_picture(tmp_path):
  pytest.importorskip('wordcloud')
  from PIL import Image

  pictures = []
  for lowest in (False, True):
    file = tmp_path / f'{lowest}.png'
    forking.cloud(RANKED, Words(), file, lowest=lowest, size=(200, 100))
    with Image.open(file) as picture:
      assert picture.size == (200, 100)
      pictures.append(np.asarray(picture))
    assert pictures[-1].std() > 10
  assert (pictures[0] != pictures[1]).any()
  none = forking.ranked([], [])
  with pytest.raises(ValueError, match='lower more_than'):
    forking.cloud(none, Words(), tmp_path / 'none.png')


@pytest.mark.skipif(
  importlib.util.find_spec('wordcloud') is not None, reason='it is here'
)
def test_cloud_says_what_it_lacks(tmp_path):
  with pytest.raises(ImportError, match='wordcloud'):
    forking.cloud(RANKED, Words(), tmp_path / 'cloud.png')


def test_samples_of_a_run_are_joined():
  lines = [
    {'ids': [1, 2], 'entropy': [0.5, 0.25], 'completion': 'x'},
    {'ids': [3], 'entropy': [0.125]},
  ]
  ids, entropy = forking.sampled(lines)
  assert ids.tolist() == [1, 2, 3] and entropy.tolist() == [0.5, 0.25, 0.125]
  assert not forking.sampled([])[0].size


MASK = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]], bool)


def test_top_positions_by_hand():
  entropy = np.array([[9, 1, 5, 2], [9, 5, 0, 9], [9, 3, 5, 9.0]])
  # ⌈0.2 · 7⌉ = 2 of the three fives, the first ones.
  expected = np.zeros((3, 4), bool)
  expected[0, 2] = expected[1, 1] = True
  np.testing.assert_array_equal(forking.top(entropy, MASK), expected)
  assert forking.top(entropy, MASK, 1e-6).sum() == 1
  np.testing.assert_array_equal(forking.top(entropy, MASK, 1.0), MASK)


def test_top_positions_are_those_that_the_filter_keeps():
  rng = np.random.default_rng(0)
  mask = rng.random((6, 40)) < 0.6
  entropy = np.round(rng.exponential(size=mask.shape), 1).astype(np.float32)
  ones = jnp.ones(mask.shape)
  stats = TokenStats(ones, jnp.array(entropy))
  tokens = Tokens(jnp.array(mask), ones, ones)
  chain = optax.chain(filters.forking_tokens(0.2), filters.token_mean())
  grads, _ = jax_rlvr.token_gradients(chain, stats, tokens)
  np.testing.assert_array_equal(
    forking.top(entropy, mask), np.asarray(grads.logprob) != 0
  )


def test_overlap_by_hand():
  a = np.array([[9, 4, 3, 2], [9, 1, 0, 9], [9, 0, 0, 9.0]])
  b = np.array([[9, 0, 3, 4], [9, 2, 0, 9], [9, 0, 0, 9.0]])
  # ⌈0.4 · 7⌉ = 3: 4, 3, 2 of a and 4, 3, 2 of b share two places.
  assert forking.overlap(a, b, MASK, 0.4) == pytest.approx(2 / 3)
  assert forking.overlap(a, a, MASK) == 1.0
  assert forking.overlap(a, b, np.zeros_like(MASK)) == 0.0


def test_policies_that_have_nothing_in_common_share_the_fraction():
  a, b = np.random.default_rng(0).random((2, 100, 100))
  mask = np.ones((100, 100), bool)
  # 2,000 positions of 10,000: standard error about 0.008.
  assert forking.overlap(a, b, mask) == pytest.approx(0.2, abs=0.03)


def test_evolution_goes_from_the_base_to_the_final_policy():
  rng = np.random.default_rng(0)
  base, final = rng.random((2, 20, 50))
  mask = rng.random((20, 50)) < 0.8
  path = [(1 - t) * base + t * final for t in (0, 0.3, 0.7, 1)]
  with_base, with_final = forking.evolution(path, mask)
  assert with_base[0] == with_final[-1] == 1.0
  assert (np.diff(with_base) < 0).all() and (np.diff(with_final) > 0).all()
  assert with_base[-1] == with_final[0] == forking.overlap(base, final, mask)
  assert with_base[1] == forking.overlap(path[1], base, mask)


def test_change_of_entropy_by_percentile_by_hand():
  base = np.array([[0.4, 0.1, 0.3], [0.2, 9.0, 0.0]])
  later = np.array([[0.8, 0.1, 0.5], [0.1, 5.0, 0.0]])
  mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
  found = forking.change_by_percentile(base, later, mask, bins=2)
  # 0.1 and 0.2 change by 0 and −0.1; 0.3 and 0.4 by 0.2 and 0.4.
  np.testing.assert_allclose(found.entropy, [0.15, 0.35])
  np.testing.assert_allclose(found.change, [-0.05, 0.3])
  np.testing.assert_allclose(found.size, [0.05, 0.3])
  with pytest.raises(ValueError, match='4 tokens are fewer than bins=20'):
    forking.change_by_percentile(base, later, mask)


def test_change_bears_ties():
  base, mask = np.zeros((1, 100)), np.ones((1, 100), bool)
  base[0, 90:] = np.arange(10)
  found = forking.change_by_percentile(base, base + 0.5, mask)
  assert found.change.tolist() == [0.5] * 20
  assert found.entropy.tolist() == [0.0] * 18 + [2.0, 7.0]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  runs.write(workdir)
  return workdir


def test_texts_are_padded():
  texts = forking.texts([[1, 2], [3]], [[4], [5, 6, 7]])
  assert texts.ids.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
  assert texts.lengths.tolist() == [3, 4]
  assert texts.mask.tolist() == [
    [False, False, True, False], [False, True, True, True],
  ]  # fmt: skip


def test_checkpoints_are_asked_about_the_same_texts(run):
  texts = forking.texts([[3, 4], [5], [6, 7, 8]], [[1, 2, 3], [9], [4, 5]])
  found = []
  for step in (1, 2):
    policy = jax_rlvr.load_policy(run, step)
    entropy = forking.entropies(policy, texts, rows=2)
    logits = np.asarray(policy.logits(jnp.array(texts.ids)), float)
    for b in range(3):
      for t in range(texts.ids.shape[1]):
        expected = 0.0
        if texts.mask[b, t]:
          p = np.exp(logits[b, t - 1]) / np.exp(logits[b, t - 1]).sum()
          expected = -np.sum(p * np.log(p))
        assert entropy[b, t] == pytest.approx(expected, abs=1e-5)
    found.append(entropy)
  assert np.abs(found[0] - found[1]).max() > 1e-4


def test_forking_temperature_draws_otherwise_and_the_policy_stays_itself(run):
  policy = jax_rlvr.load_policy(run)
  prompt = [3, 4, 5]
  plain = policy.generate(
    [prompt], samples=16, max_new_tokens=4, end_ids=()
  )[0]  # fmt: skip
  # So that there are places on either side of it.
  threshold = float(np.median(np.concatenate([c.entropies for c in plain])))
  (forked,) = policy.generate(
    [prompt], samples=16, max_new_tokens=4, end_ids=(),
    transform=entropy_temperature(0.25, 2.0, threshold),
  )  # fmt: skip
  sides = set()
  for c in forked:
    ids = jnp.array([[*prompt, *c.ids.tolist()]])
    stats = policy.token_stats(ids)
    # To learn from, and to plot: the policy's own, at temperature 1.
    np.testing.assert_allclose(c.logprobs, stats.logprob[0, 3:], atol=1e-5)
    np.testing.assert_allclose(c.entropies, stats.entropy[0, 3:], atol=1e-5)
    logits = np.asarray(policy.logits(ids), float)[0]
    for t, token in enumerate(c.ids.tolist()):
      # Eq. 5.
      high = c.entropies[t] > threshold
      scaled = logits[2 + t] / (2.0 if high else 0.25)
      expected = scaled[token] - np.log(np.exp(scaled).sum())
      assert c.sampled_logprobs[t] == pytest.approx(expected, abs=1e-4)
      sides.add(bool(high))
  assert sides == {True, False}


def test_fork_of_the_paper_is_the_80th_percentile():
  rng = np.random.default_rng(0)
  # Half of the tokens near 0, and a fifth above 0.672, as with Qwen3-8B.
  entropy = np.concatenate(
    [np.full(51, 1e-3), rng.uniform(0.02, 0.6, 29), [0.69], np.full(19, 1.5)]
  )
  assert forking.share_below(entropy) == 0.51
  (edge,) = forking.percentiles(entropy, [80])
  assert np.mean(entropy > edge) == 0.2
  assert np.mean(entropy > entropy_temperature(1.0, 1.0).threshold) == 0.2
