"""reasoning_gym's data sets as tasks; most of it with a stand-in for it."""

import dataclasses
import pickle
import sys
import types

import pytest

from jax_rlvr.records import Completion
from jax_rlvr.tasks import ReasoningGym


@dataclasses.dataclass(frozen=True)
class Entry:
  """A grader that reads the entry."""

  def __call__(self, prompt, completion):
    return float(completion.text == prompt.extra['entry']['answer'])


class _Sums:
  """As reasoning_gym's data sets are: entry i of seed s is drawn from s + i."""

  def __init__(self, size, seed, terms):
    self.size, self.seed, self.terms = size, seed, terms

  def __getitem__(self, i):
    assert i < self.size
    number = (self.seed + i) % 40
    return {
      'question': f'{number}{" + 0" * self.terms}?',
      'answer': str(number),
      'metadata': {'number': number},
    }


@pytest.fixture
def gym(monkeypatch):
  def create_dataset(name, size, seed, terms=1):
    if name != 'sums':
      raise ValueError(f"Dataset '{name}' not registered")
    assert terms > 0, 'terms must be positive'
    return _Sums(size, seed, terms)

  module = types.SimpleNamespace(create_dataset=create_dataset)
  monkeypatch.setitem(sys.modules, 'reasoning_gym', module)


def made(**arguments):
  return ReasoningGym(
    **{'dataset': 'sums', 'size': 20, 'test_size': 5, 'grader': Entry()}
    | arguments
  )


def test_prompt_holds_question_answer_and_entry(gym):
  prompt = made(arguments={'terms': 2}, suffix=' Go.').prompts('test')[3]
  assert (prompt.text, prompt.answer) == ('3 + 0 + 0? Go.', '3')
  assert (prompt.task, prompt.id) == ('sums', '3')
  assert prompt.extra['entry']['metadata'] == {'number': 3}


def test_splits_share_no_question(gym):
  task = made(size=50)
  test = {prompt.text for prompt in task.prompts('test')}
  train = [prompt.text for prompt in task.prompts('train')]
  # Of 50 entries those that come round to the first five again are left out.
  assert len(test) == 5 and len(train) == 45
  assert not test & set(train)
  assert [p.id for p in task.prompts('train')][:2] == ['5', '6']


def test_seed_moves_the_entries_and_size_does_not(gym):
  assert made(seed=7).prompts('test')[0].answer == '7'
  more = made(size=30)
  assert more.prompts('train')[:20] == made().prompts('train')


def test_grader_judges(gym):
  task = made()
  prompt = task.prompts('test')[2]
  assert task.reward(prompt, Completion(text='2')) == 1.0
  assert task.reward(prompt, Completion(text='3')) == 0.0


def test_name_is_that_of_the_data_set_or_ones_own(gym):
  assert made().name == 'sums'
  task = made(name='mine')
  assert task.name == 'mine' and task.prompts('test')[0].task == 'mine'


def test_task_is_hashable_and_pickled():
  task = made(arguments={'terms': 2})
  assert isinstance(hash(task), int)
  assert pickle.loads(pickle.dumps(task)) == task
  assert ReasoningGym(dataset='gcd').grader.dataset == 'gcd'


@pytest.mark.parametrize(
  'arguments, match',
  [
    (
      {'dataset': 'sum'},
      r"sum: reasoning_gym refuses 'sum' with \{\}.*not reg",
    ),
    ({'arguments': {'terms': 0}}, 'sums: .* must be positive'),
    (
      {'arguments': {'depth': 1}},
      "sums: .* unexpected keyword argument 'depth'",
    ),
    (
      {'size': 3, 'test_size': 40},
      'sums, train: all 3 questions are in the te',
    ),
  ],
)
def test_what_reasoning_gym_refuses_is_named(gym, arguments, match):
  with pytest.raises(ValueError, match=f'^{match}') as caught:
    made(**arguments).prompts('train')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'arguments, match',
  [
    ({'size': 0}, 'size=0; give 1 or more'),
    ({'test_size': 0}, 'test_size=0; give 1 or more'),
    (
      {'arguments': {'seed': 1}},
      'arguments has seed, which ReasoningGym itself',
    ),
  ],
)
def test_bad_argument_is_named(arguments, match):
  with pytest.raises(ValueError, match=f'^sums: {match}'):
    made(**arguments)


def test_unknown_split_is_named():
  with pytest.raises(ValueError, match="split='valid'"):
    made().prompts('valid')


def test_missing_reasoning_gym_is_named_with_a_remedy(monkeypatch):
  monkeypatch.setitem(sys.modules, 'reasoning_gym', None)
  with pytest.raises(
    ImportError, match=r"^sums: .*pip install 'jax-rlvr\[gym\]"
  ):
    made().prompts('train')


@pytest.mark.filterwarnings('ignore')  # of its dependencies
@pytest.mark.parametrize('dataset', ['chain_sum', 'gcd', 'letter_counting'])
def test_real_data_sets_are_asked_and_graded(dataset):
  pytest.importorskip('reasoning_gym')
  task = ReasoningGym(dataset=dataset, size=20, test_size=10)
  train, test = task.prompts('train'), task.prompts('test')
  assert len(test) == 10 and 10 < len(train) <= 20
  assert task.prompts('train') == train
  for prompt in [*train, *test]:
    right = Completion(text=f'<answer>{prompt.answer}</answer>')
    assert task.reward(prompt, right) == 1.0
    wrong = Completion(text=f'<answer>{prompt.answer}0</answer>')
    assert task.reward(prompt, wrong) == 0.0
