"""Text ↔ token ids: SentencePiece and Hugging Face behind one protocol.

Nothing in a text becomes a special token: a prompt that spells `<|im_end|>`
is encoded as the ten characters it is. Only chat templates place them.

Tokenizers are values: equal when their files are. This module does not import
jax.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import sentencepiece
import tokenizers

from jax_rlvr import chat
from jax_rlvr import tokenizer_folder as folders
from jax_rlvr.chat import Messages


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
  """A SentencePiece model with, perhaps, a chat template.

  Templates are those of `HuggingFace`. Each stretch of a rendered conversation
  between special pieces is encoded as a text of its own.

  Attributes:
    model: the model file's bytes.
    end_tokens: pieces that end a completion; the first closes traces. The
      model's </s> if none are given.
    chat_template: Jinja; None joins the contents.
    bos_token: for the chat template.
    eos_token: for the chat template; the first end token if not given.
    special_tokens: user-defined pieces that are special, beside the control
      pieces and those named above: no text becomes one.
  """

  model: bytes = dataclasses.field(repr=False)
  end_tokens: tuple[str, ...] = ()
  chat_template: str | None = dataclasses.field(default=None, repr=False)
  bos_token: str = ''
  eos_token: str = ''
  special_tokens: frozenset[str] = frozenset()

  def __post_init__(self):
    if not self.end_tokens:
      end = self._processor.eos_id()
      if end < 0:
        raise ValueError(
          'the SentencePiece model has no end token; train it with eos_id >= '
          '0, or name end_tokens'
        )
      ends = (self._processor.id_to_piece(end),)
      object.__setattr__(self, 'end_tokens', ends)
    object.__setattr__(self, 'eos_token', self.eos_token or self.end_tokens[0])
    for token in self._named:
      if token not in self._special:
        raise ValueError(
          f'{token!r} is no control or user-defined piece of the SentencePiece '
          'model; use a model that has it, or a tokenizer.json'
        )
    # Refuses what it cannot break up.
    self._plain('')

  @property
  def _named(self) -> list[str]:
    named = (self.bos_token, self.eos_token)
    return [*filter(None, named), *self.end_tokens, *self.special_tokens]

  @functools.cached_property
  def _processor(self) -> sentencepiece.SentencePieceProcessor:
    model = self.model
    # User-defined pieces are found in texts, control pieces never.
    for token in self._named:
      model = _as_control(model, token)
    return sentencepiece.SentencePieceProcessor(model_proto=model)

  @functools.cached_property
  def _special(self) -> dict[str, int]:
    processor = self._processor
    ids = filter(processor.is_control, range(processor.vocab_size()))
    return {processor.id_to_piece(i): i for i in ids}

  @property
  def vocab_size(self) -> int:
    return self._processor.vocab_size()

  @property
  def end_ids(self) -> tuple[int, ...]:
    return tuple(self._special[token] for token in self.end_tokens)

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
    if self.chat_template is None:
      return self.encode(chat.joined(messages))
    text = chat.render(
      self.chat_template,
      messages,
      self._plain,
      self.bos_token,
      self.eos_token,
    )
    ids = []
    for part in self._split(text):
      if part in self._special:
        ids.append(self._special[part])
      else:
        ids += self.encode(part.replace(chat.BREAK, ''))
    return ids

  @functools.cached_property
  def _plain(self) -> Callable[[str], str]:
    return chat.guard(self._special)

  @functools.cached_property
  def _split(self) -> Callable[[str], list[str]]:
    # The longest of those that start at one place, as tokenizer.json does it.
    tokens = sorted(self._special, key=len, reverse=True)
    return re.compile(f'({"|".join(map(re.escape, tokens))})').split

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the model alone, or all of it as a Hugging Face folder."""
    if self == SentencePiece(self.model):
      folders.write(folder, {'sentencepiece.model': self.model})
      return
    special = {'additional_special_tokens': sorted(self.special_tokens)}
    files = {'tokenizer.model': self.model}
    folders.write(folder, files | folders.settings(self, special))


def _as_control(model: bytes, piece: str) -> bytes:
  """The model with this piece, if it is user-defined, made a control piece.

  A model file has for each piece its text (field 1, with a length), score
  (field 2, four bytes) and type (field 3): 4 is user-defined, 3 is control.
  """
  text = piece.encode()
  entry = rb'(\x0a%b\x15.{4}\x18)\x04' % re.escape(bytes([len(text)]) + text)
  return re.sub(entry, b'\\1\x03', model, flags=re.DOTALL)


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


@dataclasses.dataclass(frozen=True)
class HuggingFace:
  """A tokenizer.json with, perhaps, a chat template.

  Templates run as in transformers 5: `messages`, `bos_token`, `eos_token` and
  `add_generation_prompt`, which is true. Special tokens in messages stay text;
  roles are taken as they are.

  Attributes:
    tokenizer_json: the file's text.
    end_tokens: tokens that end a completion; the first closes traces.
    chat_template: Jinja; None joins the contents.
    bos_token: for the chat template.
    eos_token: for the chat template; the first end token if not given.
  """

  tokenizer_json: str = dataclasses.field(repr=False)
  end_tokens: tuple[str, ...]
  chat_template: str | None = dataclasses.field(default=None, repr=False)
  bos_token: str = ''
  eos_token: str = ''

  def __post_init__(self):
    if not self.end_tokens or set(self.end_tokens) - set(self._special):
      raise ValueError(
        f'end_tokens={self.end_tokens!r} must be one or more of the special '
        'tokens that tokenizer.json adds; name those that end a completion'
      )
    object.__setattr__(self, 'eos_token', self.eos_token or self.end_tokens[0])
    # What a text may become: it hides the text, but directs nothing.
    unknown = self.encode('\U0010fffd')
    for token, i in self._special.items():
      if i in self.encode(token) and i not in unknown:
        raise ValueError(
          f'a text that spells {token!r} becomes that special token; give a '
          'tokenizer that has other tokens for its characters'
        )

  @functools.cached_property
  def _tokenizer(self) -> tokenizers.Tokenizer:
    spec = json.loads(self.tokenizer_json)
    # The library looks for special tokens first and normalizes later.
    unbreak = {
      'type': 'Replace',
      'pattern': {'String': chat.BREAK},
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
  def _plain(self) -> Callable[[str], str]:
    return chat.guard(self._special)

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
    if self.chat_template is None:
      return self.encode(chat.joined(messages))
    text = chat.render(
      self.chat_template,
      messages,
      self._plain,
      self.bos_token,
      self.eos_token,
    )
    return self._ids(text)

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that transformers, too, loads."""
    kind = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    tokenizer_json = {'tokenizer.json': self.tokenizer_json.encode()}
    folders.write(folder, tokenizer_json | folders.settings(self, kind))

  def _ids(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids


def load(folder: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer that `save` wrote, or that of a Hugging Face model folder.

  Of a model folder, tokenizer.json goes before tokenizer.model. Completions end
  where transformers ends them: at the eos_token_id of generation_config.json
  and nowhere else. Where that has none, at the eos_token of
  tokenizer_config.json, or else at the eos_token_id of config.json. The
  eos_token, if it is among them, is the first.

  Raises:
    FileNotFoundError: the folder holds no tokenizer.
    ValueError: no file names an end token, or one names an id that is none.
  """
  folder = pathlib.Path(folder)
  settings = folder / 'tokenizer_config.json'
  config = folders.read_json(settings)
  tokenizer_json = folder / 'tokenizer.json'
  own = folder / 'sentencepiece.model'
  model = own if own.exists() else folder / 'tokenizer.model'
  if tokenizer_json.exists() and settings.exists() and model != own:
    text = tokenizer_json.read_bytes().decode()
    added = json.loads(text)['added_tokens']
    special = {t['id']: t['content'] for t in added if t['special']}
    ends = folders.end_tokens(folder, config, special)
    if not ends:
      raise ValueError(f'{settings} has no end token; set "eos_token"')
    return HuggingFace(text, **folders.fields(folder, config, ends))
  if model.exists():
    content = model.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = range(processor.vocab_size())
    pieces = {i: processor.id_to_piece(i) for i in ids}
    special = folders.special_tokens(config)
    special.discard(pieces[processor.unk_id()])
    ends = folders.end_tokens(folder, config, pieces)
    return SentencePiece(
      content,
      special_tokens=frozenset(special),
      **folders.fields(folder, config, ends),
    )
  raise FileNotFoundError(
    f'no tokenizer in {folder}; it needs {tokenizer_json.name} and '
    f'{settings.name}, or {own.name}, or {model.name}'
  )
