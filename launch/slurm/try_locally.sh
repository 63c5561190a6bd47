#!/usr/bin/env bash
# Tries the batch files against a real SLURM of one node, on this machine: munged, slurmctld and slurmd, made in a
# folder of its own and ended again. As root, with Debian's packages:
#
#     apt-get install slurm-wlm munge
#     launch/slurm/try_locally.sh FOLDER
#
# A tiny model is trained on the CPU as two tasks of one job, is sent a TERM, saves, goes back into the queue by its own
# exit code 75, and goes on to its end. Takes some minutes; exits 0 where all of that happened, and leaves its logs in
# FOLDER.
set -euo pipefail

folder=$(realpath -m "${1:?usage: launch/slurm/try_locally.sh FOLDER}")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || {
    echo "error: $program is not installed: apt-get install slurm-wlm munge." >&2
    exit 2
  }
done
mkdir -p "$folder"/{state,spool,munge}
export SLURM_CONF=$folder/slurm.conf
host=$(hostname -s)

munge_key() {
  # A key, socket and log of our own: the machine's munge, if there is one, is left alone.
  [[ -s $folder/munge/key ]] || dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
  chmod 0400 "$folder/munge/key"
  chmod 0755 "$folder" "$folder/munge"
}

cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SlurmctldParameters=cloud_dns
ReturnToService=2
KillWait=120
MinJobAge=3600
BatchStartTimeout=60
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF

stop() {
  scancel --quiet --user=root 2>/dev/null || true
  for name in slurmd slurmctld munged; do
    if [[ -s $folder/$name.pid ]]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
  done
}
trap stop EXIT

munge_key
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --num-threads=2
slurmctld -f "$SLURM_CONF" -i
slurmd -f "$SLURM_CONF"

wait_for() {
  # Waits until a command succeeds: wait_for SECONDS WHAT COMMAND...
  local seconds=$1 what=$2
  shift 2
  for ((i = 0; i < seconds; i++)); do
    "$@" >/dev/null 2>&1 && return
    sleep 1
  done
  echo "error: $what took more than $seconds s; the logs are in $folder." >&2
  exit 1
}

idle() { sinfo --noheader --format=%t | grep -q '^idle'; }
at_step() { grep -q "\"step\": $1," "$folder/run/metrics.jsonl"; }
state_is() { [[ $(scontrol show job "$job" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p') == "$1" ]]; }
requeued() { scontrol show job "$job" | grep -q 'Restarts=1'; }

wait_for 30 "the node" idle
cd "$root"
export LCX_DEVICE=cpu LCX_PYTHON=${LCX_PYTHON:-python}
export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo XLA_FLAGS=--xla_force_host_platform_device_count=2
job=$(sbatch --parsable --ntasks=2 --ntasks-per-node=2 --gpus-per-node=0 --time=30 --output="$folder/job.log" \
  launch/slurm/one_node.sbatch --config=configs/samba.py:size=tiny,sequence_length=64 --workdir="$folder/run" \
  --config.model.periods=1 --config.train.batch_size=4 --config.train.steps=200 --config.mesh.data=4 \
  --config.logging.every=1 --config.logging.tensorboard=false --config.evaluation.max_rows=4)
echo "job $job"
wait_for 300 "the first ten steps" at_step 10
scancel --signal=TERM "$job"
wait_for 120 "the requeueing" requeued
echo "saved and requeued after step $(tail -n 1 "$folder/run/metrics.jsonl" | sed 's/.*"step": \([0-9]*\),.*/\1/')"
scontrol release "$job" 2>/dev/null || true
wait_for 600 "the end" state_is COMPLETED
at_step 200
echo "passed: two tasks found each other, one signal saved the run, exit code 75 requeued it, and it went on to its end"
