"""Transforms against their definitions, transcribed in NumPy by loop."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr.sampling import transforms
from jax_rlvr.sampling.draw import draw
from jax_rlvr.sampling.transforms import (
  chain,
  entropy_temperature,
  min_p,
  repetition_penalty,
  temperature,
  top_k,
  top_p,
)

draw = jax.jit(draw, static_argnames='transform')
DRAW = np.random.default_rng(0)
N = 100_000


def softmax(logits):
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def only(logits, kept):
  return np.array([x if i in kept else -np.inf for i, x in enumerate(logits)])


def top_k_reference(logits, k):
  return only(logits, set(np.argsort(-logits, stable=True)[:k]))


def top_p_reference(logits, p):
  probs, kept, mass = softmax(logits), set(), 0.0
  for i in np.argsort(-logits, stable=True):
    if mass < p:
      kept.add(i)
      mass += probs[i]
  return only(logits, kept)


def min_p_reference(logits, p):
  probs = softmax(logits)
  lowest = p * max(probs)
  return only(logits, {i for i, x in enumerate(probs) if x >= lowest})


def entropy_temperature_reference(logits, low, high, threshold):
  probs = softmax(logits)
  entropy = -sum(p * math.log(p) for p in probs if p > 0)
  return logits / (high if entropy > threshold else low)


def repetition_penalty_reference(logits, seen, penalty):
  new = [x / penalty if x > 0 else x * penalty for x in logits]
  return np.array(
    [y if s else x for x, y, s in zip(logits, new, seen, strict=True)]
  )


def reference(transform, logits, seen):
  """Logits [V] after a transform, by its definition, in float64."""
  logits = np.asarray(logits, np.float64)
  match transform:
    case chain():
      for part in transform.transforms:
        logits = reference(part, logits, seen)
      return logits
    case temperature(value=value):
      return logits / value
    case top_k(k=k):
      return top_k_reference(logits, k)
    case top_p(p=p):
      return top_p_reference(logits, p)
    case min_p(p=p):
      return min_p_reference(logits, p)
    case repetition_penalty(penalty=penalty):
      return repetition_penalty_reference(logits, seen, penalty)
    case entropy_temperature():
      return entropy_temperature_reference(
        logits, *dataclasses.astuple(transform)
      )


TRANSFORMS = [
  temperature(0.7),
  top_k(5),
  top_p(0.8),
  min_p(0.1),
  repetition_penalty(1.5),
  entropy_temperature(0.5, 1.5),
  entropy_temperature(0.5, 1.5, threshold=9.0),
  chain(
    repetition_penalty(1.2),
    entropy_temperature(1.0, 1.3),
    top_k(20),
    top_p(0.9),
    min_p(0.02),
    temperature(1.5),
  ),
]
V = 30
LOGITS = DRAW.normal(0.0, 1.5, V).astype(np.float32)
# Ties across the edges of several sets.
LOGITS[[3, 8, 20, 29]] = np.sort(LOGITS)[-4]
SEEN = DRAW.random(V) < 0.5


@pytest.mark.parametrize('transform', TRANSFORMS, ids=str)
def test_draws_follow_the_transformed_distribution(transform):
  keys = jax.random.split(jax.random.key(0), N)
  logits = jnp.broadcast_to(LOGITS, (N, V))
  drawn = draw(keys, logits, 0.9, transform, jnp.broadcast_to(SEEN, (N, V)))
  scaled = LOGITS.astype(np.float64) / 0.9
  probs = softmax(reference(transform, scaled, SEEN))
  seen, expected = np.bincount(drawn.ids, minlength=V), N * probs
  assert (seen[probs == 0] == 0).all()
  live = probs > 0
  chi_square = ((seen - expected)[live] ** 2 / expected[live]).sum()
  # Mean k and variance 2k of a chi-square with k degrees of freedom.
  k = live.sum() - 1
  assert chi_square < k + 5 * np.sqrt(2 * k)
  ids = np.asarray(drawn.ids)
  np.testing.assert_allclose(
    drawn.sampled_logprob, np.log(probs[ids]), 1e-5, 1e-6
  )
  full = np.log(softmax(scaled))
  np.testing.assert_allclose(drawn.logprob, full[ids], 1e-6, 1e-6)
  entropy = -(np.exp(full) * full).sum()
  np.testing.assert_allclose(drawn.entropy, np.full(N, entropy), 1e-6)
  assert drawn.finite.all()


# Half of the rows are full of ties.
ROWS = (2 * DRAW.normal(size=(16, 600))).astype(np.float32)
ROWS[:8] = ROWS[:8].round(1)
ROWS[0] = 0.0
ROWS[0, ::2] = -0.0
ROWS[1, :590] = -np.inf
ROWS[2] = -300.0
ROWS[2, 200] = 300.0


@pytest.mark.parametrize(
  'transform',
  [
    *(top_k(k) for k in (1, 2, 7, 100, 599)),
    # No p where a sum of equal probabilities meets it to the last bit.
    *(top_p(p) for p in (1e-6, 0.3331, 0.5042, 0.9041, 0.9985)),
    *(min_p(p) for p in (1e-4, 0.3, 1.0)),
    chain(top_p(0.9041), top_k(50)),
  ],
  ids=str,
)
def test_kept_tokens_are_those_of_the_definition(transform):
  apply = jax.jit(transform)
  # A row at a time: rows wait for one another where the set is looked for.
  for row in ROWS:
    kept = np.isfinite(reference(transform, row, None))
    np.testing.assert_array_equal(apply(row), np.where(kept, row, -np.inf))


def test_rows_of_a_batch_do_not_mix():
  transform = chain(top_p(0.9041), top_k(50))
  batch = jax.jit(transform)(ROWS.reshape(2, 8, 600)).reshape(16, 600)
  for row, alone in zip(batch, map(jax.jit(transform), ROWS), strict=True):
    np.testing.assert_array_equal(row, alone)


def test_ties_at_the_edge_go_to_lower_ids():
  # Probabilities 4/8 and four of 1/8.
  logits = jnp.log(jnp.array([1.0, 1.0, 4.0, 1.0, 1.0]))

  def kept(transform):
    return np.flatnonzero(np.isfinite(jax.jit(transform)(logits))).tolist()

  assert kept(top_k(3)) == [0, 1, 2]
  assert kept(top_p(0.5)) == [2]
  assert kept(top_p(0.51)) == [0, 2]
  assert kept(top_p(0.7)) == [0, 1, 2]
  assert kept(top_p(0.76)) == [0, 1, 2, 3]
  # 1/4 each: two of them reach exactly a half.
  halved = jax.jit(top_p(0.5))(jnp.zeros(4))
  np.testing.assert_array_equal(halved, [0.0, 0.0, -jnp.inf, -jnp.inf])


@pytest.mark.parametrize(
  'transform',
  [
    chain(),
    temperature(1.0),
    top_k(V),
    top_k(V + 1),
    top_p(1.0),
    min_p(0.0),
    repetition_penalty(1.0),
    entropy_temperature(1.0, 1.0),
  ],
  ids=str,
)
def test_neutral_setting_changes_nothing(transform):
  logits = LOGITS.copy()
  logits[4] = -np.inf
  np.testing.assert_array_equal(transform(jnp.array(logits), SEEN), logits)


def test_temperature_before_top_p_keeps_more():
  # 0.64, 0.32, 0.04; their roots 0.8, 0.57, 0.2 are 0.51, 0.36, 0.13 of 1.57.
  logits = jnp.log(jnp.array([0.64, 0.32, 0.04]))
  before = chain(temperature(2.0), top_p(0.6))(logits)
  after = chain(top_p(0.6), temperature(2.0))(logits)
  np.testing.assert_array_equal(np.isfinite(before), [True, True, False])
  np.testing.assert_array_equal(np.isfinite(after), [True, False, False])


def test_repetition_penalty_divides_positive_and_multiplies_negative():
  logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
  seen = jnp.array([[True, True, False, False]])
  np.testing.assert_array_equal(
    repetition_penalty(4.0)(logits, seen), [[0.5, -8.0, 2.0, -2.0]]
  )


def test_entropy_temperature_looks_at_each_row():
  # Entropies ln 2 = 0.693 and ln 1 = 0.
  logits = jnp.array([[3.0, 3.0, -jnp.inf], [3.0, -jnp.inf, -jnp.inf]])
  np.testing.assert_allclose(
    entropy_temperature(0.5, 2.0)(logits)[:, 0], [1.5, 6.0]
  )
  np.testing.assert_allclose(
    entropy_temperature(0.5, 2.0, threshold=0.7)(logits)[:, 0], [6.0, 6.0]
  )


def test_entropy_temperature_zero_leaves_the_maximum():
  logits = jnp.array([1.0, 1.0 + 2**-23, -50.0, 0.0])
  probs = jax.nn.softmax(entropy_temperature(0.0, 0.0)(logits))
  np.testing.assert_array_equal(probs, [0.0, 1.0, 0.0, 0.0])


def test_entropy_temperature_zero_leaves_the_maximum_when_compiled():
  # One program may round the products otherwise than their maximum.
  logits = 0.3 * jax.random.normal(jax.random.key(0), (64, 14))
  keys = jax.random.split(jax.random.key(1), 64)
  found = draw(keys, logits, 1.0, entropy_temperature(0.0, 0.0))
  assert found.finite.all()
  np.testing.assert_array_equal(found.ids, logits.argmax(-1))


def test_transforms_are_equal_by_value():
  same = [chain(top_p(0.9), temperature(2.0)) for _ in range(2)]
  assert same[0] == same[1] and hash(same[0]) == hash(same[1])
  assert len(set(TRANSFORMS)) == len(TRANSFORMS)
  assert top_p(0.9) != min_p(0.9) and top_p(0.9) != top_p(0.8)
  assert chain(top_k(2), top_p(0.9)) != chain(top_p(0.9), top_k(2))
  traced = []

  def count(transform, logits):
    traced.append(transform)
    return transform(logits)

  count = jax.jit(count, static_argnums=0)
  for p in (0.9, 0.9, 0.8):
    count(chain(top_p(p), temperature(2.0)), jnp.zeros(3))
  assert len(traced) == 2


def test_only_the_repetition_penalty_reads_seen():
  readers = [x for x in TRANSFORMS if x.reads_seen]
  assert readers == [repetition_penalty(1.5), TRANSFORMS[-1]]
  assert chain(chain(repetition_penalty(2.0))).reads_seen
  assert not chain().reads_seen


@pytest.mark.parametrize(
  'transform', [top_k(5), top_p(0.8), TRANSFORMS[-1]], ids=str
)
def test_broken_row_leaves_the_others_unharmed(transform):
  keys = jax.random.split(jax.random.key(3), 6)
  seen = np.tile(SEEN, (6, 1))
  logits = np.tile(LOGITS, (6, 1))
  logits[3, 7] = -np.inf
  whole = draw(keys, logits, 0.9, transform, seen)
  logits[0, 7] = np.nan
  logits[1, 7] = np.inf
  logits[2] = -np.inf
  drawn = draw(keys, logits, 0.9, transform, seen)
  np.testing.assert_array_equal(drawn.finite, [False] * 3 + [True] * 3)
  for x, unharmed in zip(drawn, whole, strict=True):
    np.testing.assert_array_equal(x[:3], np.zeros(3))
    np.testing.assert_array_equal(x[3:], unharmed[3:])


def test_transform_that_leaves_nothing_is_flagged():
  @dataclasses.dataclass(frozen=True)
  class Nothing(transforms.Transform):
    def __call__(self, logits, seen=None):
      return jnp.full_like(logits, -jnp.inf)

  keys = jax.random.split(jax.random.key(3), 2)
  drawn = draw(keys, np.tile(LOGITS, (2, 1)), 1.0, Nothing())
  for x in drawn:
    np.testing.assert_array_equal(x, np.zeros(2))


def test_temperature_zero_takes_the_transformed_argmax():
  logits = np.array([[3.0, 2.5, 2.5, -1.0]], np.float32)
  keys = jax.random.split(jax.random.key(3), 1)
  seen = np.array([[True, False, False, False]])
  drawn = draw(keys, logits, 0.0, repetition_penalty(1.5), seen)
  full = np.log(softmax(logits[0].astype(np.float64)))
  # 3 / 1.5 = 2 falls below the first 2.5.
  np.testing.assert_array_equal(drawn.ids, [1])
  np.testing.assert_array_equal(drawn.sampled_logprob, [0.0])
  np.testing.assert_allclose(drawn.logprob, full[1:2], 1e-6)
  entropy = -(np.exp(full) * full).sum()
  np.testing.assert_allclose(drawn.entropy, [entropy], 1e-6)


NAN = float('nan')


@pytest.mark.parametrize(
  ('make', 'text'),
  [
    (lambda: temperature(0.0), r'temperature: value=0\.0; give a number > 0'),
    (lambda: temperature(math.inf), 'temperature: value=inf'),
    (lambda: top_k(0), 'top_k: k=0; give an integer ≥ 1'),
    (lambda: top_k(-1), 'top_k: k=-1'),
    (lambda: top_k(2.0), r'top_k: k=2\.0'),
    (lambda: top_p(0.0), r'top_p: p=0\.0; give a share in \(0, 1\]'),
    (lambda: top_p(1.1), r'top_p: p=1\.1'),
    (lambda: top_p(NAN), 'top_p: p=nan'),
    (lambda: min_p(-0.1), r'min_p: p=-0\.1; give a share in \[0, 1\]'),
    (lambda: min_p(1.5), r'min_p: p=1\.5'),
    (lambda: repetition_penalty(0.0), r'penalty=0\.0; give a number > 0'),
    (lambda: entropy_temperature(-1.0, 1.0), r'low=-1\.0; give a number ≥ 0'),
    (lambda: entropy_temperature(1.0, NAN), 'high=nan'),
    (lambda: entropy_temperature(1.0, 1.0, NAN), 'threshold=nan; give nats'),
    (
      lambda: repetition_penalty(2.0)(jnp.zeros((1, 2))),
      r'repetition_penalty: seen=None; give bool \[\*B, V\]',
    ),
  ],
)
def test_bad_value_is_refused_in_one_line(make, text):
  with pytest.raises(ValueError, match=text) as error:
    make()
  assert '\n' not in str(error.value)
