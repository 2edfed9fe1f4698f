"""Text ↔ token ids: SentencePiece and Hugging Face behind one protocol.

Nothing in a text becomes a special token: a prompt that spells `<|im_end|>`
is encoded as the ten characters it is. Only chat templates place them.

Tokenizers are values: equal when their files are. This module does not import
jax.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jinja2
import sentencepiece
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, str]]


@runtime_checkable
class Tokenizer(Protocol):
  """What the trainer asks of a tokenizer."""

  @property
  def vocab_size(self) -> int:
    """V: ids are 0 … V - 1."""
    ...

  @property
  def end_ids(self) -> tuple[int, ...]:
    """Ids that end a completion; the first closes traces to imitate."""
    ...

  def encode(self, text: str) -> list[int]:
    """The ids of a text, no special ones among them."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids, special ones left out."""
    ...

  def render(self, messages: Messages) -> list[int]:
    """The ids of a conversation, ready for the assistant's completion."""
    ...

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes what `load` reads."""
    ...


@dataclasses.dataclass(frozen=True)
class SentencePiece:
  """A SentencePiece model; a completion ends with its </s>.

  Conversations are their joined contents: there is no chat template.

  Attributes:
    model: the model file's bytes.
  """

  model: bytes = dataclasses.field(repr=False)

  def __post_init__(self):
    if self._processor.eos_id() < 0:
      raise ValueError(
        'the SentencePiece model has no end token; train it with eos_id >= 0'
      )

  @functools.cached_property
  def _processor(self) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=self.model)

  @property
  def vocab_size(self) -> int:
    return self._processor.vocab_size()

  @property
  def end_ids(self) -> tuple[int, ...]:
    return (self._processor.eos_id(),)

  def encode(self, text: str) -> list[int]:
    """The ids of a text.

    Raises:
      ValueError: the text has a character that the model does not know. The
        unknown token would hide from the policy what it is asked.
    """
    ids = self._processor.encode(text)
    if self._processor.unk_id() in ids:
      unknown = next(c for c in text if self._unknown(c))
      raise ValueError(
        f'{unknown!r} in {text[:40]!r} is unknown to the tokenizer; '
        'train it on texts that have this character'
      )
    return ids

  def _unknown(self, character: str) -> bool:
    return self._processor.unk_id() in self._processor.encode(character)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; the unknown token shows as ⁇, or rewards miss it."""
    return self._processor.decode([int(i) for i in ids])

  def render(self, messages: Messages) -> list[int]:
    return self.encode(_joined(messages))

  def save(self, folder: str | os.PathLike[str]) -> None:
    _write(folder, {'sentencepiece.model': self.model})


def train_characters(texts: Iterable[str]) -> SentencePiece:
  """A SentencePiece model of the characters in `texts`, one token each.

  Ids: 0 unknown, 1 the end token, then the characters. The same characters
  give the same model, in whatever order they come.

  Args:
    texts: examples, or the alphabet itself.

  Raises:
    ValueError: no characters, or one that SentencePiece cannot tell from
      another, such as U+2581, its own sign for a space.

  Example:
    >>> tokenizer = train_characters('0123456789+=')
    >>> tokenizer.vocab_size
    14
    >>> tokenizer.decode(tokenizer.encode('12+30='))
    '12+30='
  """
  alphabet = ''.join(sorted({c for text in texts for c in text}))
  if not alphabet:
    raise ValueError('no characters to train a tokenizer on; give some text')
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    # One sentence: a newline at the end of a sentence would be dropped, and
    # sorted it is not at the end.
    sentence_iterator=iter([alphabet]),
    max_sentence_length=1 << 30,  # The most it allows; longer are skipped.
    model_writer=model,
    model_type='char',
    vocab_size=len(alphabet) + 2,
    character_coverage=1.0,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    unk_id=0,
    eos_id=1,
    bos_id=-1,
    pad_id=-1,
    minloglevel=2,
  )
  tokenizer = SentencePiece(model.getvalue())
  processor = tokenizer._processor
  for character in alphabet:
    if processor.decode(processor.encode(character)) != character:
      raise ValueError(
        f'SentencePiece cannot keep {character!r}; leave it out of the texts'
      )
  return tokenizer


# Breaks up special tokens in a text on its way to the library, which looks
# for special tokens first and normalizes later: the normalizer removes it.
# A Unicode noncharacter, which no text has.
_BREAK = '\ufdd0'


@dataclasses.dataclass(frozen=True)
class HuggingFace:
  """A tokenizer.json with, perhaps, a chat template.

  Templates run as in transformers 5, without its `generation` tag: `messages`,
  `bos_token`, `eos_token` (the first end token) and `add_generation_prompt`,
  which is true. Special tokens in the contents of messages stay text; roles
  are taken as they are.

  Attributes:
    tokenizer_json: the file's text.
    end_tokens: tokens that end a completion; the first closes traces.
    chat_template: Jinja; None joins the contents.
    bos_token: for the chat template.
  """

  tokenizer_json: str = dataclasses.field(repr=False)
  end_tokens: tuple[str, ...]
  chat_template: str | None = dataclasses.field(default=None, repr=False)
  bos_token: str = ''

  def __post_init__(self):
    if not self.end_tokens or set(self.end_tokens) - set(self._special):
      raise ValueError(
        f'end_tokens={self.end_tokens!r} must be one or more of the special '
        'tokens that tokenizer.json adds; name those that end a completion'
      )

  @functools.cached_property
  def _tokenizer(self) -> tokenizers.Tokenizer:
    spec = json.loads(self.tokenizer_json)
    unbreak = {
      'type': 'Replace',
      'pattern': {'String': _BREAK},
      'content': '',
    }
    stages = [unbreak, spec['normalizer']] if spec['normalizer'] else [unbreak]
    spec['normalizer'] = {'type': 'Sequence', 'normalizers': stages}
    for token in spec['added_tokens']:
      # Else it would be looked for again after normalizing.
      token['normalized'] = token['normalized'] and not token['special']
    spec['truncation'] = spec['padding'] = None
    return tokenizers.Tokenizer.from_str(json.dumps(spec))

  @functools.cached_property
  def _special(self) -> dict[str, int]:
    added = self._tokenizer.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}

  @functools.cached_property
  def _template(self) -> jinja2.Template | None:
    if self.chat_template is None:
      return None
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'],
    )
    environment.filters['tojson'] = _tojson
    functions = {
      'raise_exception': _raise_exception,
      'strftime_now': _strftime_now,
    }
    return environment.from_string(self.chat_template, globals=functions)

  @property
  def vocab_size(self) -> int:
    return self._tokenizer.get_vocab_size()

  @property
  def end_ids(self) -> tuple[int, ...]:
    return tuple(self._special[token] for token in self.end_tokens)

  def encode(self, text: str) -> list[int]:
    return self._ids(self._plain(text))

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids])

  def render(self, messages: Messages) -> list[int]:
    if self._template is None:
      return self.encode(_joined(messages))
    plain = [{**m, 'content': self._plain(m['content'])} for m in messages]
    text = self._template.render(
      messages=plain,
      # None, not undefined: templates ask `if tools is not none`.
      tools=None,
      documents=None,
      add_generation_prompt=True,
      bos_token=self.bos_token,
      eos_token=self.end_tokens[0],
    )
    return self._ids(text)

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that transformers, too, loads."""
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'bos_token': self.bos_token or None,
      'eos_token': self.end_tokens[0],
      'end_tokens': self.end_tokens,
    }
    files = {
      'tokenizer.json': self.tokenizer_json,
      'tokenizer_config.json': json.dumps(config, indent=2) + '\n',
    }
    if self.chat_template is not None:
      files['chat_template.jinja'] = self.chat_template
    _write(folder, {name: text.encode() for name, text in files.items()})

  def _ids(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def _plain(self, text: str) -> str:
    """The text with every special token in it broken up."""
    return self._break.sub(rf'\1{_BREAK}', text)

  @functools.cached_property
  def _break(self) -> re.Pattern[str]:
    # A look-ahead, since special tokens in a text may overlap.
    special = '|'.join(re.escape(token) for token in self._special)
    return re.compile(f'(?={special})(.)', re.DOTALL)


def load(folder: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer that `save` wrote, or that of a Hugging Face model folder.

  Raises:
    FileNotFoundError: the folder holds no tokenizer.
    ValueError: tokenizer_config.json names no end token.
  """
  folder = pathlib.Path(folder)
  model = folder / 'sentencepiece.model'
  if model.exists():
    return SentencePiece(model.read_bytes())
  tokenizer_json = folder / 'tokenizer.json'
  tokenizer_config = folder / 'tokenizer_config.json'
  if not (tokenizer_json.exists() and tokenizer_config.exists()):
    raise FileNotFoundError(
      f'no tokenizer in {folder}; it needs {model.name}, or '
      f'{tokenizer_json.name} and {tokenizer_config.name}'
    )
  config = json.loads(tokenizer_config.read_bytes())
  end_tokens = config.get('end_tokens') or [_content(config.get('eos_token'))]
  if not end_tokens[0]:
    raise ValueError(f'{tokenizer_config} has no end token; set "eos_token"')
  chat_template = config.get('chat_template')
  if (folder / 'chat_template.jinja').exists():
    chat_template = (folder / 'chat_template.jinja').read_bytes().decode()
  return HuggingFace(
    tokenizer_json.read_bytes().decode(),
    end_tokens=tuple(end_tokens),
    chat_template=chat_template,
    bos_token=_content(config.get('bos_token')) or '',
  )


def _content(token):
  """Hugging Face writes a token as its text or as an object with flags."""
  return token['content'] if isinstance(token, dict) else token


def _joined(messages: Messages) -> str:
  return ''.join(message['content'] for message in messages)


def _write(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (folder / name).write_bytes(content)


def _tojson(value, **options):
  """Jinja's own escapes HTML and non-ASCII, which no model was trained on."""
  options: dict = {'ensure_ascii': False} | options
  return json.dumps(value, **options)


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _strftime_now(form):
  return datetime.datetime.now().strftime(form)
