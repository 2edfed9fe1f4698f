"""The recipes of configs/ have the papers' numbers, judged by what they do."""

import functools
import importlib.util
import inspect
import json
import pathlib
import re
import runpy

import jax
import numpy as np
import optax
import pyarrow
import pyarrow.parquet
import pytest

from jax_rlvr import advantages, config, filters, policy, train
from jax_rlvr.config import ConfigError
from jax_rlvr.policy_gradient import token_gradients
from jax_rlvr.records import Completion, Tokens, TokenStats, Tracked
from jax_rlvr.tokenizer import train_characters

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'

# Chains in order: name of a filter and its numbers.
CLIP = ('clip_ratio', {'low': 0.2, 'high': 0.2})
CLIP_HIGHER = ('clip_ratio', {'low': 0.2, 'high': 0.28})
TOKEN_MEAN = ('token_mean', {})
SEQUENCE_MEAN = ('sequence_mean_token_mean', {})


def clip_cov(fraction):
  band = {'fraction': fraction, 'lower': 1.0, 'upper': 5.0}
  wide = ('clip_ratio', {'low': 1.0, 'high': 1.0})
  return wide, ('clip_cov', band), TOKEN_MEAN


def kl_cov(fraction):
  return ('kl_cov', {'fraction': fraction, 'coef': 1.0}), TOKEN_MEAN


FORKING = CLIP_HIGHER, ('forking_tokens', {'fraction': 0.2}), TOKEN_MEAN

# Recipes for the quickstart's policy: chain, advantage and updates a batch.
SUMS = {
  'grpo': ((CLIP, SEQUENCE_MEAN), 'group_norm', 1),
  'dr_grpo': (
    (CLIP, ('sequence_mean_token_sum', {'length': 4})),
    'group_mean',
    1,
  ),
  'rloo': ((('sequence_mean_token_sum', {'length': 1}),), 'leave_one_out', 1),
  'dapo': ((CLIP_HIGHER, TOKEN_MEAN), 'group_norm', 4),
  'clip_cov': (clip_cov(1e-2), 'group_norm', 4),
  'kl_cov': (kl_cov(2e-2), 'group_norm', 4),
  'forking_tokens': (FORKING, 'group_norm', 4),
  'gspo': (
    (('gspo', {'low': 0.2, 'high': 0.27}), SEQUENCE_MEAN),
    'group_norm',
    4,
  ),
  'cispo': (
    (('cispo', {'low': 1.0, 'high': 4.0}), TOKEN_MEAN),
    'group_norm',
    4,
  ),
}

# Entropy Mechanism §4.3; max_asked, lengths of prompts and lr: its scripts.
ENTROPY = dict(
  prompts_per_step=256,
  group_size=8,
  inner_steps=8,
  max_prompt_tokens=2048,
  max_completion_tokens=8192,
  temperature=1.0,
  transform=None,
  dynamic_sampling=True,
  max_asked=10,
  oversample=1,
  eval_every=4,
  eval_samples=32,
  eval_temperature=0.6,
)
# Beyond the 80/20 Rule §5.2; max_asked, weight decay and others: its script.
FORKS = dict(
  prompts_per_step=512,
  group_size=16,
  inner_steps=16,
  max_prompt_tokens=2048,
  max_completion_tokens=20_480,
  temperature=1.0,
  transform=None,
  dynamic_sampling=True,
  max_asked=30,
  oversample=1,
  eval_every=5,
  eval_samples=16,
  eval_temperature=1.0,
)
# Recipes at the papers' size: policy, chain, lr, weight decay, steps, knobs.
PAPERS = {
  'qwen2_5_7b_grpo': (
    'Qwen2.5-7B', (CLIP, TOKEN_MEAN), 5e-7, 0, 320, ENTROPY,
  ),
  'qwen2_5_7b_clip_higher': (
    'Qwen2.5-7B', (CLIP_HIGHER, TOKEN_MEAN), 5e-7, 0, 320, ENTROPY,
  ),
  'qwen2_5_7b_clip_cov': (
    'Qwen2.5-7B', clip_cov(2e-4), 5e-7, 0, 320, ENTROPY,
  ),
  'qwen2_5_7b_kl_cov': ('Qwen2.5-7B', kl_cov(2e-3), 5e-7, 0, 320, ENTROPY),
  'qwen2_5_32b_clip_cov': (
    'Qwen2.5-32B', clip_cov(2e-4), 1e-6, 0, 136, ENTROPY,
  ),
  'qwen2_5_32b_kl_cov': ('Qwen2.5-32B', kl_cov(2e-4), 1e-6, 0, 136, ENTROPY),
  'qwen3_8b_forking': ('Qwen3-8B-Base', FORKING, 1e-6, 0.1, 85, FORKS),
  'qwen3_14b_forking': ('Qwen3-14B-Base', FORKING, 1e-6, 0.1, 85, FORKS),
  'qwen3_32b_forking': ('Qwen3-32B-Base', FORKING, 1e-6, 0.1, 85, FORKS),
}  # fmt: skip

# Table 2 of either paper: AIME24, AIME25, AMC, MATH500 and the average.
SCORES = {
  'qwen2_5_7b_grpo': '21.2 9.6 58.7 78.8 38.6',
  'qwen2_5_7b_clip_higher': '18.1 11.5 56.6 79.2 38.8',
  'qwen2_5_7b_clip_cov': '22.1 15.8 58.2 80.4 40.4',
  'qwen2_5_7b_kl_cov': '22.6 12.9 61.4 80.8 40.6',
  'qwen2_5_32b_clip_cov': '32.3 22.7 67.2 87.0 50.3',
  'qwen2_5_32b_kl_cov': '36.8 30.8 74.5 84.6 52.2',
  'qwen3_8b_forking': '34.58 26.25 77.19 89.70 54.23',
  'qwen3_14b_forking': '50.42 42.92 91.56 93.59 64.39',
  'qwen3_32b_forking': '63.54 56.67 94.22 94.88 70.69',
}

CHAINS = {name: row[0] for name, row in SUMS.items()}
CHAINS |= {name: row[1] for name, row in PAPERS.items()}
# Ours, by trial: half the quickstart's for a quarter of its batch.
LEARNING = {n: (1e-3 if row[2] == 1 else 5e-4, 0) for n, row in SUMS.items()}
LEARNING |= {name: (row[2], row[3]) for name, row in PAPERS.items()}

each_recipe = pytest.mark.parametrize('name', CHAINS)
each_of_sums = pytest.mark.parametrize('name', SUMS)
each_of_papers = pytest.mark.parametrize('name', PAPERS)


def load(name, overrides=''):
  return config.load(f'{CONFIGS / name}.py{overrides}').config


@functools.cache
def loaded(name):
  return load(name)


def docstring(name):
  """As it is written: its commands go over several lines."""
  return (CONFIGS / f'{name}.py').read_text().split('"""')[1]


def test_tables_have_every_recipe_but_those_with_tests_of_their_own():
  others = {
    'quickstart',
    'smollm2_arithmetic',
    'smollm2_arithmetic_clip_cov',
    'smollm2_gsm8k',
  }
  assert {f.stem for f in CONFIGS.glob('*.py')} - others == set(CHAINS)


# Knobs


@each_of_papers
def test_knobs_are_those_published(name):
  model, _, _, _, steps, knobs = PAPERS[name]
  expected = knobs | {
    'policy': f'Qwen/{model}',
    'steps': steps,
    'advantage': advantages.group_norm,
    'warm_up': None,
  }
  found = loaded(name)
  assert {knob: getattr(found, knob) for knob in expected} == expected
  evaluated = [task.name for task in found.eval_tasks]
  assert evaluated[:3] == ['aime24', 'aime25', 'amc23']
  assert evaluated[3:] == (['math500'] if knobs is FORKS else [])
  # All problems of them are asked.
  assert found.eval_prompts >= (500 if knobs is FORKS else 40)


def shape_of(name):
  return policy.SHAPES[PAPERS[name][0].removesuffix('-Base').lower()]


@each_of_papers
def test_policies_have_room_for_the_longest_sequence(name):
  assert loaded(name).sequence_tokens <= shape_of(name).max_tokens


# GB of a chip.
CHIPS = {'v5p': 95, 'v6e': 32}


@each_of_papers
def test_chips_named_have_room_by_arithmetic(name):
  """Four fifths of what they have; the rest is for temporaries."""
  shape, text = shape_of(name), ' '.join(docstring(name).split())
  hardware = re.findall(
    r'(\d+) (v5p|v6e)(?: chips| with `(:[\w=,]+)`)', text.split('runs/')[0]
  )
  assert hardware and hardware[0][1] == 'v5p'
  sizes = jax.tree.map(lambda x: x.size, policy.abstract_params(shape))
  parameters = sum(jax.tree.leaves(sizes))
  cached = shape.layers * shape.kv_heads * shape.head_size * 2  # K and V
  for chips, kind, overrides in hardware:
    found, chips = load(name, overrides), int(chips)
    room = CHIPS[kind] * 1e9 * 0.8
    # Devices that share weights to sample with.
    tensor = found.sampling_tensor or found.tensor
    shards = chips // tensor
    assert shape.kv_heads % tensor == found.slots % shards == 0
    # Master weights and two moments, cut over all chips.
    state = 12 * parameters / chips
    # In bfloat16: the sampler's weights, and keys and values of its slots.
    slots = found.slots / shards
    cache = 2 * cached * found.sequence_tokens * slots / tensor
    assert state + 2 * parameters / tensor + cache < room
    # The sum of gradients, and what each layer of a microbatch keeps.
    shards = chips // found.tensor
    rows = max(found.microbatch_tokens // found.row_tokens // shards, 1)
    width = shape.width
    if found.remat == 'attention':
      width += shape.heads * shape.head_size // found.tensor
    kept = 2 * shape.layers * width * found.row_tokens * rows
    assert state + 6 * parameters / chips + kept < room


@each_of_sums
def test_recipe_for_sums_is_the_quickstart_but_for_its_method(name):
  _, advantage, inner_steps = SUMS[name]
  found, quickstart = loaded(name), loaded('quickstart')
  assert found.advantage is getattr(advantages, advantage)
  assert found.inner_steps == inner_steps
  assert found.dynamic_sampling == (name == 'dapo')
  # About as many updates.
  assert found.steps == {1: quickstart.steps, 4: 80}[inner_steps]
  same = 'policy tasks prompts_per_step group_size temperature slots'
  for knob in same.split():
    assert getattr(found, knob) == getattr(quickstart, knob), knob
  assert found.warm_up.steps == quickstart.warm_up.steps


def test_budget_of_dr_grpo_follows_the_longest_completion():
  stats, tokens = batch()
  chain = load('dr_grpo', ':max_completion_tokens=3').filters
  found, _ = run(chain, stats, tokens)
  expected, _ = run(loaded('dr_grpo').filters, stats, tokens)
  np.testing.assert_allclose(found.logprob, expected.logprob * 4 / 3, rtol=1e-5)


# The chain


@functools.cache
def batch():
  """15,000 tokens, of which 2e-4 are three, with ratios beyond every clip."""
  rng = np.random.default_rng(0)
  rows, columns = 128, 160
  t = np.arange(columns)
  mask = (t >= 2) & (t < rng.integers(80, columns, (rows, 1)))
  old = -rng.gamma(0.7, 1.0, mask.shape)
  # Tokens move, and whole sequences do.
  moved = rng.normal(0, 0.5, mask.shape) + rng.normal(0, 0.3, (rows, 1))
  entropy = rng.gamma(1.0, 1.0, mask.shape)
  advantage = np.repeat(rng.normal(0, 1.5, (rows, 1)), columns, 1)
  old, logprob, entropy, advantage = (
    np.where(mask, x, 0).astype(np.float32)
    for x in (old, old + moved, entropy, advantage)
  )
  return TokenStats(logprob, entropy), Tokens(mask, advantage, old)


def run(chain, stats, tokens):
  key = jax.random.key(0)
  return jax.jit(functools.partial(token_gradients, chain))(
    stats, tokens, key=key
  )


@functools.partial(jax.jit, static_argnums=0)
def composed(names, numbers, stats, tokens):
  """Gradients of the chain of these filters; numbers are traced."""
  steps = zip(names, numbers, strict=True)
  chain = optax.chain(*(filters.ALL[name](**given) for name, given in steps))
  return token_gradients(chain, stats, tokens, key=jax.random.key(0))[0]


def by_table(name, change=None):
  names, numbers = zip(*CHAINS[name], strict=True)
  if change:
    place, argument, factor = change
    numbers = [dict(given) for given in numbers]
    numbers[place][argument] *= factor
  return composed(names, tuple(numbers), *batch()).logprob


@each_recipe
def test_chain_does_what_the_published_one_does(name):
  grads, state = run(loaded(name).filters, *batch())
  expected = by_table(name)
  np.testing.assert_array_equal(grads.logprob == 0, expected == 0)
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-5)
  # And says what each of its filters but the mean does.
  nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Tracked))
  reports = {key for n in nodes if isinstance(n, Tracked) for key in n.report}
  *steps, _ = CHAINS[name]
  assert {f'{step}/kept' for step, _ in steps} <= reports


@pytest.mark.parametrize('name', [n for n in CHAINS if 'clip_cov' in n])
def test_band_of_clip_cov_is_the_published_one(name):
  # All of it falls silent, not a few tokens.
  grads, _ = run(load(name, ':fraction=1.0').filters, *batch())
  names, numbers = zip(*clip_cov(1.0), strict=True)
  expected = composed(names, numbers, *batch()).logprob
  np.testing.assert_array_equal(grads.logprob == 0, expected == 0)


@pytest.mark.parametrize(
  'chain', {str(c): n for n, c in CHAINS.items()}.values()
)
def test_the_batch_tells_every_number_from_others(chain):
  expected = by_table(chain)
  for place, (step, given) in enumerate(CHAINS[chain]):
    for argument in given:
      others = [by_table(chain, (place, argument, x)) for x in (0.5, 2.0)]
      assert any((other != expected).any() for other in others), (
        step,
        argument,
      )


# The optimizer


@each_recipe
def test_optimizer_is_adam_at_a_constant_rate_after_a_clip_at_one(name):
  lr, decay = LEARNING[name]
  clip = optax.clip_by_global_norm(1.0)
  expected = optax.chain(clip, optax.adamw(lr, weight_decay=decay))
  params = {'w': np.float32([3.0, -5.0])}
  # The first gradient is clipped: later steps show it.
  gradients = [{'w': np.float32([100.0, 20.0]) / 10**i} for i in range(4)]
  paths = {}
  for kind, tx in {
    'found': loaded(name).optimizer,
    'expected': expected,
    'unclipped': optax.adamw(lr, weight_decay=decay),
  }.items():
    state, path = tx.init(params), []
    for g in gradients:
      updates, state = tx.update(g, state, params)
      path.append(updates['w'])
    paths[kind] = np.stack(path)
  np.testing.assert_allclose(paths['found'], paths['expected'], rtol=1e-6)
  assert not np.allclose(paths['found'], paths['unclipped'], rtol=1e-2)


# The tasks


@pytest.fixture
def math(tmp_path):
  """A training set of one question, twice, and evaluation sets of one each."""
  row = {
    'prompt': [{'role': 'user', 'content': 'What is 3 + 4?'}],
    'reward_model': {'ground_truth': '7'},
  }
  table = pyarrow.Table.from_pylist([row, row])
  pyarrow.parquet.write_table(table, tmp_path / 'train.parquet')
  problem = {'problem': 'What is 5 + 4?', 'answer': '9'}
  for name, example in {
    'aime24.json': row,
    'aime25.json': row,
    'amc23.jsonl': problem,
    'math500.jsonl': problem,
  }.items():
    (tmp_path / name).write_text(json.dumps(example) + '\n')
  return f":path='{tmp_path}/train.parquet',eval_path='{tmp_path}'"


def outcome(task, prompt, text, length):
  reward = task.reward(prompt, Completion(text=text, length=length))
  if isinstance(reward, float):
    return reward, reward
  return reward['reward'], reward['outcome']


@each_of_papers
def test_tasks_ask_for_a_box_and_reward_what_is_in_it(name, math):
  found = load(name, math)
  (task,) = found.tasks
  (prompt,) = task.prompts('train')
  assert prompt.text.startswith('What is 3 + 4?')
  assert prompt.text.endswith('within \\boxed{}.')
  assert outcome(task, prompt, 'So \\boxed{7}.', 100) == (1, 1)
  assert outcome(task, prompt, 'So \\boxed{8}.', 100) == (0, 0)
  assert outcome(task, prompt, 'So 7.', 100) == (0, 0)
  for task in found.eval_tasks:
    if task.name == 'math500' and not importlib.util.find_spec('math_verify'):
      continue
    (prompt,) = task.prompts('test')
    assert prompt.text.endswith('within \\boxed{}.')
    right = f'\\boxed{{{prompt.answer}}}'
    assert outcome(task, prompt, right, 20_000) == (1, 1)


@pytest.mark.parametrize('name', [n for n in PAPERS if PAPERS[n][-1] is FORKS])
@pytest.mark.parametrize(
  'limit, length, penalty',
  # Over the last 4,096 tokens: (20,480 − 4,096 − length) / 4,096.
  [
    (20_480, 16_384, 0),
    (20_480, 18_432, -0.5),
    (20_480, 20_480, -1),
    (29_696, 20_480, 0),
    (29_696, 27_648, -0.5),
  ],
)
def test_overlong_answers_are_penalised_and_stay_right(
  name, limit, length, penalty, math
):
  found = load(name, f'{math},max_completion_tokens={limit}')
  (task,) = found.tasks
  (prompt,) = task.prompts('train')
  assert found.sequence_tokens == found.row_tokens == 2048 + limit
  assert outcome(task, prompt, '\\boxed{7}', length) == (1 + penalty, 1)
  assert outcome(task, prompt, '\\boxed{8}', length) == (penalty, 0)


@pytest.mark.parametrize('name', [n for n in PAPERS if n.startswith('qwen2')])
def test_long_answers_are_not_penalised_where_the_paper_does_not(name, math):
  (task,) = load(name, math).tasks
  (prompt,) = task.prompts('train')
  assert outcome(task, prompt, '\\boxed{7}', 8192) == (1, 1)


# Building and overriding


@each_of_papers
def test_recipe_builds_without_weights_and_data(name, tmp_path, monkeypatch):
  def refuse(*arguments, **more):
    raise AssertionError('a recipe reads nothing')

  monkeypatch.setattr(policy, 'load', refuse)
  monkeypatch.chdir(tmp_path)
  data = f"path='{tmp_path}/no.parquet',eval_path='{tmp_path}/none'"
  found = load(name, f":{data},policy='{tmp_path}/model',lr=2e-6,seed=3")
  assert (found.policy, found.seed) == (f'{tmp_path}/model', 3)
  tasks = json.dumps([str(task) for task in found.tasks_scored])
  assert f'{tmp_path}/no.parquet' in tasks
  assert f'{tmp_path}/none/aime24' in tasks


@each_recipe
def test_learning_rate_and_knobs_can_be_overridden(name):
  found = load(name, ':lr=0.25,steps=7,group_size=4,inner_steps=2')
  assert (found.steps, found.group_size, found.inner_steps) == (7, 4, 2)
  params = {'w': np.float32([0.0])}
  updates, _ = found.optimizer.update(
    {'w': np.float32([0.1])}, found.optimizer.init(params), params
  )
  np.testing.assert_allclose(updates['w'], [-0.25], rtol=1e-3)


@pytest.mark.parametrize(
  'name', [name for name, chain in CHAINS.items() if 'fraction' in str(chain)]
)
def test_fraction_can_be_overridden(name):
  stats, tokens = batch()
  grads, _ = run(load(name, ':fraction=0.1').filters, stats, tokens)
  others, _ = run(loaded(name).filters, stats, tokens)
  assert (grads.logprob != others.logprob).any()


@each_recipe
def test_unknown_override_is_named_with_the_nearest(name):
  with pytest.raises(ConfigError, match="no key 'lrr'; did you mean lr"):
    load(name, ':lrr=1')
  with pytest.raises(ConfigError, match='did you mean inner_steps'):
    load(name, ':iner_steps=1')


# The prose


@each_recipe
def test_prose_has_link_and_command(name):
  text = docstring(name)
  command = (
    rf'python -m jax_rlvr\.train --config configs/{name}\.py(?: \\\n   )?'
  )
  assert re.search(rf'{command} --workdir runs/{name}$', text, re.MULTILINE)
  assert re.search(r'<https://arxiv\.org/abs/\d{4}\.\d{5}>`_, 20\d\d', text)


@each_of_papers
def test_prose_has_the_papers_scores_and_what_differs(name):
  text = docstring(name)
  for section in ('Reproduces', 'Hardware', "The paper's score", 'Differs'):
    assert re.search(rf'^{section}', text, re.MULTILINE), section
  scores = re.split(r"^The paper's score", text, flags=re.MULTILINE)[1]
  scores = ' '.join(scores.split('\n\n')[0].split())
  numbers = SCORES[name].split()
  columns = ('AIME24', 'AIME25', 'AMC(?:23)?', 'MATH500', 'average')
  for column, number in zip(columns, numbers, strict=True):
    before = r'(?:[\d.]+ → )?' if name.startswith('qwen3') else ''
    assert re.search(rf'\b{column} {before}{number}\b', scores), column


@each_recipe
def test_files_that_prose_names_are_there(name):
  for path in re.findall(r'configs/(\w+)\.py', docstring(name)):
    assert (CONFIGS / f'{path}.py').exists(), path


@each_recipe
def test_recipe_is_short(name):
  get_config = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']
  limit = 60 if name in ('qwen2_5_7b_grpo', 'qwen3_8b_forking') else 30
  assert len(inspect.getsource(get_config).splitlines()) <= limit


# Dry runs


@each_of_sums
def test_recipe_for_sums_passes_a_dry_run(name, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # where recipes come from the package
  assert train.main(['--dry_run', '--config', f'configs/{name}.py']) == 0
  shown = capsys.readouterr().out
  for words in ('107,712', 'optimizer state', "prompt '", ' tokens: '):
    assert words in shown
  assert not list(tmp_path.iterdir())


@pytest.fixture
def model(tmp_path):
  """A policy of a hundred characters, as a folder of weights."""
  tokenizer = train_characters(''.join(map(chr, range(32, 127))) + '\n')
  config = policy.PolicyConfig(
    vocab_size=tokenizer.vocab_size,
    layers=1,
    width=16,
    heads=2,
    kv_heads=1,
    head_size=8,
    feed_forward=16,
    max_tokens=32_768,
  )
  folder = tmp_path / 'model'
  policy.save(
    folder, config, policy.init(config, jax.random.key(0)), dtype='float32'
  )
  tokenizer.save(folder)
  return folder


@each_of_papers
def test_recipe_of_a_paper_passes_a_dry_run(name, math, model, capsys):
  pytest.importorskip('math_verify', reason='MATH500 is graded by math-verify')
  # For eight devices that are no TPUs.
  spec = f"{math},policy='{model}',sampling_tensor=1,slots=8"
  config = f'configs/{name}.py{spec}'
  assert train.main(['--dry_run', '--config', config]) == 0
  assert 'What is 3 + 4?' in capsys.readouterr().out
