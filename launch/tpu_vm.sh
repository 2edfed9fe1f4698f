#!/usr/bin/env bash
# A run on a TPU slice of one host or many, from your own machine.
#
#   launch/tpu_vm.sh up --name pod --zone us-west4-a --type v5litepod-16 --spot \
#     -- --config configs/qwen2_5_7b_clip_cov.py --workdir gs://bucket/run
#   launch/tpu_vm.sh watch …the same…
#
# Commands:
#   up       create (or reuse) the slice, copy this repository, install, run
#   watch    up, and then stay: after a preemption make the slice again and go
#            on; end with the run's exit code
#   create, copy, install, run    one part of up
#   tail     follow the log of a host (--worker 0)
#   status   of the slice, and of the run on each host
#   stop     save and leave the run; the slice stays, and costs
#   delete   the slice
#
# Options:
#   --name NAME  --zone ZONE  [--project PROJECT]
#   --type TYPE       v4-32, v5litepod-16, v5p-32, v6e-16 …
#   --runtime NAME    of the machine image, if not the usual one of the chip
#   --spot            cheaper, and may be taken away
#   --direct          ask once, now; else the request waits in the queue
#   --worker N        whose log to follow
#   --dry_run         print every command, do none; as if there were no slice
# After -- come the trainer's arguments. --workdir is gs://… (Orbax and epath
# write there), or an absolute path of a mount that all hosts share.
#
# Exit codes of the run: 0 done; 2 bad input, not tried again; 75 preempted and
# saved, run again. Needs gcloud and bash 4.4. Of several slices: see gke/.
#
# Not tried on Google Cloud yet. The commands pass gcloud's own linter, and the
# tests play a preemption with a stand-in for gcloud.
set -euo pipefail
shopt -s inherit_errexit # in $(…), too

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; }
say() { echo "# $*" >&3; }
refuse() { echo "error: $*" >&2; exit 2; }

exec 3>&1 # what is shown, from within $(…) too
root=$(cd "$(dirname "$0")/.." && pwd)
poll=${POLL_S:-30}
name='' zone='' project='' type='' runtime='' spot=0 direct=0 worker=0 dry_run=0
trainer=()

command=${1:-}
[ $# = 0 ] || shift
while [ $# -gt 0 ]; do
  case $1 in
    --name | --zone | --project | --type | --runtime | --worker)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --spot | --direct | --dry_run) printf -v "${1#--}" 1 ;;
    --) shift; trainer=("$@"); break ;;
    *) refuse "unknown option $1; -- comes before the trainer's arguments" ;;
  esac
  shift
done

# Prints a command in a dry run, else carries it out.
run() {
  if [ "$dry_run" = 0 ]; then "$@"; else quoted "$@" >&3; fi
}

quoted() {
  local word words=()
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@,+%-]*) words+=("${word@Q}") ;;
      *) words+=("$word") ;;
    esac
  done
  echo "${words[*]}"
}

# tpus GROUP VERB NAME…: gcloud, in the zone and project.
tpus() {
  local where=("--zone=$zone")
  [ -z "$project" ] || where+=("--project=$project")
  run gcloud compute tpus "$@" "${where[@]}" --quiet
}

on_hosts() { # which hosts, command
  tpus tpu-vm ssh "$name" "--worker=$1" "--command=cd jax_rlvr && $2"
}

runtime_of_type() {
  case $type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) refuse "no usual runtime for --type '$type'; name one with --runtime" ;;
  esac
}

found() { # group, field of the state
  tpus "$1" list "--format=csv[no-heading](name.basename(),$2)" |
    awk -F, -v name="$name" '$1 == name { print $2 }'
}

# One word: none, waiting, ready, lost, failed, or unknown if none can say.
slice_state() {
  local state=ACTIVE
  if [ "$direct" = 0 ]; then
    state=$(found queued-resources state.state) || { echo unknown; return; }
  fi
  if [ "$state" = ACTIVE ]; then
    state=$(found tpu-vm state) || { echo unknown; return; }
    # Active, and no machine yet or no more: time will tell.
    [ -n "$state" ] || [ "$direct" = 1 ] || state=PROVISIONING
  fi
  case $state in
    '') echo none ;;
    READY) echo ready ;;
    PREEMPTED | TERMINATED | SUSPENDING | SUSPENDED) echo lost ;;
    FAILED | STOPPED) echo failed ;;
    *) echo waiting ;;
  esac
}

request() {
  local image options=()
  image=${runtime:-$(runtime_of_type)} || exit
  [ "$spot" = 0 ] || options+=(--spot)
  if [ "$direct" = 1 ]; then
    tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$image" \
      "${options[@]}"
  else
    tpus queued-resources create "$name" "--node-id=$name" \
      "--accelerator-type=$type" "--runtime-version=$image" "${options[@]}"
  fi
}

delete() {
  if [ "$direct" = 1 ]; then
    tpus tpu-vm delete "$name"
  else
    tpus queued-resources delete "$name" --force
  fi
}

# Makes the slice unless it is there, and waits for it.
create() {
  local state
  state=$(slice_state)
  while [ "$state" != ready ]; do
    case $state in
      none) say "asking for $type as $name"; request || return ;;
      lost) say "$name was taken away"; delete || return ;;
      failed) refuse "$name failed or was stopped; see status, then delete" ;;
      *) say "$name: $state"; run sleep "$poll" ;;
    esac
    # A dry run: as if it were there now.
    if [ "$dry_run" = 1 ]; then state=ready; else state=$(slice_state); fi
  done
}

copy() {
  local archive=${TMPDIR:-/tmp}/jax_rlvr.$$.tar.gz
  run tar -czf "$archive" -C "$root" --exclude=./.git --exclude=./.venv \
    --exclude=./runs --exclude=__pycache__ .
  tpus tpu-vm scp "$archive" "$name:jax_rlvr.tar.gz" --worker=all
  tpus tpu-vm ssh "$name" --worker=all \
    '--command=mkdir -p jax_rlvr && tar -xzf jax_rlvr.tar.gz -C jax_rlvr'
  run rm -f "$archive"
}

install() { on_hosts all 'launch/worker.sh install'; }
start() { on_hosts all "launch/worker.sh start $(quoted "${trainer[@]}")"; }


# The states of the run on all hosts, each once: 'state=0', 'state=running' …
host_states() {
  on_hosts all 'launch/worker.sh state' | grep -o 'state=[a-z0-9]*' | sort -u
}

# Whether it runs; then nothing is to be changed under it.
going() {
  [ "$dry_run" = 0 ] && host_states 2> /dev/null | grep -x state=running > /dev/null
}

up() {
  create || return
  if going; then say 'it is running'; else copy && install && start; fi
}

# One word of what to do: wait, again, finished, refused, crashed.
verdict() {
  local states
  states=$(host_states) || { echo wait; return; }
  any() { grep -qx "state=$1" <<< "$states"; }
  if any running; then echo wait # for those that save yet
  elif any 2; then echo refused
  elif [ "$states" = state=0 ]; then echo finished
  elif any 75 || any gone; then echo again
  else echo crashed
  fi
}

watch() {
  local crashes=0
  up
  if [ "$dry_run" = 1 ]; then
    say "then every $poll s:"
    slice_state > /dev/null
    host_states || true
    say 'after 75: the last command of up; after a lost slice: delete, and up'
    delete
    return
  fi
  while sleep "$poll"; do
    case $(slice_state) in
      unknown) continue ;;
      ready) ;;
      *) say 'the slice has gone'; up || say 'that failed'; continue ;;
    esac
    case $(verdict) in
      wait) crashes=0 ;;
      again) say 'preempted and saved: on again'; start || true ;;
      finished) say 'done; the slice is still there: delete it'; return ;;
      refused) say 'bad input: see tail'; return 2 ;;
      # A host that goes takes the others down a while before it is missed.
      crashed)
        crashes=$((crashes + 1))
        [ "$crashes" -lt 3 ] || { say 'crashed: see tail'; return 1; }
        ;;
    esac
  done
}

status() {
  say "slice: $(slice_state)"
  on_hosts all 'hostname && launch/worker.sh state'
}

[ -n "$command" ] && [ "$command" != --help ] || { usage; exit 2; }
[ -n "$name" ] && [ -n "$zone" ] || refuse '--name and --zone are required'
case $command in
  up | watch | create) [ -n "$type" ] || refuse '--type is required' ;;
esac
case $command in
  up | watch | run)
    case " ${trainer[*]} " in
      *" --workdir gs://"* | *" --workdir=gs://"*) ;;
      *" --workdir /"* | *" --workdir=/"*) ;;
      *) refuse '--workdir must be gs://… or a shared mount: a host loses' \
        'its disk with the slice, and no host sees the disk of another' ;;
    esac
    ;;
esac
case $command in
  up | watch | create | copy | install | status | delete) "$command" ;;
  run) start ;;
  tail) on_hosts "$worker" 'launch/worker.sh tail' ;;
  stop) on_hosts all 'launch/worker.sh stop' ;;
  *) refuse "unknown command $command; see launch/tpu_vm.sh --help" ;;
esac
