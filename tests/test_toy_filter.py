"""A filter joins by its own file and one line in the menu."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent

TOY = """
import jax

from jax_rlvr.filters.base import Filter, stateless


def toy(factor=0.5) -> Filter:
  def body(grads, stats, tokens, key):
    return jax.tree.map(lambda g: factor * g, grads)

  return stateless(body)
"""

MENU_LINE = 'from jax_rlvr.filters.toy import toy as toy\n'

# Sampling and evaluation have one shape, to compile once. All completions are
# worth the same, so that there is a gradient.
RECIPE = """
import dataclasses
import numpy as np
import optax
from jax_rlvr import config, filters
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.tasks import Addition

def get_config(factor=0.5):
  base = config.load('configs/quickstart.py').config
  shape = PolicyConfig(
    vocab_size=base.tokenizer.vocab_size, layers=1, width=8, heads=1,
    kv_heads=1, head_size=8, feed_forward=8, max_tokens=32,
  )
  return dataclasses.replace(
    base,
    policy=shape,
    tasks=(Addition(digits=1, held_out=8),),
    advantage=lambda rewards, valid, lengths: np.float32(valid),
    filters=optax.chain(
      filters.tracked('toy', filters.ALL['toy'](factor)), filters.token_mean(),
    ),
    optimizer=optax.sgd(1e-3),
    warm_up=None, steps=1, prompts_per_step=8, group_size=8, slots=64,
    max_prompt_tokens=16, eval_prompts=8, eval_samples=8,
  )
"""


def test_toy_filter_takes_one_file_and_one_line(tmp_path):
  for folder in ('jax_rlvr', 'configs'):
    shutil.copytree(
      ROOT / folder,
      tmp_path / folder,
      ignore=shutil.ignore_patterns('__pycache__'),
    )
  (tmp_path / 'jax_rlvr' / 'filters' / 'toy.py').write_text(TOY)
  menu = tmp_path / 'jax_rlvr' / 'filters' / '__init__.py'
  lines = menu.read_text().splitlines(keepends=True)
  last = max(i for i, x in enumerate(lines) if x.startswith('from jax_rlvr'))
  menu.write_text(''.join([*lines[:last], MENU_LINE, *lines[last:]]))
  (tmp_path / 'recipe.py').write_text(RECIPE)

  done = subprocess.run(
    [sys.executable, '-m', 'jax_rlvr.train',
     '--config', 'recipe.py:factor=0.25', '--workdir', 'run'],
    cwd=tmp_path,
    env=os.environ | {
      'XLA_FLAGS': '',
      'PYTHONPATH': str(tmp_path),
      'JAX_COMPILATION_CACHE_DIR': os.path.join(
        tempfile.gettempdir(), 'jax_rlvr_test_cache'
      ),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    },
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  (row,) = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  measured = json.loads(row)
  assert measured['filters/toy/kept'] == 1.0
  assert measured['filters/toy/mass'] == 0.25
