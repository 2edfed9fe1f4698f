"""Backends of attention against a dense reference, and against each other."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from jax_rlvr import mesh as layouts
from jax_rlvr import policy
from jax_rlvr.packing import pack
from jax_rlvr.policy import attention, splash
from jax_rlvr.records import Tokens
from jax_rlvr.token_stats import token_stats
from jax_rlvr.update import make_update

CONFIG = policy.PolicyConfig(
  vocab_size=11,
  layers=1,
  width=8,
  heads=4,
  kv_heads=2,
  head_size=8,
  feed_forward=8,
)


def configured(**changes):
  return dataclasses.replace(CONFIG, **changes)


CASES = {
  'plain': (CONFIG, False),
  'one key head': (configured(kv_heads=1, query_scale=0.5), False),
  'soft cap': (configured(attention_softcap=0.7), False),
  'window': (configured(window=9), True),
  'window of other layers': (configured(window=9), False),
  'both, traced': (configured(window=9, attention_softcap=0.7), jnp.bool(True)),
  'no window, traced': (configured(window=9), jnp.bool(False)),
}
of_each_case = pytest.mark.parametrize(
  'config, local', CASES.values(), ids=CASES.keys()
)


def packed(length, shared, seed=0):
  """Two rows of prompts with completions, and what pads them."""
  draw = np.random.default_rng(seed)
  layout = attention.Layout(*np.zeros((3, 2, length), np.int32))
  layout.group[:] = -1
  for row in range(2):
    group = used = 0
    while used < length - 20:
      prompt = draw.integers(1, 30)
      lengths = draw.integers(1, 60, draw.integers(1, 4) if shared else 1)
      start, prompt_stop = used, used + prompt
      layout.positions[row, used:prompt_stop] = np.arange(prompt)[
        : length - used
      ]
      used = prompt_stop
      for segment, size in enumerate(lengths, 1):
        own = slice(used, min(used + size, length))
        count = max(own.stop - own.start, 0)
        layout.positions[row, own] = prompt + np.arange(count)
        layout.segment[row, own] = segment if shared else 0
        used += size
      layout.group[row, start:used] = group
      group += 1
  return attention.Layout(*map(jnp.asarray, layout))


def inputs(config, length, seed=0, batch=2):
  """Query, key, value and a cotangent."""
  draw = np.random.default_rng(seed)
  n, k = config.heads, config.kv_heads
  return [
    jnp.asarray(draw.normal(size=(batch, length, heads, 8)), jnp.float32)
    for heads in (n, k, k, n)
  ]


def dense(config, layout):
  """All scores at one time; who sees whom is told token by token."""
  positions, group, segment = map(np.asarray, layout)
  i, j = (slice(None), slice(None), None), (slice(None), None)
  seen = positions[i] >= positions[j]
  seen &= group[i] == group[j]
  seen &= (segment[i] == segment[j]) | (segment[j] == 0)
  near = seen
  if config.window is not None:
    near = seen & (positions[i] - positions[j] < config.window)

  def attend(query, key, value, local):
    shared = config.heads // config.kv_heads
    key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
    scores = jnp.einsum('btnh,bsnh->bnts', query, key)
    scores *= config.query_scale or config.head_size**-0.5
    if config.attention_softcap:
      cap = config.attention_softcap
      scores = cap * jnp.tanh(scores / cap)
    mask = jnp.where(local, near, seen)[:, None]
    weights = jnp.where(mask, jnp.exp(scores), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    return jnp.einsum('bnts,bsnh->btnh', weights, value), None

  return attend


def with_gradients(backend, config, layout, local, arrays):
  """[mixed, and the gradients in query, key and value], padding left out."""
  scored = (layout.group >= 0)[..., None, None]

  @jax.jit
  def run(query, key, value, pull, traced):
    def mixed(*args):
      mixed = backend(config, layout)(*args, local if known else traced)[0]
      return jnp.where(scored, mixed, 0.0)

    value, pullback = jax.vjp(mixed, query, key, value)
    return value, *pullback(pull)

  known = isinstance(local, bool)
  return run(*arrays, local)


def assert_close(found, expected, tolerance):
  for mine, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)
    assert np.abs(theirs).max() > 0.1


# xla


@of_each_case
@pytest.mark.parametrize('length', [300, 600])
def test_xla_equals_a_dense_reference(config, local, length):
  layout = packed(length, shared=True)
  args = config, layout, local, inputs(config, length)
  found = with_gradients(attention.xla, *args)
  assert_close(found, with_gradients(dense, *args), 2e-5)


def test_reference_tells_layouts_windows_and_caps_apart():
  def mixed(config, local, shared=True):
    layout = packed(40, shared)
    return with_gradients(dense, config, layout, local, inputs(CONFIG, 40))[0]

  plain = mixed(CONFIG, False)
  for other in (
    mixed(CONFIG, False, shared=False),
    mixed(configured(window=9), True),
    mixed(configured(attention_softcap=0.7), False),
  ):
    assert np.abs(other - plain).max() > 0.1


def arrays_of(jaxpr):
  """Shapes of all floats in a jaxpr and those within."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      if jnp.issubdtype(variable.aval.dtype, jnp.floating):
        yield variable.aval.shape
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from arrays_of(inner)


@pytest.mark.parametrize('backend', [attention.xla, dense])
def test_scores_of_a_long_row_are_never_whole(backend):
  length = 4096
  config = configured(heads=2, kv_heads=1)
  layout = packed(length, shared=True)
  layout = jax.tree.map(lambda x: x[:1], layout)
  arrays = inputs(config, length, batch=1)
  run = functools.partial(with_gradients, backend, config, layout, False)
  largest = max(
    np.prod(shape, dtype=int)
    for shape in arrays_of(jax.make_jaxpr(run)(arrays).jaxpr)
  )
  whole = config.heads * length * length
  if backend is dense:
    assert largest == whole
    return
  assert largest == whole * attention.QUERY_BLOCK // length
  # In bytes, with all that exists beside them.
  compiled = jax.jit(run).lower(arrays).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * whole


# splash


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(splash, 'TILE', 128)


@of_each_case
def test_splash_equals_xla(small_tiles, config, local):
  layout = packed(300, shared=False)
  args = config, layout, local, inputs(config, 300)
  found = with_gradients(attention.splash(None, interpret=True).attend, *args)
  assert_close(found, with_gradients(attention.xla, *args), 2e-5)


@pytest.mark.parametrize(
  'heads, kv_heads, tensor', [(4, 4, 4), (4, 2, 4), (6, 3, 2), (3, 1, 2)]
)
def test_splash_on_a_mesh_equals_one_device(heads, kv_heads, tensor):
  config = configured(heads=heads, kv_heads=kv_heads)
  layout = jax.tree.map(lambda x: jnp.tile(x, (4, 1)), packed(60, shared=False))
  mesh = layouts.make(slices=2, tensor=tensor)
  args = config, layout, False, inputs(config, 60, batch=8)
  one, many = (
    with_gradients(attention.splash(m, interpret=True).attend, *args)
    for m in (None, mesh)
  )
  assert_close(many, one, 2e-5)


def sequences():
  """Six sequences of three prompts."""
  draw = np.random.default_rng(3)
  prompts = np.repeat([4, 9, 2], 2)
  lengths = prompts + draw.integers(3, 12, 6)
  columns = np.arange(lengths.max())
  mask = (columns >= prompts[:, None]) & (columns < lengths[:, None])
  shape = mask.shape
  return Tokens(
    mask=mask,
    advantage=np.ones(shape, np.float32),
    old_logprob=np.zeros(shape, np.float32),
    ids=draw.integers(0, 11, shape).astype(np.int32),
    lengths=lengths.astype(np.int32),
  )


def test_splash_in_a_policy_of_two_kinds_of_layers_equals_xla():
  config = configured(layers=2, window=5, local=(True, False))
  params = policy.init(config, jax.random.key(0))
  rows = pack(sequences(), 40, rows=4, share_prompts=False)
  pull = np.random.default_rng(0).normal(size=rows.ids.shape)

  def run(backend):
    def loss(params):
      stats = token_stats(config, params, rows, backend=backend)
      return jnp.sum(pull * stats.logprob), stats

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  grads, stats = run(attention.splash(None, interpret=True))
  expected_grads, expected = run(attention.XLA)
  assert_close(stats[:2], expected[:2], 1e-4)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
    grads,
    expected_grads,
  )


@pytest.mark.parametrize(
  'remat, runs', [('none', 1), ('attention', 1), ('full', 2)]
)
def test_splash_runs_forward_again_where_nothing_of_it_is_kept(remat, runs):
  config = configured(layers=3)
  backend = attention.splash(None, interpret=True)

  def loss(params):
    ids = jnp.zeros((1, 128), jnp.int32)
    return jnp.sum(
      policy.forward(config, params, ids, remat=remat, backend=backend)
    )

  found = jax.make_jaxpr(jax.grad(loss))(policy.abstract_params(config)).jaxpr
  found, _ = partial_eval.dce_jaxpr(found, [True] * len(found.outvars))
  names = re.findall(r'\bname=splash_mha_(\w+?)_', str(found))
  assert sorted(names) == ['dkv', 'dq', *['fwd'] * runs]


def test_shared_prompts_are_refused_with_splash():
  make = functools.partial(
    make_update,
    CONFIG,
    optax.identity(),
    optax.sgd(0.1),
    inner_steps=1,
    row_tokens=8,
    rows=1,
    microbatch_rows=1,
    temperature=1.0,
    backend=attention.splash(None),
  )
  make(share_prompts=False)
  with pytest.raises(ValueError, match='splash attention cannot share prompts'):
    make()


# cuDNN


@pytest.mark.parametrize('length', [40, 41])
@pytest.mark.parametrize('case', ['plain', 'one key head', 'window'])
def test_what_cudnn_is_asked_equals_xla(monkeypatch, case, length):
  config, local = CASES[case]
  original = jax.nn.dot_product_attention

  def asked(*args, implementation, **kwargs):
    assert implementation == 'cudnn' and args[0].shape[1] % 2 == 0
    return original(*args, implementation='xla', **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', asked)
  args = config, packed(length, shared=True), local, inputs(config, length)
  found = with_gradients(attention.cudnn, *args)
  assert_close(found, with_gradients(attention.xla, *args), 2e-5)


def test_cudnn_is_lowered_for_cuda(monkeypatch):
  # It asks the installed cuDNN for its version, and there may be none here.
  monkeypatch.setattr(
    'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version',
    lambda: 91000,
  )
  layout = packed(41, shared=True)
  config = configured(window=9)
  arrays = [x.astype(jnp.bfloat16) for x in inputs(config, 41)]
  run = functools.partial(with_gradients, attention.cudnn, config, layout)
  lowered = jax.jit(run).trace(jnp.bool(True), arrays)
  text = lowered.lower(lowering_platforms=('cuda',)).as_text()
  assert '@__cudnn$fmhaScaleBiasSoftmax(' in text
  assert '@__cudnn$fmhaScaleBiasSoftmaxBackward(' in text


# Which one


def devices(platform):
  """A mesh of one device, as far as `choose` looks."""
  return SimpleNamespace(
    devices=np.array([SimpleNamespace(platform=platform)], object)
  )


@pytest.mark.parametrize(
  'platform, config, dtype, expected',
  [
    ('cpu', CONFIG, 'float32', 'xla'),
    ('tpu', CONFIG, 'float32', 'splash'),
    ('tpu', configured(attention_softcap=50.0), 'bfloat16', 'splash'),
    ('gpu', CONFIG, 'bfloat16', 'cudnn'),
    ('gpu', CONFIG, 'float32', 'xla'),
    ('gpu', configured(attention_softcap=50.0), 'bfloat16', 'xla'),
    ('gpu', configured(head_size=6), 'bfloat16', 'xla'),
  ],
)
def test_auto_is_what_suits_the_devices(platform, config, dtype, expected):
  mesh = devices(platform)
  assert attention.choose('auto', config, dtype, mesh).name == expected
  assert attention.choose(expected, config, dtype, mesh).name == expected


@pytest.mark.parametrize(
  'name, platform, config, dtype, words',
  [
    ('splash', 'cpu', CONFIG, 'float32', "'splash' needs a TPU.*kind 'cpu'"),
    ('splash', 'gpu', CONFIG, 'float32', "'splash' needs a TPU.*kind 'gpu'"),
    ('cudnn', 'cpu', CONFIG, 'bfloat16', "'cudnn' needs a GPU.*kind 'cpu'"),
    ('cudnn', 'gpu', CONFIG, 'float32', 'bfloat16 or float16, not float32'),
    (
      'cudnn',
      'gpu',
      configured(attention_softcap=50.0),
      'bfloat16',
      'cannot cap scores, and the policy has attention_softcap=50.0',
    ),
    ('cudnn', 'gpu', configured(head_size=6), 'bfloat16', 'not of 6'),
  ],
)
def test_what_cannot_run_is_refused(name, platform, config, dtype, words):
  with pytest.raises(ValueError, match=words):
    attention.choose(name, config, dtype, devices(platform))
