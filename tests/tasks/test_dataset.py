"""Tasks of rows: columns, messages, answers, and who judges."""

import dataclasses
import json
import pickle

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import (
  Dataset,
  Json,
  Parquet,
  Rows,
  aime24,
  aime25,
  amc23,
  graders,
  math500,
  math_train,
  verl,
)


@dataclasses.dataclass(frozen=True)
class Exact:
  """A grader as simple as can be."""

  right: float = 1.0

  def __call__(self, prompt, completion):
    return {'reward': self.right * (completion.text == prompt.answer)}


@dataclasses.dataclass(frozen=True)
class Voting(Exact):
  """One that can tell the answer, and judges many at once."""

  def extract(self, completion):
    return completion.text.strip() or None

  def many(self, prompts, completions):
    return [len(prompts) + len(completions)] * len(prompts)


def made(rows, **arguments):
  return Dataset(
    **{'name': 'sums', 'grader': Exact(), 'train': Rows(rows)} | arguments
  )


def only_prompt(row, **arguments):
  (prompt,) = made([row], **arguments).prompts('train')
  return prompt


ROW = {'question': '1+1?', 'answer': '2'}


def test_prompt_is_made_of_the_named_columns():
  row = {'q': '1+1?', 'a': {'b': '2'}, 'level': 3, 'kind': {'of': 'sum'}}
  prompt = only_prompt(
    row, prompt='q', answer='a.b', extra=['level', 'kind.of'], suffix=' Go.'
  )
  assert prompt == Prompt(
    messages=user('1+1? Go.'),
    answer='2',
    task='sums',
    id='train/0',
    extra={'level': 3, 'kind.of': 'sum'},
  )


def test_column_with_a_dot_in_its_name_goes_before_a_nested_one():
  row = {'question': '?', 'a.b': 'flat', 'a': {'b': 'nested'}}
  assert only_prompt(row, answer='a.b').answer == 'flat'


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ({}, [('user', '1+1?')]),
    ({'prefix': 'Sum: ', 'suffix': ' Go.'}, [('user', 'Sum: 1+1? Go.')]),
    ({'system': 'Be brief.'}, [('system', 'Be brief.'), ('user', '1+1?')]),
  ],
)
def test_text_becomes_a_conversation(arguments, expected):
  messages = only_prompt(ROW, **arguments).messages
  assert [(m['role'], m['content']) for m in messages] == expected


CHAT = [
  {'role': 'system', 'content': 'S'},
  {'role': 'user', 'content': 'A', 'name': None},
  {'role': 'assistant', 'content': 'B'},
  {'role': 'user', 'content': 'C'},
]


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ({}, 'S A B C'),
    ({'prefix': '<', 'suffix': '>'}, 'S A B <C>'),
    ({'system': 'T'}, 'T A B C'),
  ],
)
def test_conversation_is_kept(arguments, expected):
  row = {'question': CHAT, 'answer': '2'}
  messages = only_prompt(row, **arguments).messages
  assert ' '.join(message['content'] for message in messages) == expected
  assert all(set(message) == {'role', 'content'} for message in messages)
  assert CHAT[3]['content'] == 'C'


@pytest.mark.parametrize(
  'answer, text',
  [
    ('  two ', '  two '),
    (2, '2'),
    (0, '0'),
    (27.0, '27.0'),
    (-0.5, '-0.5'),
    (True, 'true'),
    (['½', 2], '["½", 2]'),
    ({'a': None}, '{"a": null}'),
  ],
)
def test_answer_becomes_text(answer, text):
  assert only_prompt({'question': '?', 'answer': answer}).answer == text


def test_rows_without_an_answer_are_dropped_and_counted(caplog):
  answers = ['2', '', None, ' ', [], float('nan'), 0]
  rows = [{'question': '?', 'answer': answer} for answer in answers]
  prompts = made(rows).prompts('train')
  # Ids are those of the rows: they do not move with what is dropped.
  assert [(p.id, p.answer) for p in prompts] == [('train/0', '2')] + [
    ('train/6', '0')
  ]
  (record,) = caplog.records
  assert record.getMessage() == (
    'sums, train: 5 of 7 rows have no answer and are left out'
  )


def test_only_rows_that_fit_are_asked():
  rows = [
    ROW | {'source': {'name': name}, 'level': level}
    for name, level in [('a', 1), ('b', 1), ('a', 2), ('a', 1)]
  ]
  task = made(rows, only={'source.name': 'a', 'level': 1})
  assert [prompt.id for prompt in task.prompts('train')] == [
    'train/0',
    'train/3',
  ]


def test_unique_rows_are_asked_once():
  rows = [ROW, ROW | {'id': 2}, ROW | {'answer': '3'}, ROW]
  assert len(made(rows).prompts('train')) == 4
  ids = [prompt.id for prompt in made(rows, unique=True).prompts('train')]
  assert ids == ['train/0', 'train/2']


def test_splits_are_sources_of_their_own():
  task = made([ROW], test=Rows([ROW, ROW]))
  assert len(task.prompts('train')) == 1
  assert [prompt.id for prompt in task.prompts('test')] == ['test/0', 'test/1']


@pytest.mark.parametrize(
  'rows, arguments, message',
  [
    ([{'q': '?', 'answer': '2'}], {}, "row 0: no column 'question'; there: q,"),
    (
      [ROW, {'question': '?'}],
      {},
      "row 1: no column 'answer'; there: question",
    ),
    ([ROW], {'answer': 'answer.b'}, "row 0: no column 'answer.b'; there: "),
    ([ROW], {'answer': 'a.b'}, "row 0: no column 'a.b'; there: question, "),
    ([ROW], {'extra': ['level']}, "row 0: no column 'level'; there: "),
    ([ROW], {'only': {'level': 1}}, "row 0: no column 'level'; there: "),
    (
      [{'question': 7, 'answer': '2'}],
      {},
      "row 0: column 'question' is 7, neither text nor messages",
    ),
    (
      [{'question': [], 'answer': '2'}],
      {},
      "row 0: column 'question' is [], neither text nor messages",
    ),
    (
      [{'question': [{'role': 'user'}], 'answer': '2'}],
      {},
      "row 0: column 'question' has {'role': 'user'}, which is no {'role': ",
    ),
    (
      [{'question': CHAT[:3], 'answer': '2'}],
      {},
      "row 0: column 'question' ends with a message of role 'assistant'; a ",
    ),
    (
      [{'question': '?', 'answer': b'2'}],
      {},
      "row 0: column 'answer' is b'2', no JSON",
    ),
    (
      [ROW],
      {'only': {'answer': '3'}},
      "none of 1 rows is as only={'answer': '3'} says; change it",
    ),
    (
      [ROW | {'answer': ''}],
      {},
      "none of 1 rows has an answer in column 'answer'; give another as answer",
    ),
    ([], {}, 'Rows() has no rows; give some'),
  ],
)
def test_bad_rows_are_named_in_one_line(rows, arguments, message):
  with pytest.raises(ValueError) as caught:
    made(rows, **arguments).prompts('train')
  assert str(caught.value).startswith(f'sums, train: {message}')
  assert '\n' not in str(caught.value)


def test_bad_file_is_named_with_task_split_and_line(tmp_path):
  path = tmp_path / 'a.jsonl'
  with pytest.raises(FileNotFoundError, match=f'^sums, train: no file {path};'):
    made([], train=Json(path)).prompts('train')
  path.write_text(f'{json.dumps(ROW)}\n\n{{"answer": "2"}}\n')
  with pytest.raises(
    ValueError, match=f"^sums, train: {path}:3: no column 'question'; there: a"
  ):
    made([], train=Json(path)).prompts('train')
  path.write_text(f'{json.dumps(ROW)}\n{{\n')
  with pytest.raises(ValueError, match=f'^sums, train: {path}:2: Expecting'):
    made([], train=Json(path)).prompts('train')


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'extra': 'level'}, "sums: extra='level'; give a sequence of columns"),
    ({'train': None}, 'sums: neither train nor test; give a source'),
    ({'train': 'a.json'}, "sums: train='a.json'; give Json, Parquet, Tfds or"),
    ({'grader': 'math'}, "sums: grader='math' cannot be called"),
  ],
)
def test_bad_argument_is_named(arguments, message):
  with pytest.raises(ValueError) as caught:
    made([ROW], **arguments)
  assert str(caught.value).startswith(message)


@pytest.mark.parametrize('split', ['test', 'valid'])
def test_split_that_is_not_there_is_named(split):
  with pytest.raises(
    ValueError, match=f"sums: split='{split}'; it has 'train'"
  ):
    made([ROW]).prompts(split)


def test_grader_judges():
  task, prompt = made([ROW], grader=Exact(0.5)), only_prompt(ROW)
  assert task.reward(prompt, Completion(text='2')) == {'reward': 0.5}
  assert task.reward(prompt, Completion(text='3')) == {'reward': 0.0}


def test_what_else_a_grader_can_do_the_task_can():
  plain, able = made([ROW]), made([ROW], grader=Voting())
  assert plain.extract(Completion(text=' 2')) == ' 2'
  assert not hasattr(plain, 'rewards')
  assert able.extract(Completion(text=' 2')) == '2'
  assert able.extract(Completion(text=' ')) is None
  prompt, completion = only_prompt(ROW), Completion(text='2')
  assert able.rewards([prompt] * 2, [completion] * 2) == [4, 4]


def test_task_is_hashable_and_pickled_whatever_its_fields():
  task = made([ROW], only={'answer': '2'}, extra=['answer'], grader=Voting())
  assert isinstance(hash(task), int)
  again = pickle.loads(pickle.dumps(task))
  assert again == task and hash(again) == hash(task)


def verl_row(i, **more):
  return {
    'data_source': 'sums',
    'prompt': [{'content': f'{i}+1?', 'role': 'user'}],
    'ability': 'math',
    'reward_model': {'style': 'rule', 'ground_truth': str(i + 1)},
    'extra_info': {'split': 'train', 'index': i},
  } | more


def test_verl_folder_has_both_splits(tmp_path):
  pa = pytest.importorskip('pyarrow')
  pq = pytest.importorskip('pyarrow.parquet')
  for split, count in (('train', 3), ('test', 2)):
    rows = [verl_row(i) for i in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / f'{split}.parquet')
  task = verl(
    tmp_path, name='v', grader=Exact(), extra=('data_source', 'extra_info')
  )
  prompt = task.prompts('train')[2]
  assert (prompt.text, prompt.answer, prompt.id) == ('2+1?', '3', 'train/2')
  assert prompt.extra == {
    'data_source': 'sums',
    'extra_info': {'split': 'train', 'index': 2},
  }
  assert len(task.prompts('test')) == 2


def test_verl_file_is_the_split_that_is_said(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text(json.dumps([verl_row(1), verl_row(2, data_source='other')]))
  train = verl(path, name='v', grader=Exact(), only={'data_source': 'other'})
  assert train.test is None and len(train.prompts('train')) == 1
  test = verl(path, name='v', grader=Exact(), split='test')
  assert test.train is None and len(test.prompts('test')) == 2
  assert verl('a.parquet', name='v', grader=Exact()).train == Parquet(
    'a.parquet'
  )


def test_published_verl_files_are_read(data):
  pytest.importorskip('pyarrow')
  path = data / 'dapo_eval' / 'aime-2024.parquet'
  rest = {'extra': ('data_source', 'extra_info'), 'split': 'test'}
  task = verl(path, name='aime', grader=Exact(), **rest)
  prompts = task.prompts('test')
  assert len(prompts) == 960
  assert prompts[0].text.startswith('Solve the following math problem step by')
  assert prompts[0].extra['extra_info']['index'] == 2
  # Each is there 32 times, to be sampled once.
  unique = dataclasses.replace(task, unique=True).prompts('test')
  assert len(unique) == 30
  lines = verl(
    data / 'aime24' / 'aime24_30_verl.json',
    name='aime',
    grader=Exact(),
    split='test',
  ).prompts('test')
  raw = {p.extra['extra_info']['raw_problem']: p.answer for p in unique}
  assert raw == {prompt.text: prompt.answer for prompt in lines}


def test_published_gsm8k_solutions_are_answers_as_they_are(data):
  task = Dataset(
    name='g', grader=Exact(), test=Json(data / 'gsm8k' / 'test.jsonl')
  )
  prompts = task.prompts('test')
  assert len(prompts) == 1319
  assert all('####' in prompt.answer for prompt in prompts)


@pytest.mark.parametrize(
  'make, path, split, count, first',
  [
    (math_train, 'math/train_7474_rllm.json', 'train', 7470, '0'),
    (
      math500,
      'math500/test.jsonl',
      'test',
      500,
      r'\left( 3, \frac{\pi}{2} \right)',
    ),
    (amc23, 'amc23/test.jsonl', 'test', 40, '27.0'),
    (aime24, 'aime24/aime24_30_verl.json', 'test', 30, '540'),
    (aime25, 'aime25/aime25_30_verl.json', 'test', 30, '70'),
    (aime24, 'dapo_eval/aime-2024.parquet', 'test', 30, '540'),
  ],
)
def test_published_mathematics_is_read_and_its_answers_are_right(
  data, make, path, split, count, first, caplog
):
  if path.endswith('.parquet'):
    pytest.importorskip('pyarrow')
  task = make(data / path, grader=graders.Boxed(symbolic=False))
  prompts = task.prompts(split)
  assert len(prompts) == count
  assert prompts[0].answer == first
  assert prompts[0].text.endswith(' the final answer within \\boxed{}.')
  dropped = [record.getMessage() for record in caplog.records]
  assert dropped == (
    ['math, train: 4 of 7474 rows have no answer and are left out']
    if make is math_train
    else []
  )
  right = [f'So it is $\\boxed{{{prompt.answer}}}$.' for prompt in prompts]
  rewards = [
    task.reward(prompt, Completion(text=text))
    for prompt, text in zip(prompts, right, strict=True)
  ]
  # The grader takes none that evaluates to thousands of digits.
  assert sum(rewards) >= 0.999 * count
  other = Completion(text='So it is \\boxed{-123454321}.')
  assert task.reward(prompts[0], other) == 0.0


def test_mathematics_takes_the_arguments_of_a_data_set():
  task = math500('a.jsonl', suffix='', name='m', extra=('level',))
  assert (task.suffix, task.name, task.extra) == ('', 'm', ('level',))
  assert task.grader == graders.Boxed()
