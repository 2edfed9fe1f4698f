"""Programs graded by their tests; how they are run is test_sandbox's."""

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import graders, sandbox
from jax_rlvr.tasks.graders.code import last_block, same_output

SUMS = [
  {'input': '1 2\n', 'output': '3\n'},
  {'input': '5 -5\n', 'output': '0\n'},
  {'input': '10 20\n', 'output': '30\n'},
]
SUM = 'a, b = map(int, input().split())\nprint(a + b)'


def grade(program, tests=SUMS, **arguments):
  # Machines without namespaces run these too: they do nothing.
  grader = graders.Code(
    timeout_s=60.0, budget_s=120.0, allow_unsandboxed_code=True, **arguments
  )
  prompt = Prompt(messages=user(''), answer='', extra={'tests': tests})
  return grader(prompt, Completion(text=f'So:\n```python\n{program}\n```\n'))


def test_code_accepts_a_program_that_passes():
  assert grade(SUM) == 1


@pytest.mark.parametrize(
  'program',
  [
    'print(3)',
    'print(',
    '1 / 0',
    f'{SUM}\nimport sys; sys.exit(1)',
    f'{SUM}\nprint()\nprint("more")',
    'import numpy; print(3)',
    '',
  ],
)
def test_code_accepts_no_other(program):
  assert grade(program) == 0


def test_code_gives_part_of_the_reward_where_told():
  assert grade('print(3)', partial=True) == {'reward': 1 / 3, 'outcome': 0}
  assert grade(SUM, partial=True) == {'reward': 1, 'outcome': 1}


def test_code_needs_tests():
  for tests in (None, [], [{'input': '1'}], [{'input': 1, 'output': '1'}]):
    with pytest.raises(ValueError, match="no 'tests'"):
      grade(SUM, tests)


def test_code_without_a_block_is_wrong():
  prompt = Prompt(messages=user(''), answer='', extra={'tests': SUMS})
  grader = graders.Code(allow_unsandboxed_code=True)
  assert grader(prompt, Completion(text=SUM)) == 0


def test_code_is_refused_without_isolation(monkeypatch):
  monkeypatch.setattr(sandbox, 'isolation', lambda: 'unshare: not permitted')
  grader = graders.Code()
  with pytest.raises(ValueError, match='not permitted.*allow_unsandboxed_code'):
    grader.require()
  prompt = Prompt(messages=user(''), answer='', extra={'tests': SUMS})
  with pytest.raises(ValueError, match='cannot be isolated'):
    grader(prompt, Completion(text=SUM))
  graders.Code(allow_unsandboxed_code=True).require()


def test_refusal_names_reason_and_remedy(monkeypatch):
  monkeypatch.setattr(sandbox, 'isolation', lambda: 'unshare: not permitted')
  with pytest.raises(ValueError) as refusal:
    sandbox.require_isolation()
  text = str(refusal.value)
  assert 'unshare: not permitted' in text
  assert 'allow_unsandboxed_code=True' in text
  assert '\n' not in text


def test_what_fails_before_the_program_is_no_result(monkeypatch, tmp_path):
  broken = tmp_path / 'launcher.py'
  broken.write_text('raise OSError("unshare: not permitted")')
  monkeypatch.setattr(sandbox, '_LAUNCHER', broken)
  with pytest.raises(RuntimeError, match='unshare: not permitted'):
    sandbox.run('print(1)')


def test_code_checks_its_arguments():
  for arguments in ({'timeout_s': 0}, {'memory_mb': -1}, {'budget_s': 1e999}):
    with pytest.raises(ValueError, match='give a number above 0'):
      graders.Code(**arguments)
  with pytest.raises(ValueError, match='float_tolerance'):
    graders.Code(float_tolerance=-1)


@pytest.mark.parametrize(
  'text, program',
  [
    ('```python\n1\n```', '1\n'),
    ('```py\n1\n```', '1\n'),
    ('```Python\n1\n```\n```python\n2\n```', '2\n'),
    ('```python\n1\n```\n```\noutput\n```', '1\n'),
    ('```python\n1\n```\n```bash\nls\n```', '1\n'),
    ('```python\n1\n```\n```python\n2', '1\n'),
    ('  ```python\n  1\n  ```', '  1\n'),
    ('```python\n```', '\n'),
    ('```\n1\n```', None),
    ('```python\n1', None),
    ('print(1)', None),
    ('', None),
  ],
)
def test_last_block_is_the_last_closed_one(text, program):
  assert last_block(text) == program


@pytest.mark.parametrize(
  'found, expected, tolerance, same',
  [
    ('1 2\n3', '1 2\n3\n', None, True),
    ('1  2 \n3\n\n', '1 2\n3', None, True),
    ('1 2\r\n3', '1 2\n3', None, True),
    ('1 2 3', '1 2\n3', None, False),
    ('12', '1 2', None, False),
    ('1\n\n2', '1\n2', None, False),
    ('', '0', None, False),
    ('0.1', '0.10', None, False),
    ('0.1', '0.10', 1e-6, True),
    ('0.1000001', '0.1', 1e-6, True),
    ('0.101', '0.1', 1e-6, False),
    ('1e-9', '0.0', 1e-6, True),
    ('nan', '0.5', 1e-6, False),
    ('nan', 'nan', 1e-6, True),
    ('inf', '0.5', 1e-6, False),
    ('1_0.0', '10.0', 1e-6, False),
    ('٣', '3.0', 1e-6, False),
    ('1000000001', '1000000000', 1e-6, False),
    ('1.0 a', '1.0 b', 1e-6, False),
  ],
)
def test_same_output_compares_words_and_lines(found, expected, tolerance, same):
  assert same_output(found, expected, tolerance) is same
