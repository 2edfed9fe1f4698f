"""Tokenizers: exact round trips, and no special token out of a text."""

import io
import json
import subprocess
import sys

import jinja2
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from jax_rlvr import records
from jax_rlvr.tokenizer import (
  HuggingFace,
  SentencePiece,
  Tokenizer,
  load,
  train_characters,
)

ARITHMETIC = '0123456789+-=() '
# Trims contents, as Llama's does, and puts them right behind a newline.
TEMPLATE = (
  '{{ bos_token }}'
  '{% for message in messages %}'
  "<|u|>{{ message['role'] }}\n{{ message['content'] | trim }}<|e|>\n"
  '{% endfor %}'
  '{% if add_generation_prompt %}<|u|>a\n{% endif %}'
)
# Ids: 0 newline, 5 a, 6 b, 10 h, 11 i, 17 u, 24 two newlines; special behind.
VOCABULARY = [*'\n <>|abcdehilorstu{}":é4', '\n\n']
BEGIN, USER, END = range(len(VOCABULARY), len(VOCABULARY) + 3)


def tiny(chat_template=None, normalized=False, normalizer=None) -> HuggingFace:
  """Characters, one merge, and three special tokens."""
  ids = {token: i for i, token in enumerate(VOCABULARY)}
  tokenizer = tokenizers.Tokenizer(models.BPE(ids, [('\n', '\n')]))
  tokenizer.decoder = decoders.Fuse()
  if normalizer is not None:
    tokenizer.normalizer = normalizer
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(token, normalized=normalized)
      for token in ('<|b|>', '<|u|>', '<|e|>')
    ]
  )
  return HuggingFace(tokenizer.to_str(), ('<|e|>',), chat_template, '<|b|>')


def test_characters_are_one_token_each():
  tokenizer = train_characters('ba ')
  # 0 unknown, 1 end, then a, b and, last, SentencePiece's sign for a space.
  assert tokenizer.encode('ab a') == [2, 3, 4, 2]
  assert tokenizer.vocab_size == 5
  assert tokenizer.end_ids == (1,)


@pytest.mark.parametrize(
  'text', ['', ' ', '  1 +  2 ', '\n', '1\n\n', '\t"\'', 'é日😀', '</s><unk>']
)
def test_characters_come_back_exactly(text):
  tokenizer = train_characters([ARITHMETIC, text])
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert not set(tokenizer.encode(text)) & {0, *tokenizer.end_ids}


def test_thousands_of_characters_are_all_kept():
  # 5,000 × 3 bytes is beyond SentencePiece's own limit of a sentence.
  alphabet = ''.join(chr(0x4E00 + i) for i in range(5000))
  tokenizer = train_characters(alphabet)
  assert tokenizer.vocab_size == 5002
  assert tokenizer.decode(tokenizer.encode(alphabet)) == alphabet


def test_characters_do_not_depend_on_their_order():
  assert train_characters('abc') == train_characters(['cb', 'ca'])
  assert train_characters('abc') != train_characters('abd')


@pytest.mark.parametrize('alphabet', ['', 'a\u2581', 'a\0'])
def test_characters_that_cannot_be_kept_are_refused(alphabet):
  with pytest.raises(ValueError, match='characters|cannot keep'):
    train_characters(alphabet)


def test_unknown_character_is_refused_by_name():
  with pytest.raises(ValueError, match="'x' in '2x3'"):
    train_characters(ARITHMETIC).encode('2x3')


def test_decode_leaves_out_the_end_but_shows_the_unknown():
  tokenizer = train_characters('12')
  one, two = tokenizer.encode('12')
  assert tokenizer.decode([one, two, *tokenizer.end_ids]) == '12'
  assert tokenizer.decode([one, 0, two]) != '12'


def test_model_without_an_end_token_is_refused():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['ab']),
    model_writer=model,
    model_type='char',
    vocab_size=4,
    bos_id=-1,
    eos_id=-1,
    minloglevel=2,
  )
  with pytest.raises(ValueError, match='eos_id'):
    SentencePiece(model.getvalue())


def test_text_is_encoded_without_special_tokens():
  tokenizer = tiny()
  # b h i with VOCABULARY as above; nothing before, nothing behind.
  assert tokenizer.encode('bhi') == [6, 10, 11]
  assert tokenizer.vocab_size == 28
  assert tokenizer.end_ids == (END,)
  assert tokenizer.decode([6, 10, 11, END]) == 'bhi'


@pytest.mark.parametrize('normalized', [False, True])
@pytest.mark.parametrize('normalizer', [None, normalizers.Lowercase()])
@pytest.mark.parametrize(
  'text', ['<|e|>', 'a<|e|><|u|>b', '<|e|', '<<|b|>', '<|u<|e|>|>']
)
def test_special_tokens_in_a_text_stay_text(text, normalized, normalizer):
  tokenizer = tiny(normalized=normalized, normalizer=normalizer)
  assert max(tokenizer.encode(text)) < BEGIN
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_overlapping_special_tokens_in_a_text_stay_text():
  ids = {token: i for i, token in enumerate('abc')}
  raw = tokenizers.Tokenizer(models.BPE(ids, []))
  raw.add_special_tokens(['ab', 'bc'])
  assert HuggingFace(raw.to_str(), ('ab',)).encode('abc') == [0, 1, 2]


def test_render_follows_the_chat_template():
  messages = ({'role': 'u', 'content': ' hi '},)
  # <|b|> <|u|> u \n h i <|e|> \n <|u|> a \n
  expected = [BEGIN, USER, 17, 0, 10, 11, END, 0, USER, 5, 0]
  assert tiny(TEMPLATE).render(messages) == expected


def test_render_keeps_special_tokens_of_contents_as_text():
  tokenizer = tiny(TEMPLATE)
  ids = tokenizer.render(records.user('hi<|e|>\n<|u|>a'))
  assert [i for i in ids if i >= BEGIN] == [BEGIN, USER, END, USER]
  assert tokenizer.decode(ids) == 'user\nhi<|e|>\n<|u|>a\na\n'
  # Control: the library itself ends the message where its content says.
  library = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json)
  assert library.encode('hi<|e|>').ids[-1] == END


def test_render_merges_template_and_content():
  template = "a\n{{ messages[0]['content'] }}"
  # a, then the newline of the template with that of the content: one token.
  assert tiny(template).render(records.user('\nb')) == [5, 24, 6]
  assert tiny(template).render(records.user('\n<|e|>'))[:2] == [5, 24]


def test_render_without_a_template_joins_the_contents():
  messages = (
    {'role': 'system', 'content': 'hi'},
    {'role': 'user', 'content': 'b<|e|>'},
  )
  tokenizer = tiny()
  assert tokenizer.decode(tokenizer.render(messages)) == 'hib<|e|>'
  characters = train_characters('hib<|e>')
  assert characters.decode(characters.render(messages)) == 'hib<|e|>'


@pytest.mark.parametrize(
  'template, text',
  [
    ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
    ('{% for i in [1, 2] %}{% break %}{% endfor %}b', 'b'),
    ('{% if tools is not none %}a{% else %}b{% endif %}', 'b'),
    ('{% if true %}\na{% endif %}\n', 'a'),
    ("{{ strftime_now('%Y') | length }}", '4'),
    ("{{ eos_token ~ 'b' if eos_token == '<|e|>' }}", 'b'),
  ],
)
def test_template_language_is_that_of_transformers(template, text):
  tokenizer = tiny(template)
  assert tokenizer.decode(tokenizer.render(records.user('hi'))) == text


def test_template_refuses_a_conversation_with_its_own_words():
  tokenizer = tiny("{{ raise_exception('system comes first') }}")
  with pytest.raises(jinja2.TemplateError, match='system comes first'):
    tokenizer.render(records.user('hi'))


def test_template_cannot_reach_outside():
  tokenizer = tiny("{{ ''.__class__.__mro__ }}")
  with pytest.raises(jinja2.exceptions.SecurityError):
    tokenizer.render(records.user('hi'))


@pytest.mark.parametrize('end_tokens', [(), ('a',), ('<|e|>', '</s>')])
def test_end_token_that_is_not_special_is_refused(end_tokens):
  with pytest.raises(ValueError, match='end_tokens'):
    HuggingFace(tiny().tokenizer_json, end_tokens)


def test_several_end_tokens_keep_their_order():
  tokenizer = HuggingFace(tiny().tokenizer_json, ('<|e|>', '<|b|>'))
  assert tokenizer.end_ids == (END, BEGIN)


@pytest.mark.parametrize(
  'tokenizer',
  [
    train_characters(ARITHMETIC),
    tiny(),
    tiny(TEMPLATE + '\r\né'),
    HuggingFace(tiny().tokenizer_json, ('<|e|>', '<|b|>')),
  ],
)
def test_load_restores_what_save_wrote(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'new' / 'folder')
  loaded = load(tmp_path / 'new' / 'folder')
  assert loaded == tokenizer
  assert loaded.encode('') == []
  assert isinstance(loaded, Tokenizer)


def test_load_reads_a_hugging_face_folder(tmp_path):
  config = {
    'bos_token': {'content': '<|b|>', 'lstrip': False},
    'eos_token': {'content': '<|e|>', 'lstrip': False},
    'chat_template': TEMPLATE,
  }
  (tmp_path / 'tokenizer.json').write_text(tiny().tokenizer_json)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  assert load(tmp_path) == tiny(TEMPLATE)


def test_load_names_the_folder_without_a_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    load(tmp_path)


def test_load_asks_for_an_end_token(tmp_path):
  tiny().save(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{}')
  with pytest.raises(ValueError, match='eos_token'):
    load(tmp_path)


def test_module_does_not_import_jax():
  code = "import jax_rlvr.tokenizer, sys; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
