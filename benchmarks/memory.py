"""What the update needs beside weights and optimizer: compiled, never run.

python benchmarks/memory.py            # tables for this machine's CPU
python benchmarks/memory.py --tpu      # for a v5p chip; needs libtpu alone
python benchmarks/memory.py --json update '{"remat": "full"}'
"""

from __future__ import annotations

import os

# XLA:CPU's scheduler is made for concurrency, and then reports several times
# what an accelerator would take.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
  ]
)

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from jax_rlvr import policy  # noqa: E402
from jax_rlvr.filters import clip_ratio, token_mean  # noqa: E402
from jax_rlvr.records import Rows, Tokens, TokenStats  # noqa: E402
from jax_rlvr.token_stats import token_stats  # noqa: E402
from jax_rlvr.update import make_inner_step  # noqa: E402

MIB, GIB = 2**20, 2**30
SMOLLM2 = policy.SHAPES['smollm2-135m']
TOY = dataclasses.replace(
  SMOLLM2, vocab_size=512, width=64, heads=2, kv_heads=1, feed_forward=128
)
# 1,024 completion tokens and a prompt.
ROW_TOKENS = 1152


def chip():
  """One v5p chip, as a sharding; there need not be any."""
  from jax.experimental import topologies

  topology = topologies.get_topology_desc('v5p:2x2x1', 'tpu')
  return jax.sharding.SingleDeviceSharding(topology.devices[0])


def abstract(tree, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def shapes(rows: int, row_tokens: int, sharding=None):
  """Abstract Tokens and Rows of as many sequences as rows."""

  def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  size = rows, row_tokens
  number, whole = of(jnp.float32, *size), of(jnp.int32, *size)
  tokens = Tokens(
    mask=of(jnp.bool, *size),
    advantage=number,
    old_logprob=number,
    serial=of(jnp.uint32, *size),
    sampled_logprob=number,
    old_entropy=number,
    ids=whole,
    lengths=of(jnp.int32, rows),
  )
  return tokens, Rows(*[whole] * len(Rows._fields))


def lower_update(
  config=SMOLLM2,
  rows=8,
  microbatch_rows=8,
  row_tokens=ROW_TOKENS,
  remat: policy.Remat = 'full',
  dtype='float32',
  sharding=None,
):
  """An off-policy inner step with Adam, lowered."""
  filters = optax.chain(clip_ratio(), token_mean())
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-6))
  step = make_inner_step(
    config,
    filters,
    optimizer,
    microbatch_rows=microbatch_rows,
    temperature=1.0,
    remat=remat,
    dtype=dtype,
  )
  params = policy.abstract_params(config)
  state = (
    params,
    jax.eval_shape(optimizer.init, params),
    jax.eval_shape(
      filters.init, TokenStats(*[jax.ShapeDtypeStruct((1, 1), jnp.float32)] * 2)
    ),
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  return step.lower(
    *abstract(state, sharding),
    *shapes(rows, row_tokens, sharding),
    abstract(key, sharding),
    None,
    False,
  )


def lower_stats(
  vocabulary=151_936, tokens=8192, width=896, tied=False, dtype='float32'
):
  """Stats of 1,024-token rows through one layer, and their vjp, lowered."""
  config = policy.PolicyConfig(
    vocab_size=vocabulary,
    layers=1,
    width=width,
    heads=2,
    kv_heads=1,
    head_size=64,
    feed_forward=256,
    tied_embeddings=tied,
  )
  params = jax.eval_shape(
    lambda p: policy.cast(p, dtype), policy.abstract_params(config)
  )

  def both(params, rows, pull):
    stats, pullback = jax.vjp(lambda p: token_stats(config, p, rows), params)
    return stats, pullback(pull)

  _, rows = shapes(tokens // 1024, 1024)
  pull = jax.ShapeDtypeStruct(rows.ids.shape, jnp.float32)
  return jax.jit(both).lower(params, rows, TokenStats(pull, pull))


def temporaries(lowered) -> int:
  """Bytes."""
  return lowered.compile().memory_analysis().temp_size_in_bytes


def _update_table(remats, dtype, sharding) -> None:
  count = sum(x.size for x in jax.tree.leaves(policy.abstract_params(SMOLLM2)))
  print(f'{count:,} parameters, {dtype}, rows of {ROW_TOKENS} tokens\n')
  print('| remat | 8 rows, GiB | 64 rows by eights, GiB | ', end='')
  print('bytes a parameter | bytes a token |')
  print('|---|---|---|---|---|', flush=True)
  for remat in remats:

    def measure(rows, remat=remat):
      return temporaries(
        lower_update(rows=rows, remat=remat, dtype=dtype, sharding=sharding)
      )

    whole, half, loop = measure(8), measure(4), measure(64)
    # What four rows more take is the tokens', the rest the weights'.
    a_token = (whole - half) / (4 * ROW_TOKENS)
    a_parameter = (whole - a_token * 8 * ROW_TOKENS) / count
    print(
      f'| {remat} | {whole / GIB:.2f} | {loop / GIB:.2f} | '
      f'{a_parameter:.1f} | {a_token:,.0f} |',
      flush=True,
    )


def _stats_table(dtype) -> None:
  print('\n| head | tokens | temporaries, MiB | dense logits, MiB |')
  print('|---|---|---|---|')
  for tied in False, True:
    for tokens in 8192, 16_384:
      size = temporaries(lower_stats(tokens=tokens, tied=tied, dtype=dtype))
      print(
        f'| {"tied" if tied else "untied"} | {tokens:,} | '
        f'{size / MIB:,.0f} | {tokens * 151_936 * 4 / MIB:,.0f} |',
        flush=True,
      )


def compile_seconds(layers: int) -> float:
  lowered = lower_update(
    dataclasses.replace(TOY, layers=layers), row_tokens=64, microbatch_rows=4
  )
  start = time.perf_counter()
  lowered.compile()
  return time.perf_counter() - start


def _compile_table(repeats: int = 5) -> None:
  times = {8: [], 64: []}
  for _ in range(repeats):
    for layers, seconds in times.items():
      seconds.append(compile_seconds(layers))
  medians = {n: statistics.median(x) for n, x in times.items()}
  print(f'\ncompile, median of {repeats}: ', end='')
  print(', '.join(f'{n} layers {s:.1f} s' for n, s in medians.items()), end='')
  print(f'; ratio {medians[64] / medians[8]:.2f}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--tpu', action='store_true', help='the update on v5p')
  parser.add_argument('--type', default=None, help='to compute in')
  parser.add_argument('--remat', nargs='+', default=['none', 'dots', 'full'])
  parser.add_argument(
    '--json',
    nargs=2,
    metavar=('WHAT', 'ARGUMENTS'),
    help='temporaries of update or stats, as a number',
  )
  arguments = parser.parse_args()
  if arguments.json:
    what, given = arguments.json
    lower = {'update': lower_update, 'stats': lower_stats}[what]
    print(json.dumps(temporaries(lower(**json.loads(given)))))
    return
  dtype = arguments.type or ('bfloat16' if arguments.tpu else 'float32')
  sharding = chip() if arguments.tpu else None
  _update_table(arguments.remat, dtype, sharding)
  if not arguments.tpu:
    _stats_table(dtype)
    _compile_table()


if __name__ == '__main__':
  main()
