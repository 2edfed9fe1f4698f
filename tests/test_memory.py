"""Temporaries of compiled programs, and how they grow with their shapes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
GIB = 2**30


def temporaries(what, **arguments):
  """Bytes; in a process of its own, since it needs XLA's flags."""
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  done = subprocess.run(
    [
      sys.executable, 'benchmarks/memory.py', '--json', what,
      json.dumps(arguments),
    ],
    cwd=ROOT, env=environment | {'PYTHONPATH': str(ROOT)}, check=True,
    capture_output=True, text=True,
  )  # fmt: skip
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('tied', [False, True])
def test_stats_of_a_large_vocabulary_take_little_beside_the_head(tied):
  tokens, vocabulary, width = 8192, 151_936, 512
  dense, head = tokens * vocabulary * 4, vocabulary * width * 4
  size = temporaries('stats', tokens=tokens, width=width, tied=tied)
  assert size - head < dense / 8


def test_what_a_vocabulary_takes_does_not_grow_with_tokens():
  def of_vocabulary(tokens):
    large, small = (
      temporaries('stats', tokens=tokens, vocabulary=v, width=512, tied=True)
      for v in (151_936, 1024)
    )
    return large - small

  assert of_vocabulary(16_384) <= 1.05 * of_vocabulary(8192)


@pytest.mark.parametrize('rows, limit', [(8, 2.0), (64, 2.4)])
def test_update_of_the_135m_shape_fits(rows, limit):
  assert temporaries('update', rows=rows) <= limit * GIB


def test_program_of_many_layers_is_no_longer_than_that_of_few():
  from benchmarks import memory

  def length(layers):
    config = dataclasses.replace(memory.TOY, layers=layers)
    text = memory.lower_update(config, row_tokens=64).as_text()
    return text.count('\n')

  assert length(64) == length(8)
