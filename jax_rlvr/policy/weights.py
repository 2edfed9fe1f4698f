"""Pretrained policies from files."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from jax_rlvr.policy import gguf
from jax_rlvr.policy.config import PolicyConfig
from jax_rlvr.tokenizer import Tokenizer


def load(
  path: str | os.PathLike[str],
) -> tuple[PolicyConfig, dict[str, Any], Tokenizer]:
  """Shape, float32 host weights and tokenizer of a GGUF file.

  Raises:
    FileNotFoundError, ValueError: one line that names file and remedy.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f'no model file {path}; give the path of a GGUF file'
    )
  if path.suffix != '.gguf':
    raise ValueError(f'{path} is not a GGUF file, the format read so far')
  return gguf.load(path)
