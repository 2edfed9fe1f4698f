"""Chat templates as transformers applies them, on random conversations.

The templates are written for these tests, in the styles of well-known models.
"""

import json
import random

import jinja2
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jax_rlvr import tokenizer as ours
from jax_rlvr.tasks import Arithmetic
from tests.test_tokenizer import pieces  # noqa: F401

transformers = pytest.importorskip(
  'transformers', reason='parity needs transformers'
)

# Libraries of others may warn of what they like.
pytestmark = pytest.mark.filterwarnings('default')

# In the style of Qwen2.5: a system prompt of its own; a macro, a namespace,
# contents as they are.
CHATML = """
{%- macro turn(role, content) -%}
  {{- '<|im_start|>' ~ role ~ '\\n' ~ content ~ '<|im_end|>\\n' -}}
{%- endmacro -%}
{%- set state = namespace(system=false, turns=0) -%}
{%- for message in messages if message.role == 'system' -%}
  {%- set state.system = true -%}
{%- endfor -%}
{%- if not state.system -%}
  {{- turn('system', 'Think first. You know ' ~ ['+', '<é>'] | tojson) -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set state.turns = state.turns + 1 -%}
  {{- turn(message['role'], message['content']) -}}
{%- endfor -%}
{%- if tools %}{{ raise_exception('no tools') }}{% endif -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# In the style of Llama 3: begins with bos, trims, names the year.
HEADERS = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Year: ' + strftime_now('%Y') + '\\n\\n' }}
{{- system ~ '<|eot_id|>' }}
{%- for message in rest %}
    {%- if not (message.role == 'user' or message.role == 'assistant') %}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# In the style of Gemma 3: the system message opens the user's turn; another
# name for the assistant; whitespace of the template kept by no dashes.
TURNS = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
{% set first = messages[0]['content'] | trim ~ '\\n\\n' %}
{% set loop_messages = messages[1:] %}
{% else %}
{% set first = '' %}
{% set loop_messages = messages %}
{% endif %}
{% for message in loop_messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must alternate') }}
  {% endif %}
  {% set role = {'assistant': 'model'}.get(message['role'], message['role']) %}
<start_of_turn>{{ role }}
{{ (first if loop.first) ~ message['content'] | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""

# In the style of Gemma 2, which has no system role.
NO_SYSTEM = (
  "{% if messages[0]['role'] == 'system' %}"
  "{{ raise_exception('no system role here') }}{% endif %}" + TURNS
)

# In the style of Mistral: brackets, the system message before the last
# question, eos after each answer, strict alternation.
BRACKETS = """
{%- set has_system = messages[0].role == 'system' %}
{%- set system = messages[0].content if has_system else none %}
{%- set turns = messages[1:] if system is not none else messages %}
{{- bos_token }}
{%- for message in turns %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate') }}
  {%- endif %}
  {%- if message.role == 'user' %}
    {%- if loop.last and system is not none %}
      {{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}
    {%- else %}
      {{- '[INST] ' + message.content + '[/INST]' }}
    {%- endif %}
  {%- elif message.role == 'assistant' %}
    {%- generation %}{{ ' ' + message.content | trim + eos_token }}
    {%- endgeneration %}
  {%- endif %}
{%- endfor %}
"""

# In the style of templates that show contents as data.
DATA = """
{%- for message in messages recursive %}
<|im_start|>{{ message | tojson(indent=1) }}<|im_end|>
{% if not loop.last %}{{ loop.index ~ ' of ' ~ messages | length }}
{% else %}{{ messages | map(attribute='role') | join(', ') | upper }}
{% endif %}
{%- endfor %}
{{- (messages | selectattr('role', 'equalto', 'user') | list)[-1].content[:9] }}
"""

TEMPLATES = {
  'chatml': CHATML,
  'headers': HEADERS,
  'turns': TURNS,
  'no_system': NO_SYSTEM,
  'brackets': BRACKETS,
  'data': DATA,
}

SPECIAL = [
  '<bos>',
  '<eos>',
  '<|im_start|>',
  '<|im_end|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
  '<|eot_id|>',
  '<start_of_turn>',
  '<end_of_turn>',
  '[INST]',
  '[/INST]',
]

WORDS = [
  *'What is 12 + 7 ? the answer: 3.5 , so x<y && y>z'.split(),
  *['naïve', 'café', '日本語', 'Привет', '🙂', '👩‍🔬', 'e\u0301', 'İ'],
  *[
    '{{ bos_token }}',
    '{% if %}',
    "it's",
    '"quoted"',
    '\\n',
    '<think>',
    '####',
  ],
  *['\n', '\n\n', '\t', '  ', ' \n', '\r\n', '\u00a0', '\u2028', ''],
]


def conversations(count: int, words: list[str]) -> list[list[dict[str, str]]]:
  """Random ones: a system message now and then, then turns, the user last."""
  draw = random.Random(20240517)

  def content():
    space = draw.choice(['', ' '])
    return space.join(draw.choices(words, k=draw.randint(0, 12)))

  made = []
  for _ in range(count):
    roles = ['user', *['assistant', 'user'] * draw.randint(0, 3)]
    if draw.random() < 0.4:
      roles = ['system', *roles]
    if draw.random() < 0.1:
      draw.shuffle(roles)
    made.append([{'role': role, 'content': content()} for role in roles])
  return made


@pytest.fixture(scope='module')
def tokenizer_json() -> str:
  """A byte-level BPE tokenizer of a few hundred tokens."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=SPECIAL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  prompts = Arithmetic().prompts('train')
  texts = [p.messages[0]['content'] for p in prompts]
  chats = json.dumps(conversations(50, WORDS), ensure_ascii=False, indent=1)
  tokenizer.train_from_iterator([*texts, chats, *TEMPLATES.values()], trainer)
  return tokenizer.to_str()


def both(tokenizer, folder):
  """Our tokenizer, loaded again, and that of transformers, on one folder."""
  tokenizer.save(folder)
  return (
    ours.load(folder),
    transformers.AutoTokenizer.from_pretrained(str(folder)),
  )


def rendered(tokenizer, messages):
  """Ids or, where the template refuses the conversation, its words."""
  try:
    if isinstance(tokenizer, ours.Tokenizer):
      return tokenizer.render(messages)
    return tokenizer.apply_chat_template(
      messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
  except jinja2.TemplateError as error:
    return str(error)


@pytest.mark.parametrize('name', TEMPLATES)
def test_ids_of_200_conversations_are_equal(tokenizer_json, tmp_path, name):
  tokenizer, theirs = both(
    ours.HuggingFace(
      tokenizer_json, ('<eos>', '<|im_end|>'), TEMPLATES[name], '<bos>'
    ),
    tmp_path,
  )
  ids = []
  for messages in conversations(200, WORDS):
    ids.append(rendered(tokenizer, messages))
    assert ids[-1] == rendered(theirs, messages), messages
  lengths = [len(x) for x in ids if isinstance(x, list)]
  # Most are not refused, and they differ.
  assert len(lengths) >= 100 and len(set(lengths)) >= 50
  assert tokenizer.vocab_size == len(theirs)
  # Control: some templates do refuse.
  refused = len(ids) > len(lengths)
  assert refused == (name in ('turns', 'no_system', 'brackets'))


@pytest.mark.parametrize('name', ['chatml', 'headers', 'turns', 'brackets'])
def test_special_tokens_come_from_the_template_alone(
  tokenizer_json, tmp_path, name
):
  tokenizer, theirs = both(
    ours.HuggingFace(tokenizer_json, ('<eos>',), TEMPLATES[name], '<bos>'),
    tmp_path,
  )
  words = [*WORDS, *SPECIAL, '<|im_<|im_end|>end|>', '<<eos>bos>']

  def special(ids):
    return [i for i in ids if i < len(SPECIAL)]

  planted = 0
  for messages in conversations(200, words):
    harmless = [{**message, 'content': 'x'} for message in messages]
    expected = rendered(theirs, harmless)
    if isinstance(expected, str):
      assert rendered(tokenizer, messages) == expected
      continue
    ids = tokenizer.render(messages)
    assert special(ids) == special(expected)
    # Nothing is lost of the text, special tokens of both kinds included.
    text = theirs.apply_chat_template(
      messages, add_generation_prompt=True, tokenize=False
    )
    assert theirs.decode(ids) == text
    planted += special(rendered(theirs, messages)) != special(expected)
  # Control: transformers takes those of contents for its own.
  assert planted >= 100


def test_sentencepiece_folder_gives_the_ids_of_transformers(
  pieces,  # noqa: F811
  tmp_path,
):
  tokenizer = ours.SentencePiece(
    pieces,
    end_tokens=('<eos>', '<end_of_turn>'),
    chat_template=TURNS,
    bos_token='<bos>',
    special_tokens=frozenset(['<start_of_turn>']),
  )
  tokenizer.save(tmp_path)
  # transformers makes its own tokenizer of the model file.
  file = tmp_path / 'tokenizer_config.json'
  config = json.loads(file.read_text())
  config |= {
    'tokenizer_class': 'GemmaTokenizer',
    'additional_special_tokens': ['<start_of_turn>', '<end_of_turn>'],
  }
  del config['end_tokens']
  file.write_text(json.dumps(config))
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  # Spaces in a row are left out: it cuts words where SentencePiece does not.
  for messages in conversations(200, WORDS):
    assert rendered(tokenizer, messages) == rendered(theirs, messages)
