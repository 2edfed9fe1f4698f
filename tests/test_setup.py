"""What a run stands on, and what is refused before anything compiles."""

import io
import re

import jax
import numpy as np
import pytest
import rich.console

from jax_rlvr import mesh as layouts
from jax_rlvr import policy, setup
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import ConfigError
from tests.test_config import small

CONFIG = small()
RECIPE = """
from tests.test_config import small

def get_config(**changes):
  return small(policy={folder!r}, prompts_per_step=8, **changes)
"""


@pytest.fixture
def folder(tmp_path):
  """The small policy with weights of its own, and its tokenizer."""
  params = policy.init(CONFIG.policy, jax.random.key(5))
  policy.save(tmp_path / 'model', CONFIG.policy, params, dtype='float32')
  CONFIG.tokenizer.save(tmp_path / 'model')
  return tmp_path / 'model'


def prepared(folder, overrides=''):
  recipe = folder.parent / 'recipe.py'
  recipe.write_text(RECIPE.format(folder=str(folder)))
  console = rich.console.Console(file=io.StringIO())
  return setup.prepare(f'{recipe}{overrides}', console)


def test_run_starts_from_the_weights_of_a_folder(folder):
  ready = prepared(folder, ':tokenizer=None')
  assert ready.actor.policy == CONFIG.policy
  assert ready.actor.tokenizer == CONFIG.tokenizer
  with Checkpoints(folder.parent / 'checkpoints') as checkpoints:
    state = setup.start(ready, folder.parent, checkpoints)
  expected = policy.init(CONFIG.policy, jax.random.key(5))
  jax.tree.map(np.testing.assert_array_equal, state.params, expected)
  layout = layouts.shardings(ready.mesh, expected, layouts.TRAINING)
  assert jax.tree.map(lambda x: x.sharding, state.params) == layout


def test_mesh_to_sample_on_may_have_another_shape(folder):
  ready = prepared(folder)
  assert ready.actor.mesh == ready.mesh
  ready = prepared(folder, ':tensor=1,sampling_tensor=2')
  assert ready.mesh.shape == {'slice': 1, 'fsdp': 8, 'tensor': 1}
  assert ready.actor.mesh.shape == {'slice': 1, 'fsdp': 4, 'tensor': 2}


def test_folder_without_a_tokenizer_is_refused(folder):
  (folder / 'sentencepiece.model').unlink()
  words = re.escape(f'{folder} brings no tokenizer; put tokenizer.json')
  with pytest.raises(ConfigError, match=words):
    prepared(folder, ':tokenizer=None')
  # Unless the recipe gives one.
  assert prepared(folder).actor.tokenizer == CONFIG.tokenizer


def test_broken_weights_are_refused_before_anything_compiles(folder):
  file = folder / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-4])
  with pytest.raises(ValueError, match='is not whole'):
    prepared(folder)


CHAIN_RECIPE = """
import dataclasses
import optax
from jax_rlvr.config import load
from jax_rlvr.filters import *
from jax_rlvr import filters

def get_config():
  config = load('configs/quickstart.py').config
  return dataclasses.replace(config, filters={chain})
"""


@pytest.mark.parametrize(
  ('chain', 'words'),
  [
    (
      'optax.chain(filters.kl_penalty(), filters.token_mean())',
      'kl_penalty reads tokens.ref_logprob.*; give reference=True',
    ),
    (
      'optax.chain(filters.forking_tokens(), '
      'filters.sequence_mean_token_mean())',
      'end the chain with it or give rescale=False',
    ),
    (
      'optax.chain(filters.per_microbatch(filters.clip_cov(), 7), '
      'filters.token_mean())',
      'rows=7 does not divide the 512 sequences',
    ),
    ('filters.tis(scope="row")', "choose 'token' or 'sequence'"),
  ],
)
def test_bad_chain_is_refused(tmp_path, chain, words):
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(CHAIN_RECIPE.format(chain=chain))
  with pytest.raises(ValueError, match=words):
    setup.prepare(str(recipe), rich.console.Console())


def test_every_ready_method_of_the_rollouts_own_evidence_is_accepted(tmp_path):
  for name in ('gspo', 'clip_cov', 'beyond_80_20'):
    recipe = tmp_path / f'{name}.py'
    chain = f'filters.recipes.{name}().filters'
    recipe.write_text(
      'import jax_rlvr.filters.recipes\n' + CHAIN_RECIPE.format(chain=chain)
    )
    setup.prepare(str(recipe), rich.console.Console())


def test_chain_with_a_reference_is_accepted_where_one_is_kept(tmp_path):
  chain = 'optax.chain(filters.kl_penalty(), filters.token_mean())'
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(CHAIN_RECIPE.format(chain=f'{chain}, reference=True'))
  setup.prepare(str(recipe), rich.console.Console())


def test_reference_is_the_first_policy_until_it_is_reset(folder):
  ready = prepared(folder, ':reference=True')
  with Checkpoints(folder.parent / 'checkpoints') as checkpoints:
    state = setup.start(ready, folder.parent, checkpoints)
    first = jax.device_get(state.reference)
    jax.tree.map(np.testing.assert_array_equal, first, state.params)
    moved = jax.tree.map(lambda x: x + 1, state.params)
    state = state._replace(params=moved, step=np.int32(7))
    checkpoints.save(state)
    resumed = setup.start(ready, folder.parent, checkpoints)
    jax.tree.map(np.testing.assert_array_equal, resumed.reference, first)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, moved)
    setup.reset_reference(ready, folder.parent, state)
    resumed = setup.start(ready, folder.parent, checkpoints)
    jax.tree.map(np.testing.assert_array_equal, resumed.reference, moved)


def test_long_prompts_are_dropped_and_listed(tmp_path):
  # 'a+b=' of up to two digits is 4 to 6 characters.
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(
    CHAIN_RECIPE.format(
      chain='config.filters, max_prompt_tokens=5, long_prompts="drop"'
    )
  )
  printed = io.StringIO()
  ready = setup.prepare(str(recipe), rich.console.Console(file=printed))
  ((dropped,), (kept,)) = ready.dropped, ready.prompts
  assert dropped and len(dropped) + len(kept) == 9500
  assert {tokens for _, tokens in dropped} == {6}
  setup.record(ready, tmp_path / 'run')
  rows = (tmp_path / 'run' / 'dropped.jsonl').read_text().splitlines()
  assert len(rows) == len(dropped)
  assert f'{len(rows)} prompts of more than 5 tokens' in printed.getvalue()


def test_memory_of_a_run_adds_up(folder):
  ready = prepared(folder)
  table = setup.memory(ready)
  rows = dict(zip(*(column.cells for column in table.columns), strict=True))
  assert {'weights', 'optimizer state', 'there is'} <= rows.keys()
  assert all(float(value) >= 0 for value in rows.values())
  assert repr(ready.stream[0].id) in setup.first_prompt(ready)
