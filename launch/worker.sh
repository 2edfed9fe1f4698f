#!/usr/bin/env bash
# What tpu_vm.sh has each host of a slice do, in the copy of the repository there.
#
#   launch/worker.sh install
#   launch/worker.sh start --config configs/x.py --workdir gs://bucket/run
#   launch/worker.sh state   prints state=running, state=CODE (it has ended so),
#                            or state=gone (never begun, or the host restarted)
#   launch/worker.sh tail | stop
#   launch/worker.sh --dry_run …   prints the commands only
#
# The trainer needs no --coordinator, --processes and --process here: on a TPU
# VM jax.distributed.initialize() learns them from the machine.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; }

dry_run=0
if [ "${1:-}" = --dry_run ]; then dry_run=1; shift; fi
venv=${VENV:-.venv}
log=runs/train.log pid=runs/train.pid code=runs/train.code

# Prints a command in a dry run, else carries it out.
run() {
  if [ "$dry_run" = 0 ]; then "$@"; else echo "${*@Q}"; fi
}

install() {
  # The images have Python 3.10 and JAX wants a later one: uv brings its own.
  run python3 -m pip install --quiet --user uv
  run python3 -m uv venv --quiet --seed --allow-existing --python 3.12 "$venv"
  run "$venv/bin/pip" install --quiet -e '.[tpu]' \
    -f https://storage.googleapis.com/jax-releases/libtpu_releases.html
}

running() {
  [ -f "$pid" ] && [[ $(ps -ww -o args= -p "$(<"$pid")") == *jax_rlvr.train* ]]
}

state() {
  if running; then echo state=running
  elif [ -f "$code" ]; then echo "state=$(<"$code")"
  else echo state=gone
  fi
}

# The shell around the trainer outlives a SIGTERM to tell how the trainer ended.
# shellcheck disable=SC2016  # expanded there
around='trap : TERM; "${@:2}"; echo $? > "$1.new"; mv "$1.new" "$1"'

start() {
  if running; then echo 'it is running'; return; fi
  local trainer=("$venv/bin/python" -m jax_rlvr.train "$@")
  if [ "$dry_run" = 1 ]; then
    echo "nohup ${trainer[*]@Q} >> $log 2>&1 &"
    return
  fi
  mkdir -p runs
  rm -f "$code"
  nohup bash -c "$around" around "$code" "${trainer[@]}" \
    >> "$log" 2>&1 < /dev/null &
  echo $! > "$pid"
}

# SIGTERM to the trainer, which saves and leaves with 75.
stop() {
  if ! running; then echo 'it is not running'; return; fi
  run pkill -TERM -P "$(<"$pid")"
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
  install | state | start | stop) "$command" "$@" ;;
  tail) run tail -n 50 -F "$log" ;;
  *) usage; exit 2 ;;
esac
