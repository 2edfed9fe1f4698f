"""What a run stands on, and what is refused before anything compiles."""

import pytest
from rich.console import Console

from jax_rlvr.setup import prepare

RECIPE = """
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
      'kl_penalty reads tokens.ref_logprob',
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
def test_bad_chain_is_refused_and_leaves_nothing(tmp_path, chain, words):
  recipe, workdir = tmp_path / 'recipe.py', tmp_path / 'run'
  recipe.write_text(RECIPE.format(chain=chain))
  with pytest.raises(ValueError, match=words):
    prepare(str(recipe), workdir, Console())
  assert not workdir.exists()


def test_every_ready_method_of_the_rollouts_own_evidence_is_accepted(tmp_path):
  for name in ('gspo', 'clip_cov', 'beyond_80_20'):
    recipe = tmp_path / f'{name}.py'
    chain = f'filters.recipes.{name}().filters'
    recipe.write_text(
      'import jax_rlvr.filters.recipes\n' + RECIPE.format(chain=chain)
    )
    prepare(str(recipe), tmp_path / name, Console())
