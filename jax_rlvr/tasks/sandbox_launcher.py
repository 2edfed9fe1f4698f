"""The script that walls a program in; `jax_rlvr.tasks.sandbox` runs it.

The processes are
  launcher  makes new namespaces and mounts; keeps the deadline
  └ init    process 1 in there: when it ends, the kernel kills all others
    └ main  the program, without privileges
and without namespaces only the first and the last. In the working folder it
finds main.py and input, and leaves output and errors; it prints the exit code.

Linux: namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2). The
steps are those of bubblewrap, https://github.com/containers/bubblewrap.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys

# Both count threads too. For who is not root, kernels before 5.14 count all
# that the user runs, as they do without namespaces; else only what is in there.
_PROCESSES = 32
_PROCESSES_OF_USER = 4096
_OPEN_FILES = 64
_FOLDER = 'size=64m,nr_inodes=4096'

# What an interpreter may need besides its own folder.
_SYSTEM = ('/usr', '/lib', '/lib32', '/lib64', '/bin', '/nix/store')
_FILES = ('/etc/ld.so.cache', '/dev/null', '/dev/zero', '/dev/urandom')
_HOME = '/sandbox'

# `-S` keeps installed packages out, but `exit` and `quit` too.
_START = (
  "__builtins__.exit = __builtins__.quit = __import__('sys').exit; "
  "exec(compile(open('main.py', 'rb').read(), 'main.py', 'exec'))"
)

# From <sched.h>: users; then mounts, IPC, host name, processes and network.
_NEW_USER = 0x10000000
_NEW_OTHERS = 0x00020000 | 0x08000000 | 0x04000000 | 0x20000000 | 0x40000000
# From <sys/mount.h>, <sys/prctl.h>, <linux/mount.h> and <fcntl.h>.
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _DUMPABLE, _NO_NEW_PRIVS = 1, 4, 38
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


def launch(
  parent: int, isolated: bool, timeout_s: float, memory: int, output: int
) -> None:
  """Runs main.py and prints how it ended, as JSON.

  Args:
    parent: id of the process to leave with.
    isolated: in namespaces.
    timeout_s: seconds until all is killed.
    memory: bytes of address space for each process.
    output: bytes for each file.
  """
  os.umask(0o022)
  # Python's handler would let main end init.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
  with open('main.py', 'rb') as file:
    source = file.read()
  files = [os.open('input', os.O_RDONLY)]
  files += [os.open(name, write, 0o600) for name in ('output', 'errors')]
  # A user without files, and hardly one that runs anything else.
  user = 10_000 + os.getpid() % 50_000
  if isolated:
    enter_namespaces(user)
    hide_files([*_SYSTEM, os.path.realpath(sys.base_prefix), *_FILES])
    with open('main.py', 'wb') as file:
      file.write(source)
  end_with_parent()  # only here: another user's process forgets it
  if os.getppid() != parent:
    return
  child = os.fork()
  if not child:
    if isolated:
      be_init()
    be_main(files, isolated, user, math.ceil(timeout_s) + 1, memory, output)
  late = False

  def end(*_):
    nonlocal late
    late = True
    if isolated:
      os.kill(child, signal.SIGKILL)
    else:
      kill_group(child)

  signal.signal(signal.SIGALRM, end)
  signal.setitimer(signal.ITIMER_REAL, timeout_s)
  _, status = os.waitpid(child, 0)
  signal.setitimer(signal.ITIMER_REAL, 0)
  if not isolated:
    kill_group(child)  # what it left running
  print(json.dumps({'code': None if late else exit_code(status)}))


def enter_namespaces(user: int) -> None:
  """Unshares all; as `user` where we are a root who may not."""
  if not os.geteuid():
    if not _libc.unshare(_NEW_OTHERS):
      return
    try:
      become(user)
    except OSError as error:
      what = f'root may neither unshare nor become another: {error.strerror}'
      raise OSError(error.errno, what) from error
    _libc.prctl(_DUMPABLE, 1, 0, 0, 0)  # else its /proc/self is root's
  uid, gid = os.geteuid(), os.getegid()
  check(_libc.unshare(_NEW_USER | _NEW_OTHERS), 'unshare')
  for name, line in (
    ('setgroups', 'deny'),
    # Not 0: any other user loses its capabilities when main is executed.
    ('uid_map', f'{user} {uid} 1'),
    ('gid_map', f'{user} {gid} 1'),
  ):
    with open(f'/proc/self/{name}', 'w') as file:
      file.write(line)


def hide_files(paths: list[str]) -> None:
  """Leaves nothing but `paths`, read-only, and an empty working folder."""
  # The new root has to be mounted on something that is there, that any user
  # reaches and that does not hide one of the paths.
  root = '/proc'
  mount(None, '/', None, _REC | _PRIVATE)
  mount('tmpfs', root, 'tmpfs', _NOSUID | _NODEV, f'{_FOLDER},mode=755')
  shown = []
  for path in filter(os.path.exists, paths):
    if any(os.path.commonpath([path, other]) == other for other in shown):
      continue
    shown.append(path)
    inside = root + path
    if os.path.isdir(path):
      os.makedirs(inside)
    else:
      os.makedirs(os.path.dirname(inside), exist_ok=True)
      os.close(os.open(inside, os.O_CREAT))
    mount(path, inside, None, _BIND | _REC)
  os.mkdir(root + _HOME)
  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd. Unlike a
  # remount it reaches mounts below and may leave their own flags alone.
  attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
  size = ctypes.c_size_t(ctypes.sizeof(attributes))
  where = (_AT_FDCWD, root.encode(), _AT_RECURSIVE)
  check(
    _libc.syscall(_MOUNT_SETATTR, *where, attributes, size), 'mount_setattr'
  )
  mount(
    'tmpfs', root + _HOME, 'tmpfs', _NOSUID | _NODEV, f'{_FOLDER},mode=1777'
  )
  os.chdir(root)
  check(_libc.pivot_root(b'.', b'.'), 'pivot_root')
  check(_libc.umount2(b'.', _DETACH), 'umount')
  os.chdir(_HOME)


def mount(
  what: str | None,
  where: str,
  kind: str | None,
  flags: int,
  options: str | None = None,
) -> None:
  """The system call, which takes None for what does not apply."""
  texts = [text and text.encode() for text in (what, where, kind)]
  data = options and options.encode()
  done = _libc.mount(*texts, ctypes.c_ulong(flags), data)
  check(done, f'mount {what or ""} on {where}')


def be_init() -> None:
  """Returns in a child; itself ends with the child, and all others with it."""
  end_with_parent()
  main = os.fork()
  if not main:
    return
  while True:
    pid, status = os.wait()
    if pid == main:
      os._exit(exit_code(status))


def be_main(
  files: list[int],
  isolated: bool,
  user: int,
  seconds: int,
  memory: int,
  output: int,
) -> None:
  """Becomes the program, with `files` as standard streams."""
  launcher = os.dup(1)
  try:
    end_with_parent()
    os.setsid()
    for number, file in enumerate(files):
      os.dup2(file, number)
    for kind, limit in (
      (resource.RLIMIT_CPU, seconds),
      (resource.RLIMIT_AS, memory),
      (resource.RLIMIT_FSIZE, output),
      (resource.RLIMIT_NOFILE, _OPEN_FILES),
      (resource.RLIMIT_NPROC, _PROCESSES if isolated else _PROCESSES_OF_USER),
      (resource.RLIMIT_CORE, 0),
    ):
      hard = resource.getrlimit(kind)[1]
      if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
      resource.setrlimit(kind, (limit, limit))
    if isolated and not os.geteuid():
      become(user)
    if sys.platform == 'linux':
      _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    options = ['-I', '-S', '-X', 'utf8', '-c', _START]
    os.execve(sys.executable, [sys.executable, *options], {})
  except BaseException as error:
    os.write(launcher, f'{type(error).__name__}: {error}\n'.encode())
  finally:
    os._exit(1)


def become(user: int) -> None:
  """Gives up root for good."""
  os.setgroups([])
  os.setresgid(user, user, user)
  os.setresuid(user, user, user)


def end_with_parent() -> None:
  if sys.platform == 'linux':
    _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def kill_group(group: int) -> None:
  try:
    os.killpg(group, signal.SIGKILL)
  except (ProcessLookupError, PermissionError):
    pass


def exit_code(status: int) -> int:
  code = os.waitstatus_to_exitcode(status)
  return code if code >= 0 else 128 - code


def check(done: int, what: str) -> None:
  """Raises OSError where a call of the C library failed."""
  if done:
    error = ctypes.get_errno()
    raise OSError(error, f'{what}: {os.strerror(error)}')


if __name__ == '__main__':
  launch(**json.loads(sys.argv[1]))
