"""Policies in research code: from folders, files and runs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_rlvr
from jax_rlvr import policy, sampling
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


def test_generate_gives_what_training_would_see(run):
  loaded = jax_rlvr.load_policy(run)
  texts = ['12+3=', '4+5=', '7']
  made = loaded.generate(texts, samples=4, max_new_tokens=9, temperature=0.7)
  assert [len(group) for group in made] == [4, 4, 4]
  for text, group in zip(texts, made, strict=True):
    prompt = loaded.tokenizer.encode(text)
    for c in group:
      tokens = np.array([[*prompt, *c.ids]])
      stats = loaded.token_stats(tokens, temperature=0.7)
      for mine, theirs in (
        (c.logprobs, stats.logprob),
        (c.sampled_logprobs, stats.logprob),
        (c.entropies, stats.entropy),
      ):
        own = np.asarray(theirs)[0, len(prompt) :]
        np.testing.assert_allclose(mine, own, atol=1e-4)
      ended = c.ids[-1] in loaded.tokenizer.end_ids
      assert c.truncated == (not ended) and len(c.ids) <= 9
      kept = c.ids[:-1] if ended else c.ids
      assert c.text == loaded.tokenizer.decode(kept.tolist())
  # Neither what stands beside it nor the slots make a completion.
  other = loaded.generate(
    texts, samples=2, max_new_tokens=9, temperature=0.7, slots=1
  )
  for a, b in zip(made, other, strict=True):
    assert [c.text for c in a[:2]] == [c.text for c in b]
  again = loaded.generate(texts, samples=4, max_new_tokens=9, seed=1)
  assert [c.text for g in again for c in g] != [c.text for g in made for c in g]


def test_generate_at_temperature_zero_follows_the_logits(run):
  loaded = jax_rlvr.load_policy(run)
  made = loaded.generate(
    TOKENS[:, :4].tolist(), max_new_tokens=3, temperature=0, end_ids=()
  )
  first = np.argmax(loaded.logits(TOKENS[:, :4])[:, -1], axis=-1)
  assert [group[0].ids[0] for group in made] == first.tolist()


def test_generate_streams_and_shows_a_bar(run, capsys):
  loaded = jax_rlvr.load_policy(run)
  heard = {}

  def stream(prompt, sample, text):
    heard.setdefault((prompt, sample), []).append(text)

  made = loaded.generate(
    ['1+2=', '3'], 2, max_new_tokens=80, end_ids=(), stream=stream,
    progress=True,
  )  # fmt: skip
  for (prompt, sample), texts in heard.items():
    assert texts[-1] == made[prompt][sample].text
    # A segment is 32 tokens.
    assert len(texts) == 3
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
  assert len(heard) == 4
  assert 'tokens/s' in capsys.readouterr().err


def test_generate_stops_at_texts_and_transforms(run):
  loaded = jax_rlvr.load_policy(run)

  def generate(stop=()):
    (made,) = loaded.generate(
      ['1+2='],
      8,
      max_new_tokens=40,
      stop=stop,
      transform=sampling.top_k(3),
      end_ids=(),
    )
    return made

  whole = generate()
  text = next(x for x in whole[0].text if x.isdigit())
  made = generate(stop=(text,))
  for a, b in zip(made, whole, strict=True):
    assert a.text == b.text.partition(text)[0]
    assert a.truncated == (text not in b.text)
  for c in made:
    assert (c.sampled_logprobs > c.logprobs).all()


def test_generate_without_a_tokenizer_takes_ids(folder):
  loaded = jax_rlvr.load_policy(folder)
  ((c,),) = loaded.generate([[3, 4]], max_new_tokens=5, end_ids=())
  assert len(c.ids) == 5 and c.text == ''
  with pytest.raises(ValueError, match='has no tokenizer files'):
    loaded.generate(['3'], max_new_tokens=5)
  with pytest.raises(ValueError, match='prompt 0 is empty'):
    loaded.generate([[]], max_new_tokens=5, end_ids=())
  assert loaded.generate([], max_new_tokens=5) == []


def test_what_is_missing_is_named(folder, run, tmp_path):
  with pytest.raises(ValueError, match='has no tokenizer files'):
    _ = jax_rlvr.load_policy(folder).tokenizer
  with pytest.raises(ValueError, match='no checkpoint of step 7'):
    jax_rlvr.load_policy(run, step=7)
  with pytest.raises(ValueError, match='is no run'):
    jax_rlvr.load_policy(folder, step=1)
  with pytest.raises(FileNotFoundError, match='no model file'):
    jax_rlvr.load_policy(tmp_path / 'nothing')
