"""Every test runs on eight virtual CPU devices, strictly."""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # Eight devices share few cores: a collective may wait long for its turn.
    '--xla_cpu_collective_call_terminate_timeout_seconds=600',
    # In programs of the tests' own, collectives that `mesh.after` would order
    # mostly have an order so.
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
  ]
)

import jax  # noqa: E402
import pytest  # noqa: E402

# Few programs at a time: many whose collectives wait for one another's threads
# may wait for good, which XLA ends, and all tests with it, after a while.
jax.config.update('jax_cpu_enable_async_dispatch', False)
jax.config.update('jax_numpy_rank_promotion', 'raise')

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Each holds memory maps, of which Linux grants a process 65,530.

  A file of tests makes up to 20,000 of them.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_text().count('\n') > 30_000:
    jax.clear_caches()


@pytest.fixture(scope='session')
def data() -> pathlib.Path:
  """The folder of real data sets beside the checkout, where there is one."""
  folder = ROOT.parent / 'shared' / 'data'
  if not folder.is_dir():
    pytest.skip(f'no real data sets in {folder}')
  return folder
