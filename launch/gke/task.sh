#!/usr/bin/env bash
# One pod of a JobSet, which is one process of a run: tells it of the others, sets XLA's flags and becomes the command.
# JobSet and Kubernetes give JOBSET_NAME, REPLICATED_JOB_NAME, PODS and JOB_COMPLETION_INDEX (see the manifests); on TPUs
# also TPU_WORKER_HOSTNAMES, but one way serves all. LCX_DEVICE is gpu or tpu.
set -euo pipefail

for name in JOBSET_NAME REPLICATED_JOB_NAME PODS JOB_COMPLETION_INDEX LCX_DEVICE; do
  if [[ -z ${!name:-} ]]; then
    echo "error: launch/gke/task.sh is for the pods of a JobSet: there is no $name here." >&2
    exit 2
  fi
done
if ((PODS > 1)); then
  # The pod of index 0 of the first job, by the name that JobSet's headless service gives it.
  export JAX_COORDINATOR_ADDRESS="$JOBSET_NAME-$REPLICATED_JOB_NAME-0-0.$JOBSET_NAME:8476"
  export JAX_NUM_PROCESSES=$PODS
  export JAX_PROCESS_ID=$JOB_COMPLETION_INDEX
fi
# shellcheck source=launch/xla_flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/../xla_flags.sh" "$LCX_DEVICE"
exec "$@"
