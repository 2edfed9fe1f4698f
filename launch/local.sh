#!/usr/bin/env bash
# One run as N processes on this machine, as a pod runs it on N hosts.
#
#   launch/local.sh --processes 2 -- --config configs/quickstart.py \
#     --workdir runs/two
#
# Options:
#   --processes N   2
#   --devices N     virtual CPU devices of each; 1
#   --port P        of the coordinator; one at random
#   --grace S       seconds that the others may take once one has failed; 60
#   --logs FOLDER   process 0 writes to the console, the others there
#   --python PATH   python
#   --dry_run       print every command, do none
# After -- come the trainer's arguments.
#
# --coordinator, --processes and --process tell jax.distributed.initialize()
# what it finds out by itself on TPU VMs and on GKE: pass them nowhere else.
# Ctrl-C and SIGTERM reach every process; all save, and this ends with 75.
# Ends with 2 if a process did, else as the first that failed.
set -euo pipefail

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; }
refuse() { echo "error: $*" >&2; exit 2; }

processes=2 devices=1 port=$((20000 + RANDOM % 20000)) grace=60 dry_run=0
python=python logs=${TMPDIR:-/tmp}/jax_rlvr.$$
trainer=()
while [ $# -gt 0 ]; do
  case $1 in
    --processes | --devices | --port | --grace | --logs | --python)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --dry_run) dry_run=1 ;;
    --) shift; trainer=("$@"); break ;;
    *) usage; exit 2 ;;
  esac
  shift
done
[ ${#trainer[@]} -gt 0 ] || { usage; exit 2; }

# Prints a command in a dry run, else carries it out.
run() {
  if [ "$dry_run" = 0 ]; then "$@"; else echo "${*@Q}"; fi
}

process() { # its number
  # exec, for signals and the exit code to be the trainer's.
  [ "$dry_run" = 1 ] || set -- "$1" exec
  run "${@:2}" env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" \
    "XLA_FLAGS=${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices" \
    "$python" -m jax_rlvr.train "${trainer[@]}" \
    --coordinator "127.0.0.1:$port" --processes "$processes" --process "$1"
}

if [ "$dry_run" = 1 ]; then
  for ((i = 0; i < processes; i++)); do process "$i"; done
  exit
fi

mkdir -p "$logs"
echo "processes 1 … write to $logs"
pids=()
for ((i = 0; i < processes; i++)); do
  if [ "$i" = 0 ]; then process 0 & else process "$i" > "$logs/$i.log" 2>&1 & fi
  pids+=($!)
done
tell() { kill "-$1" "${pids[@]}" 2> /dev/null || true; }
trap 'tell TERM' TERM INT

# Who waits in a collective for one that has gone may wait for good.
first=0 since=0 codes=()
while [ ${#pids[@]} -gt 0 ]; do
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then alive+=("$pid"); continue; fi
    code=0
    wait "$pid" || code=$?
    codes+=("$code")
    if [ "$first" = 0 ] && [ "$code" != 0 ]; then
      first=$code since=$SECONDS
    fi
  done
  pids=("${alive[@]}")
  if [ "$first" != 0 ] && [ $((SECONDS - since)) -ge "$grace" ]; then
    tell KILL
  fi
  sleep 0.2 || true
done
echo "exit codes, as they came: ${codes[*]}"
case " ${codes[*]} " in *' 2 '*) exit 2 ;; esac
exit "$first"
