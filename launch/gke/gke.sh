#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster: by kubectl, or by xpk.
#
#   launch/gke/gke.sh apply --name run --image REGISTRY/jax_rlvr --chip v5e \
#     --topology 4x4 -- --config configs/x.py --workdir gs://bucket/run
#   launch/gke/gke.sh tail --name run
#
# Commands:
#   render   print the JobSet (jobset.yaml, filled in)
#   apply    give it to the cluster that kubectl knows; JobSet must be there:
#            https://jobset.sigs.k8s.io/docs/installation
#   xpk      the same through `xpk workload create` (--cluster is required)
#   tail, status, delete    by --name
#
# Options:
#   --name NAME  --image IMAGE     see Dockerfile
#   --chip v4|v5e|v5p|v6e  --topology 4x4, 2x2x4 …  of a slice
#   --slices N (1)  --chips_per_host N (4)  --max_restarts N (100)
#   --spot  --service_account NAME (default)
#   --cluster NAME  --zone ZONE  --project PROJECT   for xpk
#   --dry_run        print every command, do none
# After -- come the trainer's arguments; --workdir is gs://….
#
# Exit code 75 begins the set again, up to --max_restarts; 2 ends it at once.
# Not tried on a cluster yet.
set -euo pipefail
shopt -s inherit_errexit # in $(…), too

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; }
refuse() { echo "error: $*" >&2; exit 2; }

here=$(cd "$(dirname "$0")" && pwd)
name='' image='' chip='' topology='' slices=1 chips_per_host=4 max_restarts=100
spot=0 service_account=default cluster='' zone='' project='' dry_run=0
trainer=()

command=${1:-}
[ $# = 0 ] || shift
while [ $# -gt 0 ]; do
  case $1 in
    --name | --image | --chip | --topology | --slices | --chips_per_host | \
      --max_restarts | --service_account | --cluster | --zone | --project)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --spot | --dry_run) printf -v "${1#--}" 1 ;;
    --) shift; trainer=("$@"); break ;;
    *) refuse "unknown option $1; -- comes before the trainer's arguments" ;;
  esac
  shift
done

# Prints a command in a dry run, else carries it out.
run() {
  if [ "$dry_run" = 0 ]; then "$@"; else echo "${*@Q}"; fi
}

chips() { echo $((${topology//x/*})); }

hosts() {
  local all
  all=$(chips)
  # A slice of fewer chips than a host has is one host.
  echo $(((all + chips_per_host - 1) / chips_per_host))
}

accelerator() {
  case $chip in
    v4) echo tpu-v4-podslice ;;
    v5e) echo tpu-v5-lite-podslice ;;
    v5p) echo tpu-v5p-slice ;;
    v6e) echo tpu-v6e-slice ;;
    *) refuse "--chip '$chip' is not v4, v5e, v5p or v6e" ;;
  esac
}

# The type's number counts chips in v5e and v6e, two cores a chip in the others.
tpu_type() {
  case $chip in
    v5e) echo "v5litepod-$(chips)" ;;
    v6e) echo "v6e-$(chips)" ;;
    v4 | v5p) echo "$chip-$(($(chips) * 2))" ;;
    *) refuse "--chip '$chip' is not v4, v5e, v5p or v6e" ;;
  esac
}

# The words as a list of JSON, which YAML reads.
list() {
  local word words=()
  for word; do
    word=${word//\\/\\\\}
    words+=("\"${word//\"/\\\"}\"")
  done
  (IFS=,; echo "[${words[*]}]")
}

render() {
  local text key
  local -A values=(
    [NAME]=$name [IMAGE]=$image [TOPOLOGY]=$topology [SLICES]=$slices
    [CHIPS_PER_HOST]=$chips_per_host [MAX_RESTARTS]=$max_restarts
    [SERVICE_ACCOUNT]=$service_account [HOSTS]=$(hosts) [SPOT]=''
    [COMMAND]=$(list python -m jax_rlvr.train "${trainer[@]}")
  )
  values[ACCELERATOR]=$(accelerator)
  [ "$spot" = 0 ] || values[SPOT]='cloud.google.com/gke-spot: "true"'
  text=$(< "$here/jobset.yaml")
  for key in "${!values[@]}"; do
    text=${text//"{{$key}}"/"${values[$key]}"}
  done
  echo "$text"
}

apply() {
  local manifest
  manifest=$(render)
  [ "$dry_run" = 0 ] || echo "$manifest"
  run kubectl apply -f - <<< "$manifest"
}

# xpk's own JobSet starts again after 42 and 127–255, and after what is named.
xpk_create() {
  local where=("--cluster=$cluster") type
  type=$(tpu_type)
  [ -z "$zone" ] || where+=("--zone=$zone")
  [ -z "$project" ] || where+=("--project=$project")
  run xpk workload create "${where[@]}" "--workload=$name" "--tpu-type=$type" \
    "--num-slices=$slices" "--docker-image=$image" \
    "--max-restarts=$max_restarts" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=120 \
    "--command=python -m jax_rlvr.train ${trainer[*]@Q}"
}

needs() {
  local key
  for key; do [ -n "${!key}" ] || refuse "--$key is required"; done
}

whole() {
  local key
  for key; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || refuse "--$key '${!key}' is no number"
  done
}

[ -n "$command" ] && [ "$command" != --help ] || { usage; exit 2; }
needs name
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  refuse "--name '$name' is not a-z, 0-9 and dashes, 40 at the most"
case $command in
  render | apply | xpk)
    needs image chip topology
    whole slices chips_per_host max_restarts
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
      refuse "--topology '$topology' is not like 4x4 or 2x2x4"
    case " ${trainer[*]} " in
      *" --workdir gs://"* | *" --workdir=gs://"*) ;;
      *) refuse '--workdir must be gs://…: pods share no disk' ;;
    esac
    ;;
esac
of_run=(-l "jobset.sigs.k8s.io/jobset-name=$name")
case $command in
  render | apply) "$command" ;;
  xpk) needs cluster; xpk_create ;;
  tail) run kubectl logs -f "${of_run[@]}" --max-log-requests=64 --prefix ;;
  status)
    run kubectl get jobset "$name"
    run kubectl get pods "${of_run[@]}" -o wide
    ;;
  delete) run kubectl delete jobset "$name" ;;
  *) refuse "unknown command $command; see launch/gke/gke.sh --help" ;;
esac
