"""Flags for TPUs, and compiled programs that a second process finds.

It also runs as a script, see `tests.libtpu`.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jax_rlvr import compilation
from tests import libtpu

RUN = """
import json, sys, jax
from jax_rlvr import compilation
found = []
jax.monitoring.register_event_listener(
  lambda event, **_: found.append(event.rsplit('/', 1)[-1])
)
folder = compilation.keep_programs(*sys.argv[1:])
jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))
print(json.dumps([folder, 'cache_hits' in found]))
"""


def run(platform='tpu', **environment):
  """The folder that a process keeps programs in, and whether it found any."""
  bare = {
    name: value
    for name, value in os.environ.items()
    if name not in ('JAX_COMPILATION_CACHE_DIR', 'XDG_CACHE_HOME', 'XLA_FLAGS')
  }
  settings = {
    'PYTHONPATH': str(libtpu.ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  done = subprocess.run(
    [sys.executable, '-c', RUN, platform],
    env=bare | settings | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  folder, hit = json.loads(done.stdout)
  return pathlib.Path(folder), hit


def test_second_process_finds_what_the_first_compiled(tmp_path):
  folder, hit = run(XDG_CACHE_HOME=str(tmp_path))
  assert folder == tmp_path / 'jax_rlvr' / 'compiled'
  assert not hit and list(folder.iterdir())
  assert run(XDG_CACHE_HOME=str(tmp_path)) == (folder, True)


def test_folder_of_the_user_goes_first(tmp_path):
  mine = tmp_path / 'mine'
  folder, hit = run(
    JAX_COMPILATION_CACHE_DIR=str(mine), XDG_CACHE_HOME=str(tmp_path)
  )
  assert (folder, hit) == (mine, False) and list(mine.iterdir())
  assert run(HOME=str(tmp_path))[0].is_relative_to(tmp_path / '.cache')


def test_nothing_of_cpus_is_kept_unasked(tmp_path):
  folder, hit = run('cpu', XDG_CACHE_HOME=str(tmp_path))
  assert (folder, hit) == (pathlib.Path(), False)
  assert not list(tmp_path.iterdir())
  mine = tmp_path / 'mine'
  assert run('cpu', JAX_COMPILATION_CACHE_DIR=str(mine)) == (mine, False)


OURS = ['--xla_tpu_some=true', '--xla_tpu_more=2']


@pytest.fixture
def flags(monkeypatch):
  """What `configure` makes of flags, with two of its own."""
  table = {'xla_tpu_some': 'true', 'xla_tpu_more': '2'}
  monkeypatch.setattr(compilation, 'FLAGS', table)

  def made_of(given):
    monkeypatch.setenv('LIBTPU_INIT_ARGS', given)
    compilation.configure()
    return os.environ['LIBTPU_INIT_ARGS'].split()

  return made_of


def test_flags_are_set_once(flags):
  assert flags('') == OURS
  assert flags(' '.join(OURS)) == OURS


def test_flags_of_the_user_go_first(flags):
  mine = ['--xla_tpu_some=false', '--xla_tpu_other=1']
  assert flags(' '.join(mine)) == [*mine, OURS[1]]


def test_flags_of_other_devices_stay_as_they_are(flags, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_some=1')
  flags('')
  assert os.environ['XLA_FLAGS'] == '--xla_cpu_some=1'


@libtpu.needed
def test_libtpu_knows_every_flag_and_switches_change_a_program():
  given = '--xla_tpu_enable_latency_hiding_scheduler=true'
  ours = [f'--{name}={value}' for name, value in compilation.FLAGS.items()]
  found = libtpu.found_by(__file__, given)
  assert found['flags'] == [given, *ours]
  assert found['changed'] == switches()


@libtpu.needed
def test_flag_that_libtpu_does_not_know_would_be_seen():
  with pytest.raises(AssertionError, match='no_such_flag'):
    libtpu.found_by(__file__, '--xla_tpu_no_such_flag=1')


def switches():
  """Flags that can be switched off."""
  return [name for name, x in compilation.FLAGS.items() if x == 'true']


# Below is the script.


def main():
  os.environ['LIBTPU_INIT_ARGS'] = ' '.join(sys.argv[1:])
  compilation.configure()

  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import PartitionSpec as P

  devices = topologies.get_topology_desc('v6e:2x2', 'tpu').devices
  mesh = jax.sharding.Mesh(np.array(devices), 'x')
  rows = jax.NamedSharding(mesh, P('x'))

  def layer(x, weight):
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), rows), None

  def of(sharding, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

  lowered = jax.jit(lambda x, weights: jax.lax.scan(layer, x, weights)).lower(
    of(rows, 1024, 1024),
    of(jax.NamedSharding(mesh, P(None, 'x')), 4, 1024, 1024),
  )

  def temporaries(**options):
    analysis = lowered.compile(compiler_options=options).memory_analysis()
    return analysis.temp_size_in_bytes

  print(
    json.dumps(
      {
        'flags': os.environ['LIBTPU_INIT_ARGS'].split(),
        'changed': [
          name
          for name in switches()
          if temporaries() != temporaries(**{name: 'false'})
        ],
      }
    )
  )


if __name__ == '__main__':
  main()
