# shellcheck shell=bash
# What the batch files of this folder share; sourced by them.

lcx_run() {
  # Runs a command on all nodes of the job and answers its end as a scheduler should: 75 is "saved, start me again".
  # SLURM sends the tasks the TERM that --signal asks for before the time is up, and all of them save and end with 75.
  # Where one ends otherwise, the others, which would wait for it, are ended a minute later.
  local code=0
  srun --kill-on-bad-exit=0 --wait=60 --label launch/slurm/task.sh "$@" || code=$?
  if ((code == 75)); then
    echo "interrupted and saved: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    sleep 60 # SLURM ends what is left of this try
  fi
  return "$code"
}
