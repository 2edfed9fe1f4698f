"""Programs for CPUs never leave the order of collectives open."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rlvr import mesh as layouts
from tests import order, processes


def test_no_collective_of_a_run_overtakes_a_loop(tmp_path):
  # In several microbatches; tests/test_pods.py has a run in one.
  command = [
    '-m', 'jax_rlvr.train', '--workdir', str(tmp_path / 'run'), '--config',
    'configs/quickstart.py:microbatch_tokens=256,inner_steps=2,steps=1,'
    'warm_up_steps=1,slots=64,eval_prompts=8,prompts_per_step=16,tensor=2',
  ]  # fmt: skip
  flags = order.dumped_to(tmp_path / 'dump')
  with processes.begun(tmp_path / 'logs', 1, 8, command, flags) as running:
    assert processes.ended(running, 900) == [0]
  assert order.loose_of(tmp_path / 'dump') == {}


def scanned(x, y, tie):
  def layer(x, _):
    for _ in range(order.IN_ORDER):
      x = x / jnp.max(jnp.sin(x))
    return x, None

  x, _ = jax.lax.scan(layer, x, length=3)
  return x, jnp.sum(tie(y, x[0]))


@pytest.mark.parametrize(
  'tie, expected', [(lambda y, _: y, 1), (layouts.after, 0)]
)
def test_sum_that_could_overtake_a_loop_is_seen(tie, expected):
  mesh = layouts.make()
  rows = jax.ShapeDtypeStruct(
    (64,), jnp.float32, sharding=NamedSharding(mesh, P('fsdp'))
  )
  compiled = jax.jit(scanned, static_argnums=2).lower(rows, rows, tie).compile()
  assert len(order.loose(compiled.as_text())) == expected
