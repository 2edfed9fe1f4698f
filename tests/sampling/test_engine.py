"""The sampler says what the trainer says, whatever is sampled beside."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_rlvr import mesh as layouts
from jax_rlvr import policy, prng
from jax_rlvr.packing import padded
from jax_rlvr.sampling import Engine, Group, engine, schedule, slots
from jax_rlvr.sampling.transforms import Transform, min_p, top_k, top_p
from jax_rlvr.token_stats import token_stats

CONFIG = policy.PolicyConfig(
  vocab_size=14,
  layers=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_size=8,
  feed_forward=24,
  tied_embeddings=False,
)
P, G, PROMPT, LIMIT = 8, 4, 6, 60
LENGTHS = [3, 6, 1, 4, 2, 5, 6, 3]
DRAW = np.random.default_rng(0)
IDS = [DRAW.integers(2, 14, n).astype(np.int32) for n in LENGTHS]
KEYS = prng.sample_keys(jax.random.key(7), range(P), G)
# Most completions are short, and some would not end.
LIMITS = np.where(np.arange(P * G) % 5 == 0, LIMIT, 9).reshape(P, G)
END = (1, 5)
FLOAT32 = np.dtype(np.float32)
ONE = Mesh(
  np.array(jax.devices()[:1]).reshape(1, 1, 1), ('slice', 'fsdp', 'tensor')
)
PROGRAMS = (
  slots.segment, slots.prefill, slots.admit, slots.repack, slots.empty,
)  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def narrow_windows():
  """Windows of 32 and 66 columns, and segments of 8 tokens."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine, 'COLUMNS', 32)
    yield


@pytest.fixture(scope='module')
def params():
  # Twice the scale: a policy that is sure of some tokens and not of others.
  params = policy.init(CONFIG, jax.random.key(0))
  return params | {'head': params['head'] * 2}


def groups(ids=IDS, keys=KEYS, limits=LIMITS):
  data = np.asarray(jax.random.key_data(keys))
  return [Group(*group) for group in zip(ids, data, limits, strict=True)]


def made(**other):
  return Engine(
    **{
      'policy': CONFIG,
      'mesh': ONE,
      'slots': 16,
      'prompt_tokens': PROMPT,
      'completion_tokens': LIMIT,
      'segment_tokens': 8,
    }
    | other
  )


def complete(
  params,
  asked=None,
  *,
  slots=16,
  mesh=ONE,
  config=CONFIG,
  temperature=1.0,
  end_ids=END,
  dtype=FLOAT32,
  seen=None,
  **rest,
):
  """(group, sample) → completion; `seen` gets the progress."""
  asked = groups() if asked is None else asked
  machine = made(policy=config, mesh=mesh, slots=slots, dtype=dtype)
  weights = machine.unstacked(layouts.place(mesh, params, layouts.TRAINING))
  found = {}
  for progress in machine.complete(
    weights, asked, temperature=temperature, end_ids=end_ids, **rest
  ):
    if seen is not None:
      seen.append(progress)
    found |= {(c.group, c.sample): c for c in progress.finished}
  assert set(found) == {
    (g, s) for g, group in enumerate(asked) for s in range(len(group.limits))
  }
  return found


@pytest.fixture(scope='module')
def base(params):
  return complete(params)


def same(a, b):
  """Equal tokens and endings; numbers to float32 rounding."""
  assert a.ids == b.ids and a.ended == b.ended and not a.failed
  for name in ('logprob', 'sampled_logprob', 'entropy'):
    np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-5)


def all_same(a, b):
  assert set(a) == set(b)
  for place in a:
    same(a[place], b[place])


def as_batch(found):
  """Prompts and completions as rows, and where the completions are."""
  ids = np.zeros((len(found), PROMPT + LIMIT), np.int32)
  mask = np.zeros(ids.shape, bool)
  for row, ((p, _), c) in enumerate(found.items()):
    start, stop = len(IDS[p]), len(IDS[p]) + len(c.ids)
    ids[row, :start], ids[row, start:stop] = IDS[p], c.ids
    mask[row, start:stop] = True
  return ids, mask


def differences(config, params, found, temperature=1.0):
  """Of log-probabilities and entropies, the sampler's − the trainer's."""
  ids, mask = as_batch(found)
  stats = jax.jit(functools.partial(token_stats, config))(
    params, padded(ids, mask), temperature=temperature
  )
  for name in ('logprob', 'entropy'):
    mine = np.concatenate([getattr(c, name) for c in found.values()])
    assert np.abs(mine).mean() > 0.1
    yield np.abs(mine - np.asarray(getattr(stats, name))[mask])


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_numbers_equal_the_trainers(params, temperature):
  found = complete(params, temperature=temperature)
  for difference in differences(CONFIG, params, found, temperature):
    assert difference.mean() <= 1e-5 and difference.max() <= 1e-4
  for c in found.values():
    np.testing.assert_allclose(c.sampled_logprob, c.logprob, atol=1e-6)


def test_numbers_are_close_to_the_trainers_in_bfloat16(params):
  found = complete(params, dtype=np.dtype(jnp.bfloat16))
  cast = policy.cast(params, jnp.bfloat16)
  for difference in differences(CONFIG, cast, found):
    print(f'bfloat16: mean {difference.mean():.1e} max {difference.max():.1e}')
    assert difference.mean() < 5e-3


@pytest.mark.parametrize('window', [7, 40])
def test_numbers_equal_the_trainers_where_layers_see_a_window(params, window):
  config = dataclasses.replace(CONFIG, window=window, local=(True, False))
  found = complete(params, config=config)
  for difference in differences(config, params, found):
    assert difference.max() <= 1e-4
  elsewhere = next(differences(CONFIG, params, found))
  assert elsewhere.max() > 1e-2


def test_completion_stops_with_its_first_end_token_or_at_its_limit(base):
  lasts = set()
  for (p, g), c in base.items():
    ends = np.isin(c.ids, END)
    assert not ends[:-1].any() and ends[-1] == c.ended
    assert c.ended or len(c.ids) == LIMITS[p, g]
    lasts |= {c.ids[-1]} & set(END) if c.ended else {None}
  # All three cases occur.
  assert lasts == {*END, None}


def test_end_ids_are_arguments_not_constants(params, base):
  other = complete(params, end_ids=(13, 13))
  assert any(c.ended for c in other.values())
  for place, c in other.items():
    assert c.ended == (c.ids[-1] == 13)
    # Until the first end of either the two are one sequence.
    size = min(len(c.ids), len(base[place].ids))
    assert c.ids[:size] == base[place].ids[:size]
  warmer = complete(params, temperature=1.3)
  assert any(warmer[place].ids != base[place].ids for place in base)


def test_greedy_is_the_argmax_of_full_forward_passes(params):
  limits = np.full((P, 1), 10)
  found = complete(
    params, groups(keys=KEYS[:, :1], limits=limits), temperature=0, end_ids=()
  )

  @jax.jit
  def logits(ids):
    return policy.logits(CONFIG, params, policy.forward(CONFIG, params, ids))

  ids = np.zeros((P, PROMPT + LIMIT), np.int32)
  for row, prompt in zip(ids, IDS, strict=True):
    row[: len(prompt)] = prompt
  rows = np.arange(P)
  for step in range(10):
    place = np.array(LENGTHS) + step
    ids[rows, place] = np.asarray(logits(ids))[rows, place - 1].argmax(-1)
    for p in range(P):
      assert found[p, 0].ids[step] == ids[p, place[p]]
      assert found[p, 0].sampled_logprob[step] == 0


@pytest.mark.parametrize('transform', [top_k(1), top_p(1e-6), min_p(1)])
def test_keeping_the_first_token_of_capped_logits_is_the_argmax(
  params, transform
):
  # A compiler may fuse the cap's product with a later sum, and so round twice.
  config = dataclasses.replace(CONFIG, logit_softcap=20.0)
  greedy = complete(params, config=config, temperature=0)
  drawn = complete(params, config=config, transform=transform)
  assert {x: c.ids for x, c in drawn.items()} == {
    x: c.ids for x, c in greedy.items()
  }


@pytest.mark.parametrize('count', [1, 4, 32])
def test_completions_do_not_depend_on_the_slots(params, base, count):
  all_same(complete(params, slots=count), base)


def test_completions_do_not_depend_on_the_order(params, base):
  order = [5, 2, 7, 0, 1, 6, 4, 3]
  mixed = complete(params, [groups()[i] for i in order])
  for (p, g), c in mixed.items():
    same(c, base[order[p], g])


def test_completion_is_the_same_alone(params, base):
  data = np.asarray(jax.random.key_data(KEYS))
  alone = Group(IDS[3], data[3, 2:3], LIMITS[3, 2:3])
  same(complete(params, [alone])[0, 0], base[3, 2])


def test_completions_do_not_depend_on_the_devices(params, base):
  mesh = layouts.make(tensor=2)
  assert layouts.row_shards(mesh) == 4
  all_same(complete(params, mesh=mesh), base)


def test_weights_come_from_a_mesh_of_another_shape(params, base):
  training = layouts.make(fsdp=4, tensor=2)
  laid = layouts.place(training, params, layouts.TRAINING)
  mesh = layouts.folded(training, 4)
  all_same(complete(laid, mesh=mesh), base)


def begun_groups(found, size=4):
  """The completions of more tokens than `size`, cut there, and whole."""
  data = np.asarray(jax.random.key_data(KEYS))
  begun = {place: c for place, c in found.items() if len(c.ids) > size}
  asked = []
  for (p, g), c in begun.items():
    start = copy.deepcopy(c)
    start.keep(size)
    asked.append(Group(IDS[p], data[p, g : g + 1], LIMITS[p, g : g + 1], start))
  return asked, list(begun.values())


def test_completion_goes_on_where_it_was_cut(params, base):
  asked, whole = begun_groups(base)
  found = complete(params, asked)
  for number, c in enumerate(whole):
    same(found[number, 0], c)
  # Numbers of what was there are as they were.
  asked[0].begun.logprob[0] = 7.0
  assert complete(params, asked)[0, 0].logprob[0] == 7.0


def test_window_widens_for_one_that_comes_while_slots_are_idle(params, base):
  # Sixteen of at most nine tokens, then one of 28 that goes on.
  first = [group._replace(limits=np.full(G, 9)) for group in groups()[:4]]
  asked, whole = begun_groups(base, 28)
  seen = []
  found = complete(params, [*first, asked[0]], seen=seen)
  same(found[4, 0], whole[0])
  sizes = [(progress.columns, len(progress.running)) for progress in seen]
  assert sizes[0][0] == 32 < sizes[-1][0]
  for p in range(4):
    for g in range(G):
      assert found[p, g].ids == base[p, g].ids[:9]


def test_window_widens_and_slots_are_packed_as_completions_run(params):
  seen = []
  complete(params, seen=seen)
  columns = [progress.columns for progress in seen]
  sizes = [progress.slots for progress in seen]
  assert (columns[0], max(columns)) == (32, 96)
  assert (sizes[0], min(sizes)) == (16, 4)
  assert sizes == sorted(sizes, reverse=True)
  assert seen[-1].done == seen[-1].total == P * G and not seen[-1].running
  # No slot waits for the longest: the work is near what is asked for.
  steps = sum(progress.slots * 8 for progress in seen)
  assert sum(p.tokens for p in seen) > 0.4 * steps


def test_prompts_are_read_once(params, monkeypatch):
  read = []
  prefill = slots.prefill

  def counting(config, weights, ids, *rest):
    read.extend(tuple(row) for row in np.asarray(ids) if row.any())
    return prefill(config, weights, ids, *rest)

  monkeypatch.setattr(schedule.programs, 'prefill', counting)
  complete(params, slots=4)
  assert len(read) == P


def test_nothing_compiles_after_the_warm_up(params):
  machine = made()
  machine.warm_up(machine.unstacked(params))
  before = [program._cache_size() for program in PROGRAMS]
  complete(params)
  complete(params, temperature=0.7)
  complete(params, end_ids=(13, 13))
  complete(params, begun_groups(complete(params))[0])
  keys = prng.sample_keys(jax.random.key(8), range(P), G)
  complete(params, groups(IDS[::-1], keys)[:3])
  assert [program._cache_size() for program in PROGRAMS] == before


def test_group_and_tokens_draw_from_keys_of_their_own(base):
  assert len({tuple(base[1, g].ids) for g in range(G)}) > 1
  assert len({i for c in base.values() for i in c.ids}) > 5


@dataclasses.dataclass(frozen=True)
class Fresh(Transform):
  """Nothing comes twice."""

  reads_seen = True

  def __call__(self, logits, seen=None):
    return jnp.where(seen, -jnp.inf, logits)


def test_what_was_seen_is_told_to_transforms(params):
  limits = np.broadcast_to([[14 - len(set(ids))] for ids in IDS], (P, G))
  found = complete(params, groups(limits=limits), transform=Fresh(), end_ids=())
  for (p, _), c in found.items():
    assert {*c.ids, *IDS[p].tolist()} == set(range(14))
  # What is trained on is the full softmax.
  for difference in differences(CONFIG, params, found):
    assert difference.max() <= 1e-4
  assert all(c.sampled_logprob[-1] == 0 for c in found.values())


def test_completion_with_nan_logits_fails_alone(params, base):
  broken = params | {'embed': params['embed'].at[13].set(jnp.nan)}
  outcomes = set()
  for (p, g), c in complete(broken).items():
    whole, start = [*IDS[p], *base[p, g].ids], len(IDS[p])
    if 13 not in whole[:-1]:
      same(c, base[p, g])
      outcomes.add('whole')
    else:
      # Once it is read, nothing can be drawn any more.
      size = max(whole.index(13) + 1 - start, 0)
      assert c.failed and not c.ended
      assert c.ids == base[p, g].ids[:size]
      assert np.isfinite([*c.logprob, *c.sampled_logprob, *c.entropy]).all()
      outcomes.add('begun' if size else 'not begun')
  assert outcomes == {'whole', 'begun', 'not begun'}


def test_bad_input_is_refused_by_name(params, monkeypatch):
  with pytest.raises(ValueError, match='prompt 1 is empty'):
    complete(params, [groups()[0], groups([np.zeros(0, np.int32)] * P)[1]])
  with pytest.raises(ValueError, match='prompt 0 of 7 tokens leaves no room'):
    limits = np.full((1, G), 96)
    complete(params, groups([np.full(7, 3)], KEYS[:1], limits))
  monkeypatch.setattr(layouts, 'memory', lambda mesh: 50_000)
  with pytest.raises(ValueError, match=r'16 slots of 96 tokens take 0\.0 GiB'):
    complete(params)


def test_cache_takes_what_was_estimated(params):
  machine = made()
  # Keys and values, layers, slots, heads, size, columns, bytes.
  cache = 2 * 2 * 16 * 2 * 8 * 96 * 4
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  assert machine.bytes_per_device == cache + weights
  mesh = layouts.make(tensor=2)
  cut = dataclasses.replace(machine, mesh=mesh).bytes_per_device
  # Slots over four, heads over two; all but the norms over two.
  norms = sum(
    x.nbytes
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if 'norm' in jax.tree_util.keystr(path)
  )
  assert cut == cache // 8 + norms + (weights - norms) // 2
