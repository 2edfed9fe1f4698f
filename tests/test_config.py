"""Recipes, overrides and what is refused before anything compiles."""

import pathlib

import optax
import pytest

from jax_rlvr import config
from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config, ConfigError
from jax_rlvr.filters import token_mean
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.tasks import Addition
from jax_rlvr.tokenizer import train_characters

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def small(**changes) -> Config:
  tokenizer = train_characters('0123456789+=')
  settings = dict(
    policy=PolicyConfig(
      vocab_size=tokenizer.vocab_size,
      layers=1,
      width=16,
      heads=2,
      kv_heads=1,
      head_size=8,
      feed_forward=16,
    ),
    tokenizer=tokenizer,
    tasks=(Addition(digits=1, held_out=10),),
    advantage=group_norm,
    filters=token_mean(),
    optimizer=optax.sgd(1.0),
    steps=1,
    prompts_per_step=4,
    max_prompt_tokens=4,
    max_completion_tokens=3,
  )
  return Config(**settings | changes)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'temperature': 0}, 'temperature=0 must be above 0'),
    ({'group_size': 0}, 'group_size=0 must be 1 or more'),
    ({'steps': -1}, 'steps=-1 must be 0 or more'),
    ({'slots': 1.5}, 'slots=1.5 must be an integer'),
    ({'inner_steps': 3}, 'divisor of prompts_per_step=4'),
    ({'microbatch_tokens': 6}, 'at least one row of 7 tokens'),
    ({'row_tokens': 6}, 'at least 7 tokens'),
    ({'tasks': ()}, 'at least one task'),
    ({'reward_deadline_s': 0}, 'reward_deadline_s=0 must be above 0'),
    ({'temperature': 'hot'}, "temperature='hot' must be a number"),
    ({'remat': True}, "remat=True must be 'none', 'dots', 'attention' or "),
    ({'compute_dtype': 'half'}, "compute_dtype='half' must be 'auto'"),
    ({'token_extras': 'p2'}, "token_extras='p2' must be some of 'p2', "),
    ({'token_extras': ('p3',)}, "must be some of 'p2', 'p2_logp', 'logit'"),
  ],
)
def test_value_out_of_range_is_named(changes, words):
  with pytest.raises(ConfigError, match=words):
    small(**changes)


def test_row_defaults_to_one_sequence():
  assert small().row_tokens == small().sequence_tokens == 7


def write(folder, text):
  file = folder / 'recipe.py'
  file.write_text(text)
  return file


RECIPE = """
from tests.test_config import small
def get_config(lr=1.0, mode='x', **overrides):
  return small(**overrides)
"""


def test_overrides_ride_on_the_path(tmp_path):
  file = write(tmp_path, RECIPE)
  recipe = config.load(f'{file}:lr=5e-7,seed=3,mode=abs,temperature=0.5')
  assert recipe.overrides == {
    'lr': 5e-7,
    'seed': 3,
    'mode': 'abs',
    'temperature': 0.5,
  }
  assert (recipe.config.seed, recipe.config.temperature) == (3, 0.5)
  assert recipe.source == RECIPE


@pytest.mark.parametrize(
  'given, words',
  [
    ('lrr=1', "no key 'lrr'; did you mean lr"),
    ('grup_size=1', 'did you mean group_size'),
    ('lr=', 'not key=value'),
    ('lr=__import__("os")', 'not key=value'),
    ('seed=1.5', 'seed=1.5 must be an integer'),
  ],
)
def test_bad_override_is_named(tmp_path, given, words):
  file = write(tmp_path, RECIPE)
  with pytest.raises(ConfigError, match=words):
    config.load(f'{file}:{given}')


def test_key_unknown_to_a_closed_recipe_is_named(tmp_path):
  file = write(tmp_path, 'def get_config(lr=1.0): pass\n')
  with pytest.raises(ConfigError, match="no key 'group_size'; known: lr"):
    config.load(f'{file}:group_size=4')


def test_unknown_recipe_is_named_with_the_nearest():
  with pytest.raises(ConfigError, match='did you mean configs/quickstart.py'):
    config.load('configs/quikstart.py')


def test_recipe_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config.load('configs/quickstart.py').name == 'quickstart.py'


@pytest.mark.parametrize(
  'file', sorted(CONFIGS.glob('*.py')), ids=lambda f: f.stem
)
def test_every_recipe_builds(file):
  try:
    recipe = config.load(str(file))
  except FileNotFoundError as error:
    pytest.skip(str(error))
  assert recipe.config.steps > 0
  assert f'configs/{file.name}' in recipe.source, (
    'its docstring has the command'
  )
