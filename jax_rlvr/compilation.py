"""How XLA compiles: flags for TPUs, and compiled programs kept on disk.

The one place for both. What a user sets goes first.
"""

from __future__ import annotations

import os
import pathlib

import jax

# Flags of libtpu, and what each is for. libtpu ends the process over one that
# it does not know. Latency hiding and asynchronous collectives are not among
# them: libtpu 0.0.52 has them on; see docs/mesh.md.
FLAGS: dict[str, str] = {
  # v6e gathers the next weights while it multiplies, on its SparseCores; else
  # it waits for them. v5p does so anyway, and others have none.
  'xla_tpu_enable_sparse_core_collective_offload_all_gather': 'true',
  # Weights are gathered, then multiplied. Multiplied as they come round a ring
  # of 16 chips, every part is added to all of the product in HBM, in bfloat16:
  # an update of Qwen2.5-7B on 32 v6e reads and writes 20 TB for 9.
  'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000',
}


def configure() -> None:
  """Sets the flags; to be called before any device is touched.

  They go to `LIBTPU_INIT_ARGS`, which nothing but libtpu reads; those that are
  named there already stay as they are.
  """
  given = os.environ.get('LIBTPU_INIT_ARGS', '').split()
  names = {flag.lstrip('-').split('=')[0] for flag in given}
  given += [
    f'--{name}={value}' for name, value in FLAGS.items() if name not in names
  ]
  os.environ['LIBTPU_INIT_ARGS'] = ' '.join(given)


def keep_programs(platform: str | None = None) -> str:
  """Keeps what took a second or more to compile; returns where, if anywhere.

  In `JAX_COMPILATION_CACHE_DIR`, a folder or a bucket (`gs://…`); if that is
  not set, in `jax_rlvr/compiled` in `XDG_CACHE_HOME`, or in `~/.cache`. Then
  nothing of CPUs is kept: what is compiled for one need not run on another.

  Args:
    platform: of the devices; that of those here if None.
  """
  kept = str(jax.config.values['jax_compilation_cache_dir'] or '')
  if kept or (platform or jax.default_backend()) == 'cpu':
    return kept
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  kept = str(pathlib.Path(home) / 'jax_rlvr' / 'compiled')
  jax.config.update('jax_compilation_cache_dir', kept)
  return kept
