#!/usr/bin/env bash
# One task of a SLURM job step, which is one process of a run: tells it of the others, sets XLA's flags and becomes the
# command. Started by srun, with one task a node:
#
#     srun --ntasks-per-node=1 launch/slurm/task.sh python scripts/train.py --config=... --workdir=...
#
# LCX_DEVICE is gpu (the default), tpu or cpu. A process has all devices of its node.
set -euo pipefail

if [[ -z ${SLURM_PROCID:-} || -z ${SLURM_STEP_NUM_TASKS:-} ]]; then
  echo "error: launch/slurm/task.sh is for tasks that srun starts: there is no SLURM_PROCID here." >&2
  exit 2
fi
if ((SLURM_STEP_NUM_TASKS > 1)); then
  nodes=$(scontrol show hostnames "$SLURM_STEP_NODELIST")  # no pipe to head, which would end it before it is done
  # The first node; a port for each job, so that two on one node do not meet.
  export JAX_COORDINATOR_ADDRESS="${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))"
  export JAX_NUM_PROCESSES=$SLURM_STEP_NUM_TASKS
  export JAX_PROCESS_ID=$SLURM_PROCID
fi
# shellcheck source=launch/xla_flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/../xla_flags.sh" "${LCX_DEVICE:-gpu}"
exec "$@"
