"""Scores of reasoning-gym, which may not be installed."""

import builtins
import json

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import graders
from jax_rlvr.tasks.graders.gym import EVALUATED


@pytest.fixture(scope='module')
def reasoning_gym():
  return pytest.importorskip(
    'reasoning_gym', reason='extra gym is not installed'
  )


def entries(reasoning_gym, dataset, size=8):
  """As a prompt has them that has been to JSON and back."""
  return [
    json.loads(json.dumps(dict(entry)))
    for entry in reasoning_gym.create_dataset(dataset, seed=1, size=size)
  ]


def grade(dataset, entry, text):
  prompt = Prompt(
    messages=user(entry['question']),
    answer=str(entry['answer']),
    extra={'entry': entry},
  )
  return graders.Gym(dataset=dataset)(prompt, Completion(text=text))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
  'dataset',
  ['chain_sum', 'gcd', 'letter_counting', 'spell_backward', 'number_sequence'],
)
def test_gym_accepts_right_answers_only(reasoning_gym, dataset):
  for entry in entries(reasoning_gym, dataset):
    answer = entry['answer']
    for text in (
      answer,
      f'I think.\n{answer}',
      f'\\boxed{{{answer}}}',
      f'<answer>{answer}</answer>',
      f'<answer>other</answer> no, <answer> {answer} </answer>.',
    ):
      assert grade(dataset, entry, text) == 1, text
    for text in ('', f'{answer}0', f'1{answer}', f'{answer} {answer}', 'no'):
      # What earns partial credit there.
      assert grade(dataset, entry, text) == 0, text


@pytest.mark.parametrize('dataset', sorted(EVALUATED))
def test_gym_runs_no_answer(reasoning_gym, dataset, monkeypatch):
  # Some of its scorers do: eval(), or SymPy's parse_expr(), which is eval().
  ran = []
  monkeypatch.setattr(builtins, 'breakpoint', lambda *_: ran.append(1))
  (entry,) = entries(reasoning_gym, dataset, size=1)
  codes = ['breakpoint()', 'max(breakpoint(),1)', 'eval(chr(49))']
  # In letters that Python takes for those of ASCII.
  codes += ['\uff42reakpoint()', 'x.__class__', '(lambda: 1)()', "f'{1}'"]
  for code in codes:
    assert not EVALUATED[dataset].fullmatch(code)
    assert grade(dataset, entry, f'<answer>{code}</answer>') == 0
  assert not ran
  assert EVALUATED[dataset].fullmatch(entry['answer'])
  assert grade(dataset, entry, f'<answer>{entry["answer"]}</answer>') == 1


def test_gym_extracts_the_answer():
  extract = graders.Gym(dataset='gcd').extract
  assert extract(Completion(text='<answer> 5 </answer>')) == '5'
  assert extract(Completion(text='')) is None


def test_gym_says_what_it_lacks(reasoning_gym):
  graders.Gym(dataset='gcd').require()
  with pytest.raises(ValueError, match='no_such'):
    graders.Gym(dataset='no_such').require()
  with pytest.raises(ValueError, match="no 'entry' of gcd"):
    prompt = Prompt(messages=user(''), answer='1')
    graders.Gym(dataset='gcd')(prompt, Completion(text='1'))
