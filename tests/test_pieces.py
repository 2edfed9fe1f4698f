"""What is read from the text of compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_rlvr import hlo
from jax_rlvr import mesh as layouts
from jax_rlvr.pieces import Executed


def pieces(f, *args, trips=(), devices=1):
  text = jax.jit(f).lower(*args).compile().as_text()
  return list(Executed(text, trips, devices=devices).pieces)


def flops(found):
  return sum(p.times * p.flops for p in found)


def array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_are_counted():
  found = pieces(
    lambda x, y: jnp.einsum('bij,bjk->bik', x, y),
    array(3, 4, 5),
    array(3, 5, 6),
  )
  assert flops(found) == 2 * 3 * 4 * 5 * 6


def test_body_of_a_scan_counts_as_often_as_it_runs():
  def f(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

  assert flops(pieces(f, array(8, 8), array(7, 8, 8))) == 7 * 2 * 8**3


def test_loops_that_end_by_their_data_count_as_told_by_depth():
  def outer(n, m, x, w):
    def inner(_, x):
      return jax.lax.fori_loop(0, m, lambda _, x: jnp.tanh(x @ w), x)

    return jax.lax.fori_loop(0, n, inner, x)

  number = jax.ShapeDtypeStruct((), jnp.int32)
  args = number, number, array(8, 8), array(8, 8)
  assert flops(pieces(outer, *args, trips=(5, 3))) == 5 * 3 * 2 * 8**3
  with pytest.raises(ValueError, match='ends by its data'):
    pieces(outer, *args)


def test_of_two_branches_the_longer_counts():
  def f(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

  assert flops(pieces(f, array(8, 8), array(8, 8))) == 2 * 2 * 8**3


def test_collectives_are_found_with_their_groups_and_bytes():
  mesh = layouts.make(fsdp=4, tensor=2)

  def cut(x, *spec):
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )

  found = pieces(
    lambda x, y: x @ y,
    cut(array(8, 64), None, 'fsdp'),
    cut(array(64, 16), 'fsdp'),
    devices=8,
  )
  (one,) = (p.collective for p in found if p.collective)
  assert one.kind == 'all-reduce'
  assert one.size == 8 * 16 * 4
  assert {tuple(sorted(group)) for group in one.groups} == {
    (0, 2, 4, 6),
    (1, 3, 5, 7),
  }


@pytest.mark.parametrize(
  'text, expected',
  [
    ('replica_groups={{0,2},{1,3}}', ((0, 2), (1, 3))),
    ('replica_groups=[2,2]<=[4]', ((0, 1), (2, 3))),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ('source_target_pairs={{0,1},{1,0}}', ((0, 1), (1, 0))),
    ('replica_groups={}', ((0, 1, 2, 3),)),
  ],
)
def test_groups_in_every_way_they_are_written(text, expected):
  assert hlo.groups(f', {text}, metadata', 4) == expected


# As the compiler for TPUs writes it, shortened.
FUSED = """\
HloModule jit_f, is_scheduled=true

%slice.1 (p.0: bf16[8,1024,4096], p.1: s32[]) -> bf16[1,1024,4096] {
  %p.0 = bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = bf16[1,1024,4096]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p.0, \
%p.1, %zero, %zero), dynamic_slice_sizes={1,1024,4096}
}

%renamed.1 (p.4: bf16[1024,4096]) -> bf16[1024,4096] {
  %p.4 = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %bitcast = bf16[1024,4096]{1,0:T(8,128)(2,1)} bitcast(%p.4)
}

%product.1 (p.2: bf16[1024,4096], p.3: bf16[4096,2048]) -> bf16[1024,2048] {
  %p.2 = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %p.3 = bf16[4096,2048]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %f.1 = bf16[1024,4096]{1,0} fusion(%p.2), kind=kLoop, calls=%renamed.1
  ROOT %conv = bf16[1024,2048]{1,0:T(8,128)(2,1)} convolution(%f.1, %p.3), \
dim_labels=bf_io->bf
}

%body (s: (s32[], bf16[8,1024,4096])) -> (s32[], bf16[8,1024,4096]) {
  %s = (s32[]{:T(128)}, bf16[8,1024,4096]{2,1,0}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %all = bf16[8,1024,4096]{2,1,0} get-tuple-element(%s), index=1
  %a = bf16[1,1024,4096]{2,1,0:T(8,128)(2,1)S(1)} fusion(%all, %i), kind=kLoop\
, calls=%slice.1
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, bf16[8,1024,4096]{2,1,0}) tuple(%next, %all)
}

%test (s.1: (s32[], bf16[8,1024,4096])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, bf16[8,1024,4096]{2,1,0}) parameter(0)
  %eight = s32[]{:T(128)} constant(8)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %eight), direction=LT
}

ENTRY %main (x: bf16[8,1024,4096], y: bf16[1024,4096], w: bf16[4096,2048]) -> \
bf16[1024,2048] {
  %start = s32[]{:T(128)} constant(0)
  %x = bf16[8,1024,4096]{2,1,0} parameter(0)
  %y = bf16[1024,4096]{1,0} parameter(1)
  %w = bf16[4096,2048]{1,0:S(1)} parameter(2)
  %tuple = (s32[]{:T(128)}, bf16[8,1024,4096]{2,1,0}) tuple(%start, %x)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[8,1024,4096]{2,1,0}) while(%tuple), \
condition=%test, body=%body, metadata={op_name="jit(f)/while"}
  %kernel = bf16[1024,4096]{1,0} custom-call(%y), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"about":"{\\"block\\": 512}"
}}
  ROOT %out = bf16[1024,2048]{1,0} fusion(%kernel, %w), kind=kOutput, \
calls=%product.1
}
"""


def test_text_for_tpus():
  asked = []

  def kernel(name, operands, results):
    asked.append((name, [x.dims for x in operands], [x.dims for x in results]))
    return 17.0, 19.0

  found = list(Executed(FUSED, kernel=kernel).pieces)
  assert asked == [('kernel', [(1024, 4096)], [(1024, 4096)])]
  by_op = {(p.op, p.times): p for p in found}
  # Of the eight only one is read at a time, into memory that is not HBM.
  sliced = by_op['fusion', 8]
  assert sliced.bytes == 1024 * 4096 * 2 + 4
  assert sliced.loops == ('jit(f)/while',)
  assert (by_op['kernel', 1].flops, by_op['kernel', 1].bytes) == (17, 19)
  product = by_op['fusion', 1]
  assert product.flops == 2 * 1024 * 4096 * 2048
  # Weights are in fast memory already.
  assert product.bytes == 2 * (1024 * 4096 + 1024 * 2048)


# As the compiler writes it for v6e: the operand comes with a later line.
OFFLOADED = """\
HloModule jit_g, is_scheduled=true

%called (p.0: bf16[16,1024]) -> bf16[64,1024] {
  %p.0 = bf16[16,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather = bf16[64,1024]{1,0:T(8,128)(2,1)} all-gather(%p.0), \
replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
}, execution_thread="sparsecore"

%async (p.1: bf16[16,1024]) -> bf16[64,1024] {
  %p.1 = bf16[16,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %offloaded = bf16[64,1024]{1,0:T(8,128)(2,1)} custom-call(%p.1), \
custom_call_target="unnamed", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[16,1024]) -> bf16[64,1024] {
  %x = bf16[16,1024]{1,0} parameter(0)
  %start = ((), (), (s32[8192]{0:T(1024)})) async-start(), \
async_execution_thread="sparsecore", calls=%async
  %update = ((bf16[16,1024]{1,0}), bf16[64,1024]{1,0}, (s32[8192]{0})) \
async-update(%start, %x)
  ROOT %done = bf16[64,1024]{1,0} async-done(%update)
}
"""


def test_collectives_of_sparse_cores_are_seen():
  (found,) = (p for p in Executed(OFFLOADED, devices=4).pieces if p.collective)
  assert (found.op, found.times) == ('all-gather', 1)
  assert found.collective.size == 64 * 1024 * 2
  assert found.collective.groups == ((0, 1, 2, 3),)
  assert not found.collective.awaited


def test_what_is_written_into_counts_as_what_is_written():
  def f(x, y, i):
    return jax.lax.dynamic_update_slice(x, y, (i, 0))

  step = jax.jit(f, donate_argnums=0)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  text = step.lower(array(1000, 8), array(1, 8), number).compile().as_text()
  moved = sum(p.bytes for p in Executed(text).pieces)
  assert moved < 10 * 8 * 4


@pytest.mark.parametrize(
  'size, pad, stride, spread, expected',
  [
    (3, 1, 1, 1, 3 * 8 - 2),
    (1, 0, 1, 1, 8),
    (1, 0, 2, 1, 4),
    # As products with a batch are written: each meets its own.
    (8, 0, 7, 8, 8),
  ],
)
def test_taps_of_a_convolution(size, pad, stride, spread, expected):
  places = np.arange((8 - 1) * spread + 1 + 2 * pad - size + 1)[::stride].size
  assert hlo._taps(places, 8, size, stride, pad, spread, 1) == expected


def test_a_stacked_product_on_devices_counts_what_each_does():
  mesh = layouts.make(fsdp=8)
  rows = NamedSharding(mesh, layouts.ROWS)
  x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
  found = pieces(functools.partial(jnp.dot), x, array(32, 4), devices=8)
  assert flops(found) == 2 * 16 * 32 * 4 / 8
