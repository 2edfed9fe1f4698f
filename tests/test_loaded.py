"""Policies in research code: from folders, files and runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_rlvr
from jax_rlvr import policy
from tests import runs
from tests.runs import POLICY as CONFIG

TOKENS = np.random.default_rng(0).integers(0, 14, (3, 9)).astype(np.int32)
LENGTHS = np.array([9, 4, 1], np.int32)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """As `python -m jax_rlvr.export` writes it, without a tokenizer."""
  folder = tmp_path_factory.mktemp('policies') / 'exported'
  params = policy.init(CONFIG, jax.random.key(0))
  policy.save(folder, CONFIG, params, dtype='float32', end_ids=(1,))
  return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  runs.write(workdir)
  return workdir


def test_logits_of_a_folder_are_those_of_its_weights(folder):
  loaded = jax_rlvr.load_policy(folder)
  logits = loaded.logits(TOKENS)
  assert logits.shape == (3, 9, 14) and logits.dtype == jnp.float32
  params = policy.init(CONFIG, jax.random.key(0))
  hidden = policy.forward(CONFIG, params, TOKENS)
  expected = policy.logits(CONFIG, params, hidden)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
  assert loaded.config == CONFIG
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_what_lies_past_the_lengths_does_not_matter_and_is_zero(folder):
  loaded = jax_rlvr.load_policy(folder)
  other = np.where(np.arange(9) < LENGTHS[:, None], TOKENS, 3)
  for f in (loaded.logits, loaded.token_stats):
    a, b = f(TOKENS, LENGTHS), f(other, LENGTHS)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
      assert not np.asarray(x)[1, 4:].any() and np.asarray(x)[0, 8:].any()


def test_token_stats_speak_of_the_token_at_their_place(folder):
  loaded = jax_rlvr.load_policy(folder)
  stats = loaded.token_stats(TOKENS, LENGTHS, temperature=0.7)
  logprobs = jax.nn.log_softmax(loaded.logits(TOKENS)[:, :-1] / 0.7)
  picked = np.take_along_axis(
    np.asarray(logprobs), TOKENS[:, 1:, None], axis=-1
  )[..., 0]
  scored = np.arange(1, 9) < LENGTHS[:, None]
  np.testing.assert_allclose(
    np.asarray(stats.logprob)[:, 1:][scored], picked[scored], rtol=1e-5
  )
  assert not np.asarray(stats.logprob)[:, 0].any()


def test_run_gives_its_latest_checkpoint_or_the_one_asked_for(run):
  for step, seed in ((None, 2), (1, 1)):
    loaded = jax_rlvr.load_policy(run, step=step)
    params = policy.init(CONFIG, jax.random.key(seed))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  assert loaded.tokenizer.vocab_size == 14


def test_generate_at_temperature_zero_follows_the_logits(run):
  loaded = jax_rlvr.load_policy(run)
  made = loaded.generate(
    TOKENS[:, :4], key=jax.random.key(0), max_tokens=3, temperature=0
  )
  first = np.argmax(loaded.logits(TOKENS[:, :4])[:, -1], axis=-1)
  np.testing.assert_array_equal(made.tokens.ids[:, 0, 0], first)


def test_what_is_missing_is_named(folder, run, tmp_path):
  with pytest.raises(ValueError, match='has no tokenizer files'):
    _ = jax_rlvr.load_policy(folder).tokenizer
  with pytest.raises(ValueError, match='no checkpoint of step 7'):
    jax_rlvr.load_policy(run, step=7)
  with pytest.raises(ValueError, match='is no run'):
    jax_rlvr.load_policy(folder, step=1)
  with pytest.raises(FileNotFoundError, match='no model file'):
    jax_rlvr.load_policy(tmp_path / 'nothing')
