"""Graders of functions, of lengths and of other graders."""

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import graders


def prompt(answer='', question='', **extra) -> Prompt:
  return Prompt(messages=user(question), answer=answer, extra=extra)


def grade(grader, answer, text, question='', truncated=False, extra=None):
  asked = prompt(answer, question, **(extra or {}))
  return grader(asked, Completion(text=text, truncated=truncated))


def half(prompt, completion, factor=0.5):
  del prompt
  return factor * len(completion.text)


def every(prompts, completions):
  return [{'reward': 1, 'length': len(c.text)} for c in completions]


RESULTS = {
  'none': None,
  'true': True,
  'text': '1',
  'nan': float('nan'),
  'empty': {},
  'infinite': {'reward': 1.0, 'part': float('inf')},
}


def result(prompt, completion):
  return RESULTS[completion.text]


def few(prompts, completions):
  return []


def test_function_calls_it_with_its_arguments():
  grader = graders.Function(path=f'{__name__}:half')
  assert grade(grader, '', 'four') == 2
  grader = graders.Function(path=f'{__name__}:half', arguments={'factor': 3})
  assert grade(grader, '', 'four') == 12
  # Its tasks hand it one completion at a time.
  assert not hasattr(grader, 'many')


def test_function_calls_it_with_many():
  grader = graders.Function(path=f'{__name__}:every', batch=True)
  completions = [Completion(text=text) for text in ('a', 'bc')]
  assert grader.many([prompt()] * 2, completions) == [
    {'reward': 1, 'length': 1},
    {'reward': 1, 'length': 2},
  ]
  assert grade(grader, '', 'abc') == {'reward': 1, 'length': 3}


def test_function_checks_results():
  grader = graders.Function(path=f'{__name__}:result')
  assert grade(grader, '', 'none') is None
  assert grade(grader, '', 'true') == 1.0
  for bad in ('text', 'nan', 'empty', 'infinite'):
    with pytest.raises(ValueError, match='returned'):
      grade(grader, '', bad)
  with pytest.raises(ValueError, match='0 results for 1'):
    grade(graders.Function(path=f'{__name__}:few', batch=True), '', '')


@pytest.mark.parametrize(
  'path', ['', 'a', 'a:', ':b', 'a b:c', 'a:b:c', 'a/b:c']
)
def test_function_wants_a_path(path):
  with pytest.raises(ValueError, match="give 'module:function'"):
    graders.Function(path=path)


def test_function_says_what_cannot_be_imported():
  with pytest.raises(ImportError, match='module no_such cannot be imported'):
    graders.Function(path='no_such:f').require()
  with pytest.raises(ImportError, match='no sqr; did you mean sqrt'):
    graders.Function(path='math:sqr').require()
  with pytest.raises(ImportError, match='math:pi is no function'):
    graders.Function(path='math:pi').require()


def test_overlong_punishes_linearly():
  grader = graders.Overlong(max_tokens=100, buffer=20, penalty=0.5)
  rewards = [
    grader(prompt(), Completion(text='', length=length))
    for length in (1, 80, 85, 90, 100, 120)
  ]
  # Of 20 tokens of buffer, 5 are a quarter of 0.5.
  assert rewards == [0, 0, -0.125, -0.25, -0.5, -0.5]
  with pytest.raises(ValueError, match='buffer=200'):
    graders.Overlong(max_tokens=100, buffer=200)


def test_finished_has_no_judgement_of_what_did_not():
  grader = graders.Finished(grader=graders.Number())
  assert grade(grader, '7', '7') == 1
  assert grade(grader, '7', '8') == 0
  assert grade(grader, '7', '7', truncated=True) is None
  assert grader.extract(Completion(text='7')) == '7'
  assert grader.extract(Completion(text='7', truncated=True)) is None


def test_weighted_adds_its_parts():
  grader = graders.Weighted(
    parts={
      'right': graders.Number(),
      'long': graders.Overlong(max_tokens=10, buffer=10),
      'every': graders.Function(path=f'{__name__}:every', batch=True),
    },
    weights={'right': 2.0, 'long': 0.5, 'every': 0.25},
  )
  completion = Completion(text='7', length=5)
  # 2 · 1 − 0.5 · 0.5 + 0.25 · 1
  assert grader(prompt('7'), completion) == {
    'reward': 2.0,
    'outcome': 1.0,
    'right': 1.0,
    'long': -0.5,
    'every': 1.0,
    'every/length': 1.0,
  }
  assert grader.extract(completion) == '7'


def test_weighted_is_unscorable_where_a_part_is():
  grader = graders.Weighted(
    parts={
      'long': graders.Overlong(max_tokens=10, buffer=10),
      'right': graders.Finished(grader=graders.Number()),
    },
    weights={'long': 1.0, 'right': 1.0},
  )
  assert grade(grader, '7', '7', truncated=True) is None
  assert grade(grader, '7', '7')['outcome'] == 0  # of the first part


def test_weighted_checks_its_arguments():
  parts = {'a': graders.Number()}
  for weights in ({}, {'b': 1.0}, {'a': float('nan')}):
    with pytest.raises(ValueError, match='Weighted'):
      graders.Weighted(parts=parts, weights=weights)
  with pytest.raises(ValueError, match='rename'):
    graders.Weighted(
      parts={'reward': graders.Number()}, weights={'reward': 1.0}
    )


def test_require_reaches_the_parts():
  part = graders.Function(path='no_such:f')
  with pytest.raises(ImportError):
    graders.Weighted(parts={'a': part}, weights={'a': 1.0}).require()
  with pytest.raises(ImportError):
    graders.Finished(grader=part).require()
  graders.Finished(grader=graders.Number()).require()
