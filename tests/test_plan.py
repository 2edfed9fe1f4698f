"""What `plan` says of runs, against counts by hand."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from jax_rlvr import chips, compiled, lowered, plan, policy
from jax_rlvr.config import ConfigError, load
from jax_rlvr.pieces import Executed
from tests import libtpu

TOKENS = 128


def small(shape, **settings):
  """Two inner steps of eight sequences, four at a time."""
  settings = {
    'policy': shape,
    'warm_up': None,
    'prompts_per_step': 16,
    'group_size': 1,
    'inner_steps': 2,
    'max_prompt_tokens': 1,
    'max_completion_tokens': TOKENS - 1,
    'row_tokens': TOKENS,
    'microbatch_tokens': 4 * TOKENS,
    'slots': 4,
  } | settings
  config = load('configs/quickstart.py').config
  return dataclasses.replace(config, **settings)


def by_hand(shape, sequences, tokens, scored_apart=True):
  """FLOPs of an inner step, each layer run forward again on its way back.

  With rows of one block of attention, in which no pair is left out.
  """
  d, f, v = shape.width, shape.feed_forward, shape.vocab_size
  heads, kv_heads = (n * shape.head_size for n in (shape.heads, shape.kv_heads))
  # Multiply-adds of a token in a layer.
  projections = d * heads + 2 * d * kv_heads + heads * d
  up, down = 2 * d * f, f * d
  attention = 2 * tokens * heads
  layer = projections + up + down + attention
  # The outcome of the last product is of no use again, without a norm on it.
  again = layer - (0 if shape.post_norms else down)
  passes = 1 + scored_apart
  layers = shape.layers * (passes * layer + again + 2 * layer)
  # The head's scores are made once more for its gradient.
  head = d * v * (passes + 3)
  return 2 * sequences * tokens * (layers + head)


@pytest.mark.parametrize(
  'name, rows', [('llama-3.2-1b', 8), ('qwen3-0.6b', 4), ('gemma-3-1b', 4)]
)
def test_flops_of_the_train_step_are_those_counted_by_hand(name, rows):
  shape = policy.SHAPES[name]
  # Two chunks of logits, 512 tokens or 256: of one XLA saves a product.
  config = small(
    shape, prompts_per_step=4 * rows, microbatch_tokens=rows * TOKENS
  )
  run = lowered.make(config, jax.devices()[:1])
  program = lowered.inner_step(run)
  assert program.trips == (2, 2)
  text = program.lower().compile().as_text()
  pieces = Executed(text, program.trips).pieces
  found = sum(piece.times * piece.flops for piece in pieces)
  assert found == pytest.approx(by_hand(shape, 2 * rows, TOKENS), rel=0.02)


def test_flops_that_a_method_needs_are_those_of_the_policy():
  shape = policy.SHAPES['qwen3-0.6b']
  run = lowered.make(small(shape), jax.devices()[:1])
  # Read for its statistics, then forward and twice as much backward.
  whole = 4 * shape.forward_flops([TOKENS] * 8)
  found = lowered.inner_step(run).model_flops
  assert found == pytest.approx(whole, rel=0.01)


def test_weights_on_their_way_to_another_mesh_are_never_whole():
  config = small(policy.SHAPES['qwen3-0.6b'], tensor=1, sampling_tensor=4)
  run = lowered.make(config, jax.devices())
  fold, gather, _ = lowered.relayout(run)
  assert (fold.name, gather.name) == ('fold', 're-layout')
  text = fold.lower().compile().as_text()
  assert 'all-to-all' in text and 'all-gather' not in text
  # On one mesh there is nothing to fold.
  config = small(policy.SHAPES['qwen3-0.6b'], tensor=4)
  first, _ = lowered.relayout(lowered.make(config, jax.devices()))
  assert first.name == 're-layout'


def test_bytes_of_decoding_are_the_weights_and_what_is_filled():
  shape = policy.SHAPES['qwen3-0.6b']
  run = lowered.make(small(shape, slots=8), jax.devices())
  count = sum(x.size for x in jax.tree.leaves(policy.abstract_params(shape)))
  pair = 2 * shape.layers * shape.kv_heads * shape.head_size
  # Weights are on every device, slots on one each; all float32 on CPUs.
  filled = 1 + (TOKENS - 1) // 2
  expected = 32 * 4 * (count + pair * filled)
  found = lowered.segment(run).least_bytes
  assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
  'name, shape',
  [
    ('Qwen/Qwen2.5-7B', 'qwen2.5-7b'),
    ('Qwen/Qwen3-8B-Base', 'qwen3-8b'),
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'smollm2-135m'),
  ],
)
def test_shapes_are_found_by_name(name, shape):
  assert lowered.shape_of(name) == policy.SHAPES[shape]


def test_a_shape_that_nobody_knows_is_refused():
  with pytest.raises(ConfigError, match='no shape of that name; give a folder'):
    lowered.shape_of('Nobody/Nothing-9B')


def test_numbers_of_chips_are_of_one_device():
  class Device:
    def __init__(self, *coords):
      self.coords = coords

  v5p = chips.Topology.of(
    'v5p', [Device(x, y, z) for z in range(4) for y in range(2) for x in (0, 1)]
  )
  assert v5p.chip == chips.CHIPS['v5p']
  assert v5p.bounds == (2, 2, 4)
  # A closed axis carries twice what an open one does; two open ones, as much.
  assert v5p.bandwidth([0, 4, 8, 12]) == 2 * v5p.chip.link
  assert v5p.bandwidth([0, 1, 2, 3]) == 2 * v5p.chip.link
  assert v5p.bandwidth([0, 1]) == v5p.chip.link
  assert v5p.bandwidth([0, 4]) == v5p.chip.link
  v4 = chips.Topology.of('v4', [Device(0, 0, 0), Device(0, 0, 0)])
  assert v4.chip.hbm == chips.CHIPS['v4'].hbm / 2


@pytest.mark.parametrize(
  'kind, expected',
  [
    ('all-gather', 75),
    ('reduce-scatter', 75),
    ('all-reduce', 150),
    ('collective-permute', 100),
  ],
)
def test_what_a_collective_sends(kind, expected):
  assert chips.sent(kind, 100, 4) == expected


def example(**changes):
  """A plan of one program, as JSON has it."""
  gib = 2**30
  one = {
    'name': 'decode segment',
    'hbm_bytes': {
      'arguments': 12 * gib, 'temporaries': gib, 'output': 8 * gib,
      'aliased': 8 * gib, 'code': 0,
    },
  }  # fmt: skip
  held = {
    'state': 2 * gib, 'cast': gib, 'sampling_weights': 4 * gib,
    'slots': 8 * gib, 'slot': gib,
  }  # fmt: skip
  found = {
    'config': 'a.py',
    'topology': 'v5e:2x2',
    'hbm_capacity_bytes': 16 * gib,
    'shapes': {'slots': 32, 'sampling_shards': 4},
    'held': held,
    'programs': [one | changes],
  }
  found['stages'] = plan.stages(found)
  return found


def test_what_waits_beside_a_program_counts():
  found = example()
  assert found['stages'] == {'decode segment': 15 * 2**30}
  # A GiB is left on each of four shards, and a slot takes an eighth more.
  assert plan.slots_that_fit(found) == 32
  found['hbm_capacity_bytes'] += 2**30
  assert plan.slots_that_fit(found) == 36


def test_a_run_that_does_not_fit_is_told_how_much_and_what_helps():
  found = example() | {'fits': False, 'hbm_capacity_bytes': 14 * 2**30}
  assert plan.verdict(found) == [
    'decode segment takes 15.00 GiB with what waits beside it, 1.00 more than '
    'a device has; lower slots, or raise sampling_tensor'
  ]


def test_what_the_compiler_says_of_too_large_a_program_is_read():
  found = compiled.too_large(
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, '
    'the total memory required for HLO temporaries (1.50T) exceeds available '
    'HBM (95.73G). HLO module: jit_f.\nSee https://openxla.org'
  )
  assert found == {
    'wanted_bytes': 1.5 * 2**40,
    'hbm_bytes': 95.73 * 2**30,
  }
  found = example(too_large=found) | {'fits': False}
  del found['programs'][0]['hbm_bytes']
  (line,) = plan.verdict(found)
  assert line.startswith(
    'decode segment takes 1536.00 GiB for temporaries alone, 1520.00 more'
  )


@pytest.mark.parametrize(
  'room, expected', [(10.9, 0), (11.5, 1), (12.5, 2), (15.5, 5), (99, 16)]
)
def test_fit_finds_the_largest_microbatch_with_few_compiles(
  room, expected, monkeypatch
):
  asked = []

  def again(found, program, *, microbatch_tokens):
    asked.append(microbatch_tokens)
    # Of four shards, a hundred tokens a row; not quite what it grows by.
    rows = microbatch_tokens / 400
    return {'stages': {'inner step': 10 + rows + (rows > 8) / 10}}

  monkeypatch.setattr(plan, '_again', again)
  found = {
    'hbm_capacity_bytes': room,
    'shapes': {
      'rows': 64, 'data_shards': 4, 'row_tokens': 100, 'microbatch_rows': 8,
    },
    'stages': {'inner step': 12.0},
  }  # fmt: skip
  fitting = plan._fit_microbatch(found)
  assert fitting['microbatch_tokens'] == expected * 400
  assert len(asked) <= 4 and len(set(asked)) == len(asked)


def test_fit_finds_the_most_slots(monkeypatch):
  def again(found, program, *, slots):
    return {'stages': {'decode segment': 10.0 + slots / 10 + (slots > 90)}}

  monkeypatch.setattr(plan, '_again', again)
  found = {
    'hbm_capacity_bytes': 20.0,
    'shapes': {'sampling_shards': 4},
    'slots_that_fit': 100,
  }
  # Steps are of a twentieth.
  assert plan._fit_slots(found)['slots'] == 84


# Below, libtpu compiles.


@pytest.fixture
def recipe():
  return libtpu.ROOT / '.ci' / 'small.py'


def run(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'jax_rlvr.plan', *map(str, arguments)],
    cwd=libtpu.ROOT,
    capture_output=True,
    text=True,
  )


@libtpu.needed
def test_plan_of_a_small_run(recipe, tmp_path):
  out = tmp_path / 'plan.json'
  done = run('--config', recipe, '--topology', 'v5e:2x2', '--json', out)
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.splitlines()[-1] == 'fits'
  found = json.loads(out.read_text())
  assert (found['chips'], found['hbm_capacity_bytes']) == (
    4,
    int(15.75 * 2**30),
  )
  programs = {program['name']: program for program in found['programs']}
  for program in programs.values():
    assert {
      'name', 'hbm_bytes', 'flops', 'bytes', 'collectives', 'roofline_s',
      'utilisation',
    } <= set(program)  # fmt: skip
    assert 0 <= program['utilisation'] <= 1
  shape = policy.PolicyConfig(
    vocab_size=8192, layers=4, width=1024, heads=8, kv_heads=4, head_size=128,
    feed_forward=2048, tied_embeddings=False,
  )  # fmt: skip
  step = programs['inner step']
  # Splash has two products more backward: the scores, for each of its kernels.
  more = 4 * 16 * 256 * 256 * 8 * 128 * 4 * (14 / 8 - 1) * 2
  expected = by_hand(shape, 16, 256, scored_apart=False) + more
  assert step['flops'] == pytest.approx(expected / 4, rel=0.02)
  decode = programs['decode segment']
  # Some of the weights stay in fast memory from token to token.
  assert 0.5 < decode['bytes'] / decode['least_bytes'] < 2
  # Heads are summed in every layer, for every token.
  sums = [c for c in decode['collectives'] if c['axes'] == 'tensor']
  assert sum(c['count'] for c in sums) >= 32 * 2 * 4


@libtpu.needed
@pytest.mark.parametrize(
  'overrides, topology, message',
  [
    ('', 'v9x:2x2', "topology 'v9x:2x2' is unknown"),
    (':tensor=3', 'v5e:2x2', 'is not the 4 devices here'),
  ],
)
def test_what_cannot_be_planned_is_one_line(
  recipe, overrides, topology, message
):
  done = run('--config', f'{recipe}{overrides}', '--topology', topology)
  assert done.returncode == 2
  assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(
  libtpu.importlib.util.find_spec('libtpu') is not None, reason='libtpu is here'
)
def test_without_libtpu_one_line_says_what_to_install(recipe):
  done = run('--config', recipe, '--topology', 'v5e:2x2')
  assert done.returncode == 2
  assert done.stderr == (
    'planning compiles with libtpu, which is not here; '
    'pip install jax_rlvr[plan]\n'
  )
