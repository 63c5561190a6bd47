"""The files of launch/ for SLURM, GKE, TPU hosts and ssh: their shell, what a process is told, and how a run ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SHELL = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))
MANIFESTS = sorted(LAUNCH.glob("gke/*.yaml"))
SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
TELL = 'printf "%s %s %s\\n" "${JAX_COORDINATOR_ADDRESS:-}" "${JAX_NUM_PROCESSES:-}" "${JAX_PROCESS_ID:-}"'


def name(path):
    return path.relative_to(LAUNCH).as_posix()


def run(words, **environment):
    """A command in the repository's root, in an environment with nothing of a cluster but this."""
    known = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=known | environment, cwd=LAUNCH.parent)


@pytest.fixture
def commands(tmp_path):
    """A folder for the PATH, and a function that puts a shell script there as a command."""

    def put(command, script):
        path = tmp_path / command
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return f"{tmp_path}:{os.environ['PATH']}"

    return put


@pytest.mark.parametrize("path", SHELL, ids=name)
def test_shell(path):
    assert run(["bash", "-n", path]).returncode == 0
    checked = run(
        ["shellcheck", "--external-sources", path], PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert checked.returncode == 0, checked.stdout


def flags_of(kind, **environment):
    script = f'source launch/xla_flags.sh {kind}; echo "$XLA_FLAGS|$LIBTPU_INIT_ARGS|$XLA_PYTHON_CLIENT_MEM_FRACTION"'
    done = run(["bash", "-c", script], **environment)
    return done.stdout.strip().split("|")


def test_flags_come_from_the_table_and_the_users_win():
    table = (LAUNCH / "xla_flags.sh").read_text()
    gpu, _, share = flags_of("gpu", XLA_FLAGS="--mine=1")
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in gpu and gpu.endswith(" --mine=1") and share == "0.92"
    assert all(flag in table for flag in gpu.split()[:-1])
    assert "deterministic" not in gpu and "deterministic" in flags_of("gpu", LCX_REPEATABLE="1")[0]
    assert flags_of("gpu", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")[2] == "0.5"
    assert flags_of("cpu") == ["", "", ""]
    assert run(["bash", "launch/xla_flags.sh"]).returncode == 2


def test_xla_knows_the_flags():
    flags = flags_of("gpu", LCX_REPEATABLE="1")[0]
    done = run([sys.executable, "-c", "import jax; print(jax.devices())"], XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr[-500:]
    wrong = run(
        [sys.executable, "-c", "import jax; jax.devices()"], XLA_FLAGS="--xla_gpu_nothing=1", JAX_PLATFORMS="cpu"
    )
    assert wrong.returncode != 0  # so that the line above says something


def test_a_slurm_task_is_told_of_the_others(commands):
    path = commands("scontrol", '[[ "$*" == "show hostnames n[7-9]" ]] && printf "n7\\nn8\\nn9\\n"')
    task = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "n[7-9]", "SLURM_JOB_ID": "41005"}
    told = run(["launch/slurm/task.sh", "bash", "-c", TELL], PATH=path, LCX_DEVICE="cpu", **task)
    assert told.stdout == "n7:21005 3 2\n", told.stderr
    alone = run(["launch/slurm/task.sh", "bash", "-c", TELL], PATH=path, **task | {"SLURM_STEP_NUM_TASKS": "1"})
    assert alone.stdout.split() == []
    outside = run(["launch/slurm/task.sh", "true"])
    assert outside.returncode == 2 and "for tasks that srun starts" in outside.stderr


@pytest.mark.parametrize("batch", sorted(LAUNCH.glob("slurm/*.sbatch")), ids=name)
@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_a_slurm_job_goes_back_into_the_queue_when_it_was_interrupted(commands, tmp_path, batch, code):
    commands("srun", f'echo "srun $*"; exit {code}')
    commands("sleep", "true")
    path = commands("scontrol", f'echo "scontrol $*" >> {tmp_path}/said')
    job = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "PATH": path}
    job |= {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"} if "array" in batch.name else {}
    done = run(["bash", batch, "--config=a b.py", "--workdir=w"], **job)
    assert done.returncode == code
    script = "sweep" if "sweep" in batch.name else "train"
    assert f"launch/slurm/task.sh python scripts/{script}.py --config=a b.py --workdir=w" in done.stdout
    said = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
    assert said == (f"scontrol requeue {'10_2' if 'array' in batch.name else '12'}\n" if code == 75 else "")


@pytest.mark.parametrize("batch", sorted(LAUNCH.glob("slurm/*.sbatch")), ids=name)
def test_a_slurm_job_can_be_requeued(batch):
    options = {
        line.split()[1].split("=")[0]: line.split()[1] for line in batch.read_text().splitlines() if "#SBATCH" in line
    }
    assert {"--requeue", "--open-mode", "--signal", "--output", "--ntasks-per-node"} <= set(options)
    assert options["--signal"].startswith("--signal=TERM@") and options["--ntasks-per-node"].endswith("=1")


def test_a_tpu_host_is_told_of_the_others(commands):
    commands(
        "curl",
        'case "${@: -1}" in *endpoints) echo "a:b:10.0.0.5,a:b:10.0.0.6";; *worker-number) echo 1;; *) exit 22;; esac',
    )
    path = commands("python3", f'echo "$*"; {TELL}')
    done = run(["launch/tpu_vm.sh", "host", "--config=x"], PATH=path)
    assert done.stdout.splitlines() == ["scripts/train.py --config=x", "10.0.0.5:8476 2 1"], done.stderr
    path = commands("curl", "exit 6")
    lost = run(["launch/tpu_vm.sh", "host", "--config=x"], PATH=path)
    assert lost.returncode == 2 and "this host has no attribute worker-network-endpoints" in lost.stderr


def test_a_tpu_slice_runs_the_same_command_everywhere(commands):
    path = commands("gcloud", 'printf "%s\\n" "$@"')
    done = run(["launch/tpu_vm.sh", "start", "mine", "us-east5-a", "--config=a b.py", "--workdir=w"], PATH=path)
    words = done.stdout.splitlines()
    assert {"mine", "--zone=us-east5-a", "--worker=all"} <= set(words)
    assert words[-1] == r"--command=cd lcx && launch/tpu_vm.sh host --config=a\ b.py --workdir=w"
    assert run(["launch/tpu_vm.sh", "start", "mine"]).returncode == 2 and run(["launch/tpu_vm.sh"]).returncode == 2


@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_a_manifest_is_a_job_set(path):
    manifest = yaml.safe_load(path.read_text())
    jsonschema.validate(manifest, SCHEMA)
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert job["completions"] == job["parallelism"] == int(environment["PODS"]) and job["completionMode"] == "Indexed"
    assert {volume["name"] for volume in job["template"]["spec"]["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
    codes = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {2: "FailJob", 75: "Ignore"}
    told = run(
        [container["command"][0], "bash", "-c", TELL],
        **{
            key: value or {"JOBSET_NAME": "lcx", "REPLICATED_JOB_NAME": jobs["name"]}[key]
            for key, value in environment.items()
        },
        JOB_COMPLETION_INDEX="1",
    )
    assert told.stdout == f"lcx-hosts-0-0.lcx:8476 {environment['PODS']} 1\n", told.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        lambda spec: spec.update(replicatedjobs=[]),
        lambda spec: spec["replicatedJobs"][0].update(replicas="1"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"].update(completionMode="indexed"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].update(restartPolicy="Always"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0].pop("image"),
    ],
)
def test_the_schema_refuses(wrong):
    manifest = yaml.safe_load(MANIFESTS[0].read_text())
    wrong(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_a_pod_outside_of_a_job_set():
    done = run(["launch/gke/task.sh", "true"])
    assert done.returncode == 2 and "there is no JOBSET_NAME here" in done.stderr


SSH = 'shift 2; echo "$1" >> "$(dirname "$0")/hosts"; shift; cd /; exec bash -c "$*"'  # -o BatchMode=yes HOST COMMAND
HELLO = """
import os, signal, sys, time
print(*map(os.environ.get, ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")), sys.argv[1:])
sys.stdout.flush()
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
"""


def ssh(commands, tmp_path, *words):
    path = commands("ssh", SSH)
    (tmp_path / "hello.py").write_text(HELLO)
    command = [sys.executable, LAUNCH / "ssh.py", "--hosts=me@a,b", f"--python={sys.executable}", "--device=cpu"]
    words = [*command, tmp_path / "hello.py", *words]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PATH": path},
        cwd=LAUNCH.parent,
    )


def test_ssh_tells_each_host_of_the_others(commands, tmp_path):
    out, err = ssh(commands, tmp_path, "a word").communicate(timeout=60)
    assert set(out.splitlines()) == {"a:8476 2 0 ['a word']", "[1] a:8476 2 1 ['a word']"}, err
    assert sorted((tmp_path / "hosts").read_text().split()) == ["b", "me@a"]


def test_ssh_passes_signals_on(commands, tmp_path):
    process = ssh(commands, tmp_path, "wait")
    seen = [process.stdout.readline() for _ in range(2)]
    assert len(seen) == 2
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_ssh_refuses_what_it_cannot_run():
    for words in (["--hosts=a,a", "x.py"], ["--hosts=", "x.py"], ["--hosts=a"], ["x.py"]):
        done = run([sys.executable, "launch/ssh.py", *words])
        assert done.returncode == 2 and "error: " in done.stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.geteuid() != 0,
    reason="needs root and a SLURM on this machine: apt-get install slurm-wlm munge",
)
def test_a_real_slurm_of_one_node(tmp_path):
    command = ["launch/slurm/try_locally.sh", tmp_path / "slurm"]
    environment = os.environ | {"LCX_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=LAUNCH.parent, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
