"""What a run leaves on disk comes back as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jax_rlvr import mesh as layouts
from jax_rlvr import policy
from jax_rlvr.checkpoint import Checkpoints, abstract_like
from jax_rlvr.config import ConfigError
from jax_rlvr.filters import clip_ratio, token_mean, tracked
from jax_rlvr.records import TokenStats, TrainState
from tests.test_config import small

CONFIG = small()
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
FILTERS = optax.chain(tracked('clip', clip_ratio()), token_mean())


def made(step=3, mesh=None) -> TrainState:
  """A state of a few steps: counts, moments and reports are not what they
  were at the start."""
  params = policy.init(CONFIG.policy, jax.random.key(step))
  _, optimizer = OPTIMIZER.update(params, OPTIMIZER.init(params))
  if mesh is not None:
    # Only now: of many small programs that are under way at a time, XLA:CPU may
    # hold back on one device what the others wait for, and all wait for good.
    params = layouts.place(mesh, params, layouts.TRAINING)
    shardings = layouts.state_shardings(mesh, optimizer, layouts.TRAINING)
    optimizer = jax.device_put(optimizer, shardings)
  filters = FILTERS.init(TokenStats(*jnp.zeros((2, 1, 1))))
  filters = jax.tree.map(lambda x: x / 3, filters)
  return TrainState(
    jnp.int32(step), jnp.int32(8 * step), params, optimizer, filters
  )


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_state_comes_back_bit_for_bit_though_donated(tmp_path):
  state = made(mesh=layouts.make())
  saved = jax.tree.map(np.array, state)
  abstract = abstract_like(state)
  spoil = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0
  )
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state)
    # At once, while the writer may still be at work.
    for _ in range(3):
      state = spoil(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    assert checkpoints.steps() == [3]
    restored = checkpoints.restore(abstract)
  equal(jax.device_get(restored), saved)
  for x, want in zip(
    jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True
  ):
    assert x.sharding == want.sharding


def test_state_with_numpy_counters_comes_back(tmp_path):
  # As the trainer holds them.
  state = made()._replace(step=np.int32(3), cursor=np.int32(24))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state)
    checkpoints.wait()
    restored = checkpoints.restore(abstract_like(state))
  assert (int(restored.step), int(restored.cursor)) == (3, 24)
  equal(jax.device_get(restored.params), jax.device_get(state.params))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Checkpoints of steps 3, 5 and 8, of which the newest two are kept; saved
  from eight devices."""
  folder = tmp_path_factory.mktemp('checkpoints')
  with Checkpoints(folder, keep=2) as checkpoints:
    for step in (3, 5, 8):
      checkpoints.save(made(step, layouts.make()))
  return folder


def test_any_kept_step_is_restored_and_the_latest_by_default(folder):
  abstract = abstract_like(made())
  with Checkpoints(folder, keep=2) as checkpoints:
    assert checkpoints.steps() == [5, 8]
    # And onto one device, though eight saved it.
    equal(
      jax.device_get(checkpoints.restore(abstract)), jax.device_get(made(8))
    )
    older = checkpoints.restore_params(abstract.params, 5)
    equal(jax.device_get(older), jax.device_get(made(5).params))


def test_unknown_step_is_refused_with_those_there(folder, tmp_path):
  abstract = abstract_like(made())
  with Checkpoints(folder, keep=2) as checkpoints:
    with pytest.raises(ConfigError, match='of step 3 in .*; there: 5, 8'):
      checkpoints.restore(abstract, 3)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ConfigError, match='there: none'):
      checkpoints.restore(abstract)


def test_plain_orbax_restores_the_params(folder):
  with ocp.StandardCheckpointer() as plain:
    params = plain.restore(
      folder / '8' / 'params', abstract_like(made().params)
    )
  equal(jax.device_get(params), jax.device_get(made(8).params))


def test_damaged_checkpoint_is_named(tmp_path):
  state = made()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state)
  damaged = 0
  for file in (tmp_path / '3' / 'params').rglob('*'):
    if file.is_file() and file.stat().st_size > 1:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
      damaged += 1
  assert damaged
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ConfigError, match='is damaged') as caught:
      checkpoints.restore(abstract_like(state))
  assert str(tmp_path / '3') in str(caught.value)
  assert '\n' not in str(caught.value)
