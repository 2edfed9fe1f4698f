"""What stands beside a tokenizer's own file in a Hugging Face folder."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jax_rlvr.tokenizer import HuggingFace, SentencePiece


def settings(
  tokenizer: SentencePiece | HuggingFace, config: Mapping[str, Any]
) -> dict[str, bytes]:
  """The files of what `fields` reads, and of some configuration more."""
  config = {
    **config,
    'bos_token': tokenizer.bos_token or None,
    'eos_token': tokenizer.eos_token,
    'end_tokens': tokenizer.end_tokens,
  }
  text = json.dumps(config, indent=2) + '\n'
  files = {'tokenizer_config.json': text.encode()}
  if tokenizer.chat_template is not None:
    files['chat_template.jinja'] = tokenizer.chat_template.encode()
  return files


def fields(
  folder: pathlib.Path, config: Mapping[str, Any], ends: tuple[str, ...]
) -> dict[str, Any]:
  """The fields that both kinds of tokenizers have.

  Args:
    folder: of a model.
    config: its tokenizer_config.json.
    ends: end tokens.
  """
  chat_template = config.get('chat_template')
  if isinstance(chat_template, list):
    # Older files may hold several, by name.
    named = {entry['name']: entry['template'] for entry in chat_template}
    chat_template = named.get('default')
  if (folder / 'chat_template.jinja').exists():
    chat_template = (folder / 'chat_template.jinja').read_bytes().decode()
  return {
    'end_tokens': ends,
    'chat_template': chat_template,
    'bos_token': _content(config.get('bos_token')) or '',
    'eos_token': _content(config.get('eos_token')) or '',
  }


def end_tokens(
  folder: pathlib.Path, config: Mapping[str, Any], special: Mapping[int, str]
) -> tuple[str, ...]:
  """The end tokens that a folder names, by the rule of `tokenizer.load`.

  Args:
    folder: of a model.
    config: its tokenizer_config.json.
    special: special tokens by their ids.

  Raises:
    ValueError: an id is that of no special token.
  """
  if 'end_tokens' in config:
    # These `settings` wrote.
    return tuple(config['end_tokens'])

  def named_by(file):
    ids = read_json(folder / file).get('eos_token_id')
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for i in ids:
      if i not in special:
        raise ValueError(
          f'eos_token_id {i} of {folder / file} is no special token of the '
          'tokenizer beside it; correct it'
        )
    return [special[i] for i in ids]

  eos = _content(config.get('eos_token'))
  ends = named_by('generation_config.json')
  ends = ends or ([eos] if eos else named_by('config.json'))
  return tuple(dict.fromkeys(sorted(ends, key=lambda token: token != eos)))


def special_tokens(config: Mapping[str, Any]) -> set[str]:
  """Special tokens that a tokenizer_config.json lists."""
  more = config.get('extra_special_tokens') or []
  added = config.get('added_tokens_decoder') or {}
  listed = [
    *(config.get('additional_special_tokens') or []),
    *(more.values() if isinstance(more, dict) else more),
    *(token for token in added.values() if token.get('special')),
  ]
  return {_content(token) for token in listed}


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """What a file holds; nothing where there is none."""
  return json.loads(file.read_bytes()) if file.exists() else {}


def write(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
  """Writes files into a folder, made if it is not there."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (folder / name).write_bytes(content)


def _content(token):
  """Hugging Face writes a token as its text or as an object with flags."""
  return token['content'] if isinstance(token, dict) else token
