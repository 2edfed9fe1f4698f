"""What a program can do in there, and that nothing of it is left."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from jax_rlvr.tasks import sandbox

LONG = 60.0


@pytest.fixture
def isolated():
  if reason := sandbox.isolation():
    pytest.skip(f'programs cannot be isolated here: {reason}')


@pytest.fixture(params=[True, False], ids=['isolated', 'limits only'])
def run(request):
  if request.param:
    request.getfixturevalue('isolated')

  def run(source, stdin='', **arguments):
    arguments = {'timeout_s': LONG, **arguments}
    return sandbox.run(source, stdin, isolated=request.param, **arguments)

  return run


def test_a_program_reads_and_prints(run):
  result = run('print(input()[::-1]); print("é")', 'abc\n')
  assert result == ('cba\né\n', '', 0)


def test_a_program_is_a_script_of_its_own(run):
  result = run(
    'import pickle\n'
    'class C: pass\n'
    'pickle.loads(pickle.dumps(C()))\n'
    'print(__name__)\n'
    'try: sys\n'
    'except NameError: print("clean")\n'
    'import os\n'
    'print(*sorted(os.environ))\n'
    'print(sorted(os.listdir()))\n'
    'exit()\n'
  )
  name, clean, environment, folder = result.output.splitlines()
  assert (name, clean) == ('__main__', 'clean')
  assert set(environment.split()) <= {'LC_CTYPE'}  # the interpreter's own
  assert 'main.py' in folder
  assert result.code == 0


def test_installed_packages_are_not_there(run):
  assert 'ModuleNotFoundError' in run('import pytest').errors


def test_exit_codes_come_back(run):
  assert run('import sys; sys.exit(3)').code == 3
  assert run('1 / 0').code == 1
  assert 'ZeroDivisionError' in run('1 / 0').errors
  assert run('import os; os._exit(124)').code == 124


def test_a_crash_has_the_code_of_its_signal(run):
  assert run('import ctypes; ctypes.string_at(0)').code == 128 + 11
  assert run('import os; os.abort()').code == 128 + 6
  assert run('import os; os.kill(os.getpid(), 9)').code == 128 + 9


def test_standard_input_ends(run):
  assert 'EOFError' in run('input()').errors
  result = run('import sys; print(len(sys.stdin.read()))', 'x' * 10**6)
  assert result.output == '1000000\n'


def test_a_loop_ends_at_the_deadline(run):
  assert run('while True: pass', timeout_s=1.0).code is None
  assert run('import time; time.sleep(1000)', timeout_s=1.0).code is None


def test_output_is_cut(run):
  result = run('for _ in range(100): print("x" * 10**6)', output_bytes=10**5)
  assert len(result.output) == 10**5
  assert result.code != 0


def test_memory_is_limited(run):
  result = run('x = bytearray(4 << 30)', memory_mb=256)
  assert 'MemoryError' in result.errors
  assert result.code == 1


def test_files_are_limited(run):
  result = run(
    'import os\n'
    'try:\n'
    '  for i in range(1000): os.open("main.py", os.O_RDONLY)\n'
    'except OSError: print("no more")\n'
  )
  assert result.output == 'no more\n'


def test_odd_sources_do_no_harm(run):
  for source in ('\0', '\ud800', '(' * 10_000, 'print(' + '9' * 10**5 + ')'):
    assert run(source).code != 0


def test_descendants_end_with_the_program(run):
  # They would keep the pipe open, were there one, and the folder.
  result = run(
    'import os, time\n'
    'if os.fork() == 0: time.sleep(1000)\n'
    'print(os.getpid(), flush=True)\n'
  )
  assert result.code == 0


FORKS = (
  'import os, time\n'
  'n = 0\n'
  'try:\n'
  '  while n < 5000:\n'
  '    if os.fork() == 0: time.sleep(1000)\n'
  '    n += 1\n'
  'except OSError: print("no more", n < 40)\n'
)


def test_processes_are_limited_and_all_end(isolated):
  if sys.platform == 'linux' and _kernel() < (5, 14) and os.geteuid():
    pytest.skip('this kernel counts all processes of a user')
  before = _processes()
  assert sandbox.run(FORKS, timeout_s=LONG).output == 'no more True\n'
  bomb = 'import os\nwhile True:\n  try: os.fork()\n  except OSError: pass\n'
  assert sandbox.run(bomb, timeout_s=1.0).code is None
  assert not _since(before, 'main.py')


def test_who_leaves_the_group_ends_too(isolated):
  before = _processes()
  result = sandbox.run(
    'import os, time\n'
    'for _ in range(3):\n'
    '  if os.fork() == 0:\n'
    '    os.setsid()\n'
    '    if os.fork() == 0: time.sleep(1000)\n'
    '    os._exit(0)\n'
    'time.sleep(1000)\n',
    timeout_s=1.0,
  )
  assert result.code is None
  assert not _since(before, 'main.py')


def test_it_ends_with_who_runs_it(isolated):
  before = _processes()
  code = (
    'from jax_rlvr.tasks import sandbox\n'
    "print('ready', flush=True)\n"
    "sandbox.run('import time; time.sleep(1000)', timeout_s=1000.0)\n"
  )
  runner = subprocess.Popen(
    [sys.executable, '-c', code],
    stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  with runner:
    runner.stdout.readline()
    while not _since(before, 'main.py', wait_s=0.0):
      time.sleep(0.01)
    runner.kill()
  assert not _since(before, 'main.py')


def test_threads_run(isolated):
  result = sandbox.run(
    'import threading\n'
    'threading.stack_size(1 << 27)\n'
    't = threading.Thread(target=print, args=("in a thread",))\n'
    't.start(); t.join()\n',
    timeout_s=LONG,
  )
  assert result.output == 'in a thread\n'


def test_no_file_of_ours_is_seen(isolated):
  result = sandbox.run(
    'import os\n'
    f'print([p for p in {["/etc/passwd", __file__, os.getcwd()]!r}\n'
    '       if os.path.exists(p)])\n'
    'print(os.path.exists("/proc/1"), os.listdir())\n',
    timeout_s=LONG,
  )
  assert result.output == "[]\nFalse ['main.py']\n"


def test_only_the_working_folder_can_be_written(isolated):
  result = sandbox.run(
    'import errno\n'
    'open("here", "w").write("1")\n'
    'for folder in ("/", "/usr", "/usr/lib", "/dev", "/etc", "/tmp"):\n'
    '  try: open(folder + "/jax_rlvr_was_here", "w")\n'
    '  except OSError as error:\n'
    # Not merely for want of permission: the files may be of our own user.
    '    if error.errno not in (errno.EROFS, errno.ENOENT): print(error)\n'
    '  else: print(folder)\n',
    timeout_s=LONG,
  )
  assert result == ('', '', 0)


def test_the_working_folder_is_limited(isolated):
  result = sandbox.run(
    'for i in range(100): open(str(i), "wb").write(bytes(1 << 20))',
    timeout_s=LONG,
  )
  assert 'No space left' in result.errors


def test_there_is_no_network(isolated):
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    connect = (
      'import socket\n'
      f'socket.create_connection(("127.0.0.1", {port}), timeout=10)\n'
      'print("connected")\n'
    )
    # The control: it is there for those who are not isolated.
    outside = sandbox.run(connect, timeout_s=LONG, isolated=False)
    assert outside.output == 'connected\n'
    inside = sandbox.run(connect, timeout_s=LONG)
  assert inside.output == ''
  assert 'OSError' in inside.errors


def test_there_are_no_privileges(isolated):
  result = sandbox.run(
    'import os, ctypes\n'
    'libc = ctypes.CDLL(None, use_errno=True)\n'
    'print(os.getuid() and os.geteuid() and os.getgid() and 1)\n'
    'print(libc.mount(b"tmpfs", b"/sandbox", b"tmpfs", 0, None))\n'
    'print(libc.sethostname(b"x", 1))\n'
    'try: os.setuid(0)\n'
    'except OSError: print("no")\n',
    timeout_s=LONG,
  )
  assert result.output == '1\n-1\n-1\nno\n'


def test_init_cannot_be_ended_from_within(isolated):
  result = sandbox.run(
    'import os, signal, time\n'
    'for number in set(signal.Signals) - {signal.SIGSTOP}:\n'
    '  try: os.kill(1, number)\n'
    '  except OSError: pass\n'
    'time.sleep(0.2)\n'
    'print("here")\n',
    timeout_s=LONG,
  )
  assert result == ('here\n', '', 0)


def test_nothing_is_left_of_the_folder(run, monkeypatch, tmp_path):
  monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
  run('import os; os.mkdir("a"); open("a/b", "w").write("1")')
  assert not list(tmp_path.iterdir())


def _kernel() -> tuple[int, ...]:
  return tuple(map(int, os.uname().release.split('-')[0].split('.')[:2]))


def _processes() -> set[str]:
  return {path.name for path in pathlib.Path('/proc').glob('[0-9]*')}


def _since(before: set[str], word: str, wait_s: float = 10.0) -> list[str]:
  """Command lines of processes since, once they had time to be taken away."""
  end = time.monotonic() + wait_s
  while True:
    found = []
    for pid in _processes() - before:
      try:
        line = pathlib.Path('/proc', pid, 'cmdline').read_text()
      except OSError:
        continue
      if word in line:
        found.append(line)
    if not found or time.monotonic() >= end:
      return found
    time.sleep(0.1)
