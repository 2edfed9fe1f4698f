#!/usr/bin/env bash
#SBATCH --job-name=jax_rlvr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jax_rlvr-%j.log
#SBATCH --signal=TERM@180
# One run on the nodes of a Slurm job, one process a node.
#
#   launch/slurm.sh --partition=gpu --gpus-per-node=8 --time=24:00:00 \
#     -- --config configs/x.py --workdir /shared/runs/x
#
# submits itself; what stands before -- goes to sbatch, after it to the trainer.
# --dry_run first prints every command and does none. PYTHON=… names another
# python than .venv/bin/python, GRACE_S=… the seconds that the others may take
# once a process has ended (120).
#
# Three minutes before the time limit, and at a preemption, Slurm sends SIGTERM:
# the trainer saves and leaves with 75, and the job is queued again. 2 is bad
# input and not tried again; nor are crashes. --workdir is a folder that all
# nodes share, or gs://….
#
# --coordinator, --processes and --process tell jax.distributed.initialize()
# where the processes are. (TPU VMs and GKE need none of them.)
#
# Not tried on a Slurm cluster yet; the tests have a stand-in for its commands.
set -euo pipefail

usage() { sed -n '10,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; }

dry_run=0
if [ "${1:-}" = --dry_run ]; then dry_run=1; shift; fi
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -gt 1 ] || { usage; exit 2; }
trainer=("${@:2}")

# Prints a command in a dry run, else carries it out.
run() {
  if [ "$dry_run" = 0 ]; then "$@"; else echo "${*@Q}"; fi
}

# Each task knows its number and theirs; the first node coordinates.
# shellcheck disable=SC2016  # expanded there
task='exec "$@" --processes "$SLURM_NTASKS" --process "$SLURM_PROCID"'

train() {
  local nodes=first_node port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
  if [ "$dry_run" = 0 ]; then
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  fi
  # The code is the tasks' highest. --wait: who waits in a collective for one
  # that has gone may wait for good.
  run srun --kill-on-bad-exit=0 "--wait=${GRACE_S:-120}" bash -c "$task" task \
    "${PYTHON:-.venv/bin/python}" -m jax_rlvr.train "${trainer[@]}" \
    --coordinator "${nodes%%$'\n'*}:$port"
}

if [ "$dry_run" = 1 ]; then
  run sbatch "${options[@]}" "$0" -- "${trainer[@]}"
  train
  echo '# after exit code 75:'
  run scontrol requeue "${SLURM_JOB_ID:-JOB}"
elif [ -z "${SLURM_JOB_ID:-}" ]; then
  run sbatch "${options[@]}" "$0" -- "${trainer[@]}"
else
  code=0
  train || code=$?
  if [ "$code" = 75 ]; then run scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$code"
fi
