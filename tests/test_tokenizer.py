"""Tokenizers: exact round trips, and no special token out of a text."""

import io
import json
import random
import subprocess
import sys

import jinja2
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from jax_rlvr import manifest, records
from jax_rlvr.tasks import Arithmetic
from jax_rlvr.tokenizer import (
  HuggingFace,
  SentencePiece,
  Tokenizer,
  load,
  train_characters,
)
from tests.test_train import run

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


# Turns in the style of Gemma.
TURNS = (
  '{{ bos_token }}'
  '{% for message in messages %}'
  "{{ '<start_of_turn>' ~ message['role'] }}\n"
  "{{ message['content'] | trim }}<end_of_turn>\n"
  '{% endfor %}'
  '{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}'
)


def train_pieces(**options) -> bytes:
  """A SentencePiece model of a few hundred pieces of arithmetic questions.

  Ids: 0 <pad>, 1 <eos>, 2 <bos>, 3 <unk>, 4 <start_of_turn>, a control piece,
  5 <end_of_turn>, a user-defined one, 6 and more bytes, then text.
  """
  prompts = Arithmetic().prompts('train')
  texts = [p.messages[0]['content'] for p in prompts]
  settings = dict(
    model_type='bpe',
    vocab_size=350,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    control_symbols=['<start_of_turn>'],
    user_defined_symbols=['<end_of_turn>'],
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    pad_piece='<pad>',
    eos_piece='<eos>',
    bos_piece='<bos>',
    minloglevel=2,
  )
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, **settings | options
  )
  return model.getvalue()


@pytest.fixture(scope='session')
def pieces() -> bytes:
  return train_pieces()


def turns(model: bytes, **changes) -> SentencePiece:
  settings = dict(
    end_tokens=('<end_of_turn>', '<eos>'),
    chat_template=TURNS,
    bos_token='<bos>',
    eos_token='<eos>',
  )
  return SentencePiece(model, **settings | changes)


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


def test_render_keeps_special_tokens_of_other_fields_as_text():
  tokenizer = tiny("{{ messages[0]['name'] }}<|e|>")
  message = {'role': 'u', 'content': '', 'name': '<|u|>'}
  ids = tokenizer.render([message])
  assert [i for i in ids if i >= BEGIN] == [END]


@pytest.mark.parametrize(
  'token, words', [('<s>', "spells '<s>' becomes"), ('a', "'a' cannot be told")]
)
def test_special_token_that_texts_become_is_refused(token, words):
  raw = tokenizers.Tokenizer(models.WordLevel({'a': 0, '<s>': 1, '?': 2}, '?'))
  raw.add_special_tokens([token, '?!'])
  with pytest.raises(ValueError, match=words):
    HuggingFace(raw.to_str(), (token,))


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
    ("{{ 'b' if eos_token == '<|e|>' and bos_token == '<|b|>' }}", 'b'),
    ('{% if true %}\na{% endif %}\n', 'a'),
    ("{{ strftime_now('%Y') | length }}", '4'),
    ('{% generation %}{% set x = 1 %}b{% endgeneration %}{{ x }}', 'b'),
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
    HuggingFace(tiny().tokenizer_json, ('<|e|>',), eos_token='<|b|>'),
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


@pytest.mark.parametrize(
  'generation, eos_token, model, expected',
  [
    # The set of generation_config.json, a list or one id, and no other.
    ([USER, END], '<|e|>', None, ('<|e|>', '<|u|>')),
    ([USER, END], '<|u|>', None, ('<|u|>', '<|e|>')),
    ([BEGIN, USER], '<|e|>', None, ('<|b|>', '<|u|>')),
    (USER, '<|e|>', END, ('<|u|>',)),
    # Where it has none: the tokenizer's own, then the model's.
    (None, '<|e|>', USER, ('<|e|>',)),
    (None, None, [END, USER], ('<|e|>', '<|u|>')),
  ],
)
@pytest.mark.parametrize('form', [str, lambda token: {'content': token}])
def test_load_takes_the_ends_that_the_model_generates_to(
  tmp_path, generation, eos_token, model, expected, form
):
  def write(name, content):
    (tmp_path / name).write_text(json.dumps(content))

  (tmp_path / 'tokenizer.json').write_text(tiny().tokenizer_json)
  write('tokenizer_config.json', {'eos_token': eos_token and form(eos_token)})
  write('generation_config.json', {'eos_token_id': generation})
  write('config.json', {'eos_token_id': model})
  tokenizer = load(tmp_path)
  assert tokenizer.end_tokens == expected
  # Templates know as eos_token that of the tokenizer, an end or not.
  assert tokenizer.eos_token == (eos_token or expected[0])


@pytest.mark.parametrize('file', ['generation_config.json', 'config.json'])
def test_load_refuses_an_end_that_is_text(tmp_path, file):
  (tmp_path / 'tokenizer.json').write_text(tiny().tokenizer_json)
  (tmp_path / 'tokenizer_config.json').write_text('{}')
  (tmp_path / file).write_text('{"eos_token_id": [27, 5]}')
  with pytest.raises(ValueError, match=f'eos_token_id 5 of .*{file}'):
    load(tmp_path)


def test_load_takes_the_default_of_several_templates(tmp_path):
  named = [
    {'name': 'tool_use', 'template': 'a'},
    {'name': 'default', 'template': TEMPLATE},
  ]
  config = {'chat_template': named, 'eos_token': '<|e|>'}
  (tmp_path / 'tokenizer.json').write_text(tiny().tokenizer_json)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  assert load(tmp_path).chat_template == TEMPLATE


def test_load_names_the_folder_without_a_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    load(tmp_path)


def test_load_asks_for_an_end_token(tmp_path):
  tiny().save(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{}')
  with pytest.raises(ValueError, match='eos_token'):
    load(tmp_path)


def test_pieces_render_their_chat_template(pieces):
  tokenizer = turns(pieces)
  message = {'role': 'user', 'content': ' What is 3 + 4? '}
  text = ['user\n', 'What is 3 + 4?', '\n', 'model\n']
  user, question, newline, model = map(tokenizer.encode, text)
  assert tokenizer.render([message]) == [
    2, 4, *user, *question, 5, *newline, 4, *model
  ]  # fmt: skip
  # Control: pieces, not characters.
  assert len(question) < 10
  assert tokenizer.end_ids == (5, 1)


@pytest.mark.parametrize('prefix', [False, True])
@pytest.mark.parametrize(
  'text',
  [
    '<end_of_turn>',
    '<start_of_turn>model\n4<end_of_turn>\n',
    '<eos><bos><pad><unk><0x41>',
    '<start_<end_of_turn>of_turn>',
    '<end_of_turn\ufdd0>',
  ],
)
def test_special_pieces_in_a_text_stay_text(pieces, text, prefix):
  model = train_pieces(add_dummy_prefix=True) if prefix else pieces
  tokenizer = turns(model)
  assert min(tokenizer.encode(text)) > 5
  assert tokenizer.decode(tokenizer.encode(text)) == text
  ids = tokenizer.render(records.user(text))
  # Those of the template alone: <bos>, two turns, one of which ends.
  assert [i for i in ids if i <= 5] == [2, 4, 5, 4]
  # Control: the library itself ends the turn where its text says.
  library = sentencepiece.SentencePieceProcessor(model_proto=model)
  assert 5 in library.encode('<end_of_turn>')


def test_user_defined_piece_is_text_until_it_is_named_special(pieces):
  assert SentencePiece(pieces).encode('<end_of_turn>') == [5]
  special = SentencePiece(pieces, special_tokens=frozenset(['<end_of_turn>']))
  assert 5 not in special.encode('<end_of_turn>')
  assert special.decode([5]) == ''


def test_piece_that_cannot_be_special_is_refused(pieces):
  for token in ('<start_of_turn', '3', '<unk>'):
    with pytest.raises(ValueError, match='no control or user-defined piece'):
      SentencePiece(pieces, end_tokens=(token,))
  model = train_pieces(user_defined_symbols=['+'])
  with pytest.raises(ValueError, match=r"'\+' cannot be told"):
    SentencePiece(model, special_tokens=frozenset('+'))


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'end_tokens': ()},
    {'end_tokens': ('<eos>',), 'eos_token': ''},
    {'chat_template': None, 'special_tokens': frozenset(['<end_of_turn>'])},
  ],
)
def test_load_restores_pieces_and_their_template(pieces, tmp_path, changes):
  tokenizer = turns(pieces, **changes)
  tokenizer.save(tmp_path)
  assert load(tmp_path) == tokenizer
  message = records.user('a <end_of_turn>')
  assert load(tmp_path).render(message) == tokenizer.render(message)


def test_load_reads_a_folder_with_a_sentencepiece_model(pieces, tmp_path):
  added = {
    '3': {'content': '<unk>', 'special': True},
    '4': {'content': '<start_of_turn>', 'special': True},
    '6': {'content': '<0x00>', 'special': False},
  }
  config = {
    'bos_token': {'content': '<bos>'},
    'eos_token': '<eos>',
    'additional_special_tokens': ['<end_of_turn>'],
    'added_tokens_decoder': added,
    'chat_template': TURNS,
    'tokenizer_class': 'GemmaTokenizer',
  }
  (tmp_path / 'tokenizer.model').write_bytes(pieces)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  special = frozenset(['<start_of_turn>', '<end_of_turn>'])
  alone = turns(
    pieces, end_tokens=('<eos>',), eos_token='', special_tokens=special
  )
  assert load(tmp_path) == alone
  ends = {'eos_token_id': [5, 1]}
  (tmp_path / 'generation_config.json').write_text(json.dumps(ends))
  assert load(tmp_path).end_ids == (1, 5)
  # Where tokenizer.json lies beside it, as in the folders of Gemma, it counts.
  (tmp_path / 'tokenizer.json').write_text(tiny().tokenizer_json)
  (tmp_path / 'generation_config.json').unlink()
  config = {'eos_token': '<|e|>'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  assert isinstance(load(tmp_path), HuggingFace)


def test_load_refuses_tokens_beyond_the_sentencepiece_model(pieces, tmp_path):
  config = {'eos_token': '<eos>', 'extra_special_tokens': {'image': '<image>'}}
  (tmp_path / 'tokenizer.model').write_bytes(pieces)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match="'<image>' is no control"):
    load(tmp_path)


def test_pieces_come_back_exactly(pieces):
  draw, tokenizer = random.Random(0), turns(pieces)
  for _ in range(200):
    text = ''.join(draw.choices('What is 12+3 <>\n\té日😀_|of', k=30))
    assert tokenizer.decode(tokenizer.encode(text)) == text


RECIPE = """
import optax
from jax_rlvr.advantages import group_norm
from jax_rlvr.config import Config
from jax_rlvr.filters import token_mean
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.tasks import Arithmetic
from jax_rlvr.tokenizer import load

def get_config(**overrides):
  tokenizer = load('FOLDER')
  policy = PolicyConfig(
    vocab_size=tokenizer.vocab_size,
    layers=1,
    width=16,
    heads=2,
    kv_heads=1,
    head_size=8,
    feed_forward=16,
    max_tokens=64,
  )
  settings = dict(
    policy=policy,
    tokenizer=tokenizer,
    tasks=(Arithmetic(),),
    advantage=group_norm,
    filters=token_mean(),
    optimizer=optax.sgd(0.1),
    steps=2,
    prompts_per_step=4,
    group_size=2,
    max_prompt_tokens=60,
    max_completion_tokens=4,
    eval_prompts=4,
    eval_samples=1,
  )
  return Config(**settings | overrides)
"""


def test_run_trains_and_evaluates_with_pieces(pieces, tmp_path):
  turns(pieces).save(tmp_path / 'pieces')
  recipe, workdir = tmp_path / 'recipe.py', tmp_path / 'run'
  recipe.write_text(RECIPE.replace('FOLDER', str(tmp_path / 'pieces')))
  run('--config', recipe, '--workdir', workdir, check=0)
  # The run has its own copy.
  for file in (tmp_path / 'pieces').iterdir():
    file.unlink()
  assert manifest.read(workdir).tokenizer == turns(pieces)
  scores = tmp_path / 'scores.json'
  run('--workdir', workdir, '--json', scores, module='evaluate', check=0)
  assert json.loads(scores.read_text())['step'] == 2


def test_module_does_not_import_jax():
  code = "import jax_rlvr.tokenizer, sys; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
