#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice, started from your own machine:
#
#     launch/tpu_vm.sh start NAME ZONE --config=configs/samba.py:size=1.3b --workdir=gs://bucket/samba
#
# runs this same file on every host, in the folder of the repository there (LCX_FOLDER, lcx by default), as:
#
#     launch/tpu_vm.sh host --config=... --workdir=...
#
# which asks the host's metadata who the others are, and ends there as the run does: 75 means saved, to be started again.
set -euo pipefail

usage() {
  echo "usage: launch/tpu_vm.sh start NAME ZONE FLAGS... | launch/tpu_vm.sh host FLAGS..." >&2
  exit 2
}

metadata() {
  # An attribute of this host.
  local address="http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
  curl --silent --fail --retry 5 --header "Metadata-Flavor: Google" "$address" || {
    echo "error: this host has no attribute $1: launch/tpu_vm.sh host is for the hosts of a TPU slice." >&2
    exit 2
  }
}

start() {
  (($# >= 2)) || usage
  local name=$1 zone=$2 words
  shift 2
  printf -v words ' %q' "$@"
  exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="cd ${LCX_FOLDER:-lcx} && launch/tpu_vm.sh host$words"
}

host() {
  local endpoints addresses
  endpoints=$(metadata worker-network-endpoints) # NAME:NAME:ADDRESS,NAME:NAME:ADDRESS,...
  mapfile -t addresses < <(tr ',' '\n' <<<"$endpoints" | cut -d : -f 3)
  if ((${#addresses[@]} > 1)); then
    JAX_PROCESS_ID=$(metadata agent-worker-number)
    export JAX_PROCESS_ID JAX_NUM_PROCESSES=${#addresses[@]}
    export JAX_COORDINATOR_ADDRESS="${addresses[0]}:${LCX_PORT:-8476}"
  fi
  # shellcheck source=launch/xla_flags.sh
  source launch/xla_flags.sh tpu
  exec "${LCX_PYTHON:-python3}" scripts/train.py "$@"
}

case ${1:-} in
  start | host) "$@" ;;
  *) usage ;;
esac
