"""The update compiled for a TPU slice that need not be there.

It also runs as a script, see `tests.libtpu`.
"""

import json
import math
import re

import pytest

from tests import libtpu

pytestmark = libtpu.needed

# Of the mesh; and of the policy, so that arrays are known by their sizes.
FSDP, TENSOR = 4, 4
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_SIZE = 3, 1024, 8, 4, 128
FEED_FORWARD, VOCABULARY = 3072, 20_480
SEQUENCES, TOKENS, ROWS, ROW_TOKENS = 48, 640, 32, 1024

# What a device multiplies with of each layer.
WEIGHTS = {
  'query, output': WIDTH * HEADS * HEAD_SIZE // TENSOR,
  'key, value': WIDTH * KV_HEADS * HEAD_SIZE // TENSOR,
  'gate, up, down': WIDTH * FEED_FORWARD // TENSOR,
}
HEAD = WIDTH * VOCABULARY // TENSOR


@pytest.fixture(scope='module')
def compiled():
  """What the script found."""
  return libtpu.found_by(__file__)


@pytest.fixture(scope='module')
def step(compiled):
  """The inner step's collectives, a dict for each array that one moves.

  kind: of the collective.
  size, type: how many numbers, of which type.
  depth: loops around it; in the second of them layers follow each other.
  loop: name of the innermost one.
  alone: nothing is computed meanwhile.
  across: 'tensor' if it stays within a data shard, else 'data'.
  backward: it belongs to a backward pass.
  """
  return compiled['step']


def moved(collectives, *kinds):
  return [x for x in collectives if x['kind'] in kinds]


GATHERS = 'all-gather', 'collective-permute', 'all-to-all'


def test_parameters_are_gathered_layer_by_layer(step):
  # Layers are scanned within the loop over microbatches.
  gathered = {x['size'] for x in moved(step, 'all-gather') if x['depth'] >= 2}
  # Some are not gathered: their parts go round while others are multiplied.
  rounds = {
    x['size'] * FSDP
    for x in moved(step, 'collective-permute')
    if x['depth'] >= 2
  }
  for size in WEIGHTS.values():
    assert size in gathered | rounds
  outside = [x for x in moved(step, 'all-gather') if x['depth'] < 2]
  assert max(x['size'] for x in outside) == HEAD
  least = LAYERS * min(WEIGHTS.values())
  assert not [x for x in outside if x['size'] != HEAD and x['size'] >= least]


def test_layers_gathered_before_the_loop_would_be_seen(compiled):
  sizes = {x['size'] for x in moved(compiled['whole layers'], 'all-gather')}
  assert {LAYERS * size for size in WEIGHTS.values()} <= sizes


def test_weights_travel_while_others_are_multiplied(step):
  weights = [
    x
    for x in moved(step, 'all-gather', 'collective-permute')
    if x['depth'] >= 2 and x['size'] >= min(WEIGHTS.values()) // FSDP
  ]
  waiting = sum(x['size'] for x in weights if x['alone'])
  assert waiting < 0.1 * sum(x['size'] for x in weights)


def test_weights_that_are_waited_for_would_be_seen(compiled):
  gathers = moved(compiled['whole layers'], 'all-gather')
  assert all(x['alone'] for x in gathers)


def test_head_is_gathered_and_its_gradient_summed_once_for_all_chunks(step):
  head = [x for x in step if x['size'] == HEAD]
  # Forward and backward, of each microbatch or for all of them.
  assert 1 <= len(head) <= 2
  assert {(x['kind'], x['depth'] < 2) for x in head} == {('all-gather', True)}
  # The head's gradient, which may be padded: each chip has a part of the sum.
  (total,) = (x for x in step if x['size'] > HEAD and x['across'] == 'data')
  assert (total['kind'], total['type']) == ('reduce-scatter', 'f32')
  assert total['depth'] == 1 and total['size'] < 1.2 * HEAD


def test_gradients_are_scattered_in_the_loop_over_layers(step):
  inside = [x for x in step if x['depth'] >= 2]
  between = [x for x in moved(inside, 'all-reduce') if x['across'] != 'tensor']
  # Norms only.
  assert max(x['size'] for x in between) <= WIDTH
  scattered = {x['size'] for x in moved(inside, 'reduce-scatter')} | {
    x['size']
    for x in moved(inside, 'collective-permute')
    if x['backward'] and x['across'] != 'tensor'
  }
  for size in WEIGHTS.values():
    assert size // FSDP in scattered


def test_gradients_reduced_whole_would_be_seen(compiled):
  sizes = {
    x['size']
    for x in moved(compiled['whole gradients'], 'all-reduce')
    if x['across'] != 'tensor'
  }
  assert WEIGHTS['key, value'] in sizes


def test_no_parameter_and_no_moment_is_held_whole(compiled):
  for name, (held, size) in compiled['held'].items():
    assert held == (size if 'norm' in name else size // (FSDP * TENSOR)), name
  # As they come, so they leave; nor is any gathered to be updated.
  assert compiled['moved'] == []
  outside = [x for x in compiled['step'] if x['depth'] == 0]
  least = min(WEIGHTS.values()) // FSDP
  large = [x for x in moved(outside, *GATHERS) if x['size'] >= least]
  assert {x['type'] for x in large} <= {'bf16'}


def test_moments_of_a_plain_init_would_be_seen(compiled):
  held, size = compiled['plain moment']
  assert held == size


def test_choices_among_all_tokens_move_scalars_only(step):
  # Loops whose collectives are all short are bisections.
  loops = {}
  for x in step:
    if x['depth'] == 1:
      loops.setdefault(x['loop'], []).append(x)
  choices = [
    found for found in loops.values() if max(x['size'] for x in found) <= 8
  ]
  # Two for the filter, and for percentiles and means of the metrics.
  assert len(choices) >= 4
  assert {x['kind'] for found in choices for x in found} == {'all-reduce'}
  # Beside them token gradients go to the rows that the tokens lie in.
  batch = SEQUENCES * TOKENS
  outside = [x for x in moved(step, 'all-gather') if x['depth'] == 0]
  assert len([x for x in outside if batch <= x['size'] < HEAD]) <= 2


def test_sorted_tokens_would_be_seen(compiled):
  batch = SEQUENCES * TOKENS
  assert any(x['size'] >= batch // FSDP for x in compiled['sorted'])


def test_rows_stay_cut(compiled):
  # Activations of a device, in a forward pass by plain XLA attention.
  assert compiled['rows'] == [ROWS // 16]


def test_rows_that_are_not_cut_would_be_seen(compiled):
  assert compiled['rows, not asked for'] != [ROWS // 16]


# Below is the script.


def read(text):
  """The collectives of a program, as the fixture `step` says."""
  computations, name = {}, ''
  for line in text.splitlines():
    if head := re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line):
      name = head[1]
    elif line.startswith(' '):
      computations.setdefault(name, []).append(line)
  callers = {}
  for caller, lines in computations.items():
    for callee in re.findall(r'%([\w.\-]+)', ' '.join(lines)):
      if callee in computations:
        callers[callee] = caller
  bodies = set(re.findall(r'body=%([\w.\-]+)', text))
  # Others are fused with what is computed at the same time.
  alone = bodies | set(re.findall(r'^ENTRY %([\w.\-]+)', text, re.MULTILINE))

  def loops(name):
    found = [name] if name in bodies else []
    return found + (loops(callers[name]) if name in callers else [])

  found, channels = [], set()
  pattern = (
    r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|'
    r'collective-permute)(-start)?\((.*)'
  )
  for name, lines in computations.items():
    around = loops(name)
    for shapes, kind, start, rest in re.findall(pattern, '\n'.join(lines)):
      # One that overlaps with several products is written into each of them.
      channel = re.search(r'channel_id=(\d+)', rest)
      if channel and channel[1] in channels:
        continue
      channels.add(channel and channel[1])
      if name.startswith('all-reduce-scatter'):
        # What the TPU compiler makes of a reduce-scatter.
        kind = 'reduce-scatter'
      groups = libtpu.groups(rest, FSDP * TENSOR)
      across_shards = any(len({i // TENSOR for i in g}) > 1 for g in groups)
      found += [
        {
          'kind': kind,
          'size': math.prod(map(int, filter(None, dims.split(',')))),
          'type': dtype,
          'depth': len(around),
          'loop': around[0] if around else '',
          'alone': name in alone and not start,
          'across': 'data' if across_shards else 'tensor',
          'backward': 'transpose(' in rest,
        }
        for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', shapes)
      ]
  return found


def main():
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  from jax_rlvr import mesh as layouts
  from jax_rlvr import policy
  from jax_rlvr.filters import clip_cov, clip_ratio, token_mean
  from jax_rlvr.policy import attention
  from jax_rlvr.records import Rows, Tokens, TokenStats
  from jax_rlvr.update import make_inner_step

  devices = topologies.get_topology_desc('v5e:4x4', 'tpu').devices

  def mesh_of(fsdp):
    return Mesh(
      np.array(devices).reshape(1, fsdp, -1),
      layouts.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )

  def laid(tree, shardings):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      shardings,
    )

  mesh = mesh_of(FSDP)
  whole = NamedSharding(mesh, P())

  def rows(mesh, dtype, *shape):
    sharding = NamedSharding(mesh, layouts.ROWS)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def everywhere(tree):
    return laid(tree, jax.tree.map(lambda _: whole, tree))

  config = policy.PolicyConfig(
    vocab_size=VOCABULARY, layers=LAYERS, width=WIDTH, heads=HEADS,
    kv_heads=KV_HEADS, head_size=HEAD_SIZE, feed_forward=FEED_FORWARD,
    tied_embeddings=False,
  )  # fmt: skip
  params = layouts.abstract(
    mesh, policy.abstract_params(config), layouts.TRAINING
  )
  half = jax.eval_shape(lambda p: policy.cast(p, jnp.bfloat16), params)
  half = layouts.abstract(mesh, half, layouts.TRAINING)

  def step():
    filters = optax.chain(clip_ratio(), clip_cov(fraction=0.2), token_mean())
    state = jax.eval_shape(optimizer.init, params)
    moments = layouts.state_shardings(mesh, state, layouts.TRAINING)
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    number = rows(mesh, jnp.float32, SEQUENCES, TOKENS)
    integer = rows(mesh, jnp.int32, SEQUENCES, TOKENS)
    inner_step = make_inner_step(
      config, filters, optimizer, microbatch_rows=ROWS // 2, temperature=1.0,
      dtype=jnp.bfloat16, shards=FSDP, backend=attention.splash(mesh),
    )  # fmt: skip
    return inner_step.lower(
      params,
      laid(state, moments),
      everywhere(jax.eval_shape(filters.init, TokenStats(one, one))),
      Tokens(
        mask=rows(mesh, jnp.bool, SEQUENCES, TOKENS),
        advantage=number,
        old_logprob=number,
        serial=rows(mesh, jnp.uint32, SEQUENCES, TOKENS),
        sampled_logprob=number,
        old_entropy=number,
        ids=integer,
        lengths=rows(mesh, jnp.int32, SEQUENCES),
      ),
      Rows(*[rows(mesh, jnp.int32, ROWS, ROW_TOKENS)] * len(Rows._fields)),
      everywhere(jax.eval_shape(lambda: jax.random.key(0))),
      None,
      True,
    )

  def activations():
    """Numbers of rows that a device holds of anything [rows, T, D]."""
    mesh = mesh_of(16)
    weights = layouts.abstract(mesh, half, layouts.TRAINING)
    program = jax.jit(lambda p, ids: policy.forward(config, p, ids))
    text = program.lower(weights, rows(mesh, jnp.int32, ROWS, 256)).compile()
    found = re.findall(rf'bf16\[(\d+),256,{WIDTH}\]', text.as_text())
    return sorted(set(map(int, found)))

  def collectives(function, *args, **settings):
    lowered = jax.jit(function, **settings).lower(*args)
    return read(lowered.compile().as_text())

  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-6))
  compiled = step().compile()

  def held(shape, sharding):
    return math.prod(sharding.shard_shape(shape.shape)), shape.size

  came = compiled.input_shardings[0][:2]
  left = compiled.output_shardings[:2]
  state = params, jax.eval_shape(optimizer.init, params)
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(state),
    jax.tree.leaves(came),
    jax.tree.leaves(left),
    strict=True,
  )
  of_state, changed = {}, []
  for (path, shape), before, after in pairs:
    name = jax.tree_util.keystr(path)
    if shape.ndim:
      of_state[name] = held(shape, after)
    if not before.is_equivalent_to(after, shape.ndim):
      changed.append(name)

  plain = jax.jit(optimizer.init).lower(params)
  moment = plain.compile().output_shardings[1][0].mu['embed']
  x = rows(mesh, jnp.bfloat16, 16 * FSDP, WIDTH)
  pull = rows(mesh, jnp.bfloat16, 16 * FSDP, KV_HEADS * HEAD_SIZE)
  tensor = NamedSharding(mesh, P(None, 'tensor'))
  scores = rows(mesh, jnp.float32, SEQUENCES, TOKENS)
  result = {
    'step': read(compiled.as_text()),
    'held': of_state,
    'moved': changed,
    'plain moment': held(params['embed'], moment),
    'whole layers': collectives(
      lambda p: layouts.laid_by(p, layouts.SAMPLING), half
    ),
    'whole gradients': collectives(
      lambda x, pull: x.T @ pull, x, pull, out_shardings=tensor
    ),
    'sorted': collectives(lambda x: jax.lax.top_k(x.reshape(-1), 99), scores),
    'rows': activations(),
  }
  layouts.laid = lambda x, spec: x
  result['rows, not asked for'] = activations()
  print(json.dumps(result))


if __name__ == '__main__':
  main()
