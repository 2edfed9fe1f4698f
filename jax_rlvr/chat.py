"""Chat templates: a conversation → one text, as transformers renders it.

Whoever splits that text at special tokens must find those of the template and
none of the contents: contents go in through `guard`, which breaks theirs up.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, str]]

# Stands within a special token that is to stay text; a tokenizer takes it out
# once special tokens are found. A Unicode noncharacter, which no text has.
BREAK = '\ufdd0'


def guard(special: Iterable[str]) -> Callable[[str], str]:
  """A function that breaks up these special tokens wherever a text has them.

  Raises:
    ValueError: one is a single character: there is nothing to break up.
  """
  special = list(special)
  for token in special:
    if len(token) < 2:
      raise ValueError(
        f'special token {token!r} cannot be told from that text; give a '
        'tokenizer whose special tokens have two characters or more'
      )
  # A look-ahead, since special tokens in a text may overlap.
  tokens = '|'.join(re.escape(token) for token in special)
  pattern = re.compile(f'(?={tokens})(.)', re.DOTALL)
  return functools.partial(pattern.sub, rf'\1{BREAK}')


def joined(messages: Messages) -> str:
  """The text of a conversation without a template: its joined contents."""
  return ''.join(message['content'] for message in messages)


def render(
  template: str,
  messages: Messages,
  plain: Callable[[str], str],
  bos_token: str,
  eos_token: str,
) -> str:
  """The text of a conversation, up to where the assistant goes on.

  Args:
    template: Jinja.
    messages: each a role, taken as it is, and contents.
    plain: a `guard`, for all but the roles.
    bos_token, eos_token: as the template names them.
  """
  guarded = [
    {k: text if k == 'role' else plain(text) for k, text in message.items()}
    for message in messages
  ]
  return _compiled(template).render(
    messages=guarded,
    # None, not undefined: templates ask `if tools is not none`.
    tools=None,
    documents=None,
    add_generation_prompt=True,
    bos_token=bos_token,
    eos_token=eos_token,
  )


class _Generation(jinja2.ext.Extension):
  """`{% generation %}` marks the assistant's part; here it changes nothing."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols', _Generation],
  )
  environment.filters['tojson'] = _tojson
  functions = {
    'raise_exception': _raise_exception,
    'strftime_now': _strftime_now,
  }
  return environment.from_string(template, globals=functions)


def _tojson(value, **options):
  """Jinja's own escapes HTML and non-ASCII, which no model was trained on."""
  options: dict = {'ensure_ascii': False} | options
  return json.dumps(value, **options)


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _strftime_now(form):
  return datetime.datetime.now().strftime(form)
