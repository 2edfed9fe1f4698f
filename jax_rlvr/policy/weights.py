"""Policies in files: a folder as transformers writes it, or a GGUF file.

What is wrong with a file is said when it is loaded, from its headers; weights
are read later, straight to their devices.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jax_rlvr import tokenizer as tokenizers
from jax_rlvr.policy import gguf, hugging_face, stored
from jax_rlvr.policy.architectures import tensor_names
from jax_rlvr.policy.config import PolicyConfig
from jax_rlvr.policy.decoder import Params
from jax_rlvr.policy.stored import Pretrained

_AGAIN = 'download it again'
_NUMBERS = ('BF16', 'F16', 'F32')

# Of a multimodal model only the language model is read.
_LANGUAGE = re.compile(r'^(model\.language_model\.|language_model\.model\.)')
# Other parts of it, and what old releases wrote beside the weights.
_LEFT_OUT = re.compile(
  r'^(model\.)?(vision_tower|multi_modal_projector)\.|rotary_emb\.inv_freq$'
)


def load(path: str | os.PathLike[str]) -> Pretrained:
  """Shape and tokenizer of a policy, and the way to its weights.

  Args:
    path: a GGUF file; a folder with config.json and safetensors, sharded or
      not; or the id of one on the Hugging Face hub, `organization/name`.

  Raises:
    FileNotFoundError, ValueError, ImportError: one line that names file and
      remedy.
  """
  name = os.fspath(path)
  path = pathlib.Path(path)
  if path.suffix == '.gguf' and path.is_file():
    return gguf.load(path)
  if path.is_dir():
    return _read_folder(path)
  if path.exists():
    raise ValueError(
      f'{path} is neither a GGUF file nor a folder, the forms read here'
    )
  if re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', name) and path.suffix != '.gguf':
    folder = _download(name, ['*.json', '*.jinja', '*.model'])
    # Refused, if it is, before gigabytes travel.
    _config(folder)
    return _read_folder(_download(name, ['model*.safetensors']))
  raise FileNotFoundError(
    f'no model file {path}; give the path of a GGUF file or a model folder'
  )


def _download(name: str, patterns: list[str]) -> pathlib.Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ImportError(
      f'no folder {name} here, and the hub needs the package huggingface_hub; '
      'pip install huggingface_hub, or give the path of a folder'
    ) from error
  try:
    folder = huggingface_hub.snapshot_download(name, allow_patterns=patterns)
  except Exception as error:  # Its client raises many kinds.
    reason = str(error).strip().split('\n')[0][:200]
    raise FileNotFoundError(
      f'no folder {name} here, and the hub does not give it ({reason}); check '
      'name and network, or give the path of a folder'
    ) from error
  return pathlib.Path(folder)


def _read_folder(folder: pathlib.Path) -> Pretrained:
  config = _config(folder)
  held = _headers(folder)
  if config.tied_embeddings:
    # Some write the embedding twice.
    held.pop('lm_head.weight', None)
  names = tensor_names(config)
  stored.check(
    stored.tensors(config, names),
    {name: (tensor.file, tensor.shape) for name, tensor in held.items()},
    folder,
    _AGAIN,
  )

  def fetch(name, index):
    tensor = held[name]
    # Opened anew each time: what a map of a file has read is not let go of
    # before it is closed.
    with _opened(tensor.file) as file:
      return file.get_slice(tensor.name)[index]

  def read(shardings):
    return stored.stream(config, names, shardings, fetch)

  return Pretrained(config, _tokenizer(folder), read)


def _config(folder: pathlib.Path) -> PolicyConfig:
  file = folder / 'config.json'
  return hugging_face.read_config(file, _json(file))


def _json(file: pathlib.Path) -> Mapping[str, Any]:
  if not file.exists():
    raise FileNotFoundError(f'no {file}; give a whole model folder')
  try:
    content = json.loads(file.read_bytes())
  except ValueError as error:
    raise ValueError(f'{file} is not JSON ({error}); {_AGAIN}') from None
  if not isinstance(content, dict):
    raise ValueError(f'{file} is not a JSON object; {_AGAIN}')
  return content


def _tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer | None:
  try:
    return tokenizers.load(folder)
  except FileNotFoundError:
    return None


class _Held(NamedTuple):
  """A tensor of a folder, by its header."""

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]


def _headers(folder: pathlib.Path) -> dict[str, _Held]:
  """Every tensor that matters, by its name in a plain language model."""
  index = folder / 'model.safetensors.index.json'
  if index.exists():
    files = _json(index).get('weight_map')
    if not isinstance(files, dict):
      raise ValueError(f'{index} has no weight_map; {_AGAIN}')
    for name, file in files.items():
      if not (folder / file).exists():
        raise FileNotFoundError(
          f'no {folder / file}, which should hold {name}; {_AGAIN}'
        )
  elif not (folder / 'model.safetensors').exists():
    raise FileNotFoundError(
      f'no model.safetensors in {folder}; give a folder with weights in '
      'safetensors'
    )
  else:
    files = {'': 'model.safetensors'}
  found = {}
  for file in sorted({folder / file for file in files.values()}):
    with _opened(file) as reader:
      for name in reader.keys():
        if _LEFT_OUT.search(name):
          continue
        tensor = reader.get_slice(name)
        if tensor.get_dtype() not in _NUMBERS:
          raise ValueError(
            f'{file}: {name} is of {tensor.get_dtype()} numbers, not '
            f'{", ".join(_NUMBERS)}; use the model before it was quantized'
          )
        plain = _LANGUAGE.sub('model.', name)
        plain = plain.removeprefix('language_model.')
        found[plain] = _Held(file, name, tuple(tensor.get_shape()))
  return found


def _opened(file: pathlib.Path):
  try:
    return safetensors.safe_open(file, framework='numpy')
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f'{file} is not whole: {_lost(file)} ({error}); {_AGAIN}'
    ) from None


def _lost(file: pathlib.Path) -> str:
  """The first tensor that a file has lost, by the header if it has one."""
  size = file.stat().st_size
  try:
    with file.open('rb') as stream:
      length = int.from_bytes(stream.read(8), 'little')
      header = json.loads(stream.read(min(length, size)))
    header.pop('__metadata__', None)
    ends = [(8 + length + x['data_offsets'][1], n) for n, x in header.items()]
    return f'{min(end for end in ends if end[0] > size)[1]} is cut off'
  except (ValueError, KeyError, TypeError):
    return 'its header is broken'


def save(
  folder: str | os.PathLike[str],
  config: PolicyConfig,
  params: Params,
  *,
  dtype: str = 'bfloat16',
  end_ids: Sequence[int] = (),
  file_bytes: int = 5 * 10**9,
) -> None:
  """Writes what `load` reads, and transformers too, but for the tokenizer.

  Args:
    folder: made if it is not there.
    config: of the policy.
    params: of the policy.
    dtype: number type of the files, 'bfloat16', 'float16' or 'float32'.
    end_ids: tokens that end a completion.
    file_bytes: weights are cut into files of at most this size, if a tensor
      is no bigger.

  Raises:
    ValueError: no architecture of transformers computes what this policy does.
  """
  folder = pathlib.Path(folder)
  content = hugging_face.write_config(config) | {'torch_dtype': dtype}
  ends = {'eos_token_id': list(map(int, end_ids))} if end_ids else {}
  folder.mkdir(parents=True, exist_ok=True)
  size = jnp.dtype(dtype).itemsize
  files, room = [], 0
  for tensor in stored.tensors(config, tensor_names(config)):
    room -= math.prod(tensor.shape) * size
    if room < 0 or not files:
      files.append([])
      room = file_bytes - math.prod(tensor.shape) * size
    files[-1].append(tensor)
  weight_map, total = {}, 0
  for number, held in enumerate(files, 1):
    name = f'model-{number:05}-of-{len(files):05}.safetensors'
    if len(files) == 1:
      name = 'model.safetensors'
    arrays = {tensor.name: _in_file(params, tensor, dtype) for tensor in held}
    safetensors.numpy.save_file(arrays, folder / name, {'format': 'pt'})
    weight_map |= dict.fromkeys(arrays, name)
    total += sum(array.nbytes for array in arrays.values())
  if len(files) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    _write_json(folder / 'model.safetensors.index.json', index)
  _write_json(folder / 'generation_config.json', ends)
  # Last: without it the folder is no model.
  _write_json(folder / 'config.json', content | ends)


def _in_file(params: Params, tensor: stored.Tensor, dtype: str) -> np.ndarray:
  array = params if tensor.layer is None else params['blocks']
  array = array[tensor.leaf]
  if tensor.layer is not None:
    array = array[tensor.layer]
  array = stored.to_file(tensor.leaf, np.asarray(array.astype(dtype)))
  return np.ascontiguousarray(array)


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(content, indent=2) + '\n')
