#!/usr/bin/env bash
# For the first person with a TPU: does it work there? A report to paste.
#
#   launch/smoke.sh
#
# On a slice of one host (v4-8, v5litepod-8, v5p-8, v6e-8), in this repository,
# after pip install -e '.[tpu]'. From afar: launch/tpu_vm.sh create, copy and
# install, and launch/smoke.sh on the host. It runs
#
#   quickstart   as in the README, in bfloat16, and its evaluation
#   splash, xla  20 steps with each attention: mismatch/… of their metrics says
#                how near the sampler's log-probabilities are to the trainer's
#   attention    outputs and gradients of both against float32
#
# and prints report.md. It ends with 0 where all is well, else with 1.
#
# Options:
#   --out FOLDER    runs/smoke; a second call goes on from what is there
#   --python PATH   .venv/bin/python
#   --dry_run       print every command, do none
#
# Not run on a TPU yet: that is what it is for. The bounds come from CPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; }

out=runs/smoke python=.venv/bin/python dry_run=0
while [ $# -gt 0 ]; do
  case $1 in
    --out | --python)
      [ $# -ge 2 ] || { usage; exit 2; }
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --dry_run) dry_run=1 ;;
    *) usage; exit 2 ;;
  esac
  shift
done

# Prints a command in a dry run, else carries it out.
run() {
  if [ "$dry_run" = 0 ]; then "$@"; else echo "${*@Q}"; fi
}

# step NAME COMMAND…: its log, exit code and seconds, for the report.
step() {
  local name=$1 code=0 since=$SECONDS
  shift
  if [ "$dry_run" = 1 ]; then run "$@"; return; fi
  echo "$name …"
  "$@" > "$out/$name.log" 2>&1 || code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - since)) >> "$out/steps.tsv"
}

train() { # name, settings
  step "$1" "$python" -m jax_rlvr.train --workdir "$out/$1" \
    --config "configs/quickstart.py:compute_dtype='bfloat16'$2"
}

run mkdir -p "$out"
run rm -f "$out/steps.tsv"
train quickstart ''
step evaluate "$python" -m jax_rlvr.evaluate --workdir "$out/quickstart" \
  --samples 8 --json "$out/evaluate.json"
train splash ",attention='splash',steps=20,eval_prompts=64"
train xla ",attention='xla',steps=20,eval_prompts=64"
step attention "$python" launch/smoke.py attention --out "$out"
run "$python" launch/smoke.py report --out "$out"
