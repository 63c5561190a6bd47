import json
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.errors import UserError
from lcx.files import write_json
from lcx.training import checkpointing
from lcx.training.checkpointing import Checkpoints, ParameterReader, read_newest


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    params: dict
    opt_state: tuple
    step: jax.Array
    rng: jax.Array


def make_state(step=1):
    value = jax.random.normal(jax.random.key(step), (16, 8))
    params = {"layer": {"w": value, "b": jnp.full(8, step, jnp.bfloat16)}, "embedding": value.T}
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1, {"layer": True, "embedding": False}))
    return State(params, optimizer.init(params), jnp.int32(step), jax.random.key(step))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        raw = [jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y)]
        np.testing.assert_array_equal(*(np.asarray(z) for z in raw))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    return folder


def restore(folder, state=None, keep=3):
    """(step, state, what was said) of a new start."""
    said = []
    checkpoints = Checkpoints(folder, keep=keep, say=said.append)
    try:
        restored = checkpoints.restore(abstract(state or make_state()))
    finally:
        checkpoints.close()
    return *(restored or (None, None)), said


def test_restores_the_newest_exactly(saved):
    step, state, said = restore(saved)
    assert (step, said) == (2, [])
    assert_equal(state, make_state(2))


def test_nothing_to_restore(folder):
    assert restore(folder) == (None, None, [])


def test_manifest_states_every_file(saved):
    manifest = json.loads((saved / "2.manifest.json").read_text())
    assert manifest["format_version"] == 1 and manifest["step"] == 2
    present = {path.relative_to(saved / "2").as_posix() for path in (saved / "2").rglob("*") if path.is_file()}
    assert manifest["files"].keys() == present
    assert all(entry["size"] == (saved / "2" / name).stat().st_size for name, entry in manifest["files"].items())


def test_keeps_the_newest(folder):
    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 7, 10, 11):
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [10, 11] and checkpoints.latest() == 11
    checkpoints.close()
    assert sorted(os.listdir(folder)) == ["10", "10.manifest.json", "11", "11.manifest.json"]


def test_the_commit_happens_behind_the_training(folder, monkeypatch):
    commit = threading.Event()

    def delayed(path, values):
        commit.wait()
        write_json(path, values)

    monkeypatch.setattr("lcx.training.checkpointing.write_json", delayed)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, make_state())
    assert checkpoints.latest() is None
    threading.Timer(0.1, commit.set).start()
    checkpoints.save(2, make_state())
    assert checkpoints.latest() >= 1, "a save waits for the commit before it"
    checkpoints.close()
    assert checkpoints.steps() == [2]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_what_writes_gives_way_to_the_steps(folder, monkeypatch):
    def priority():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    checkpoints, before, seen = Checkpoints(folder, keep=1), priority(), []
    save = checkpoints._orbax.save
    watched = lambda *args, **names: seen.append(priority()) or save(*args, **names)  # noqa: E731
    monkeypatch.setattr(checkpoints._orbax, "save", watched)
    checkpoints.save(1, make_state())
    checkpoints.close()
    assert seen == [min(before + checkpointing.NICE, 19)] and priority() == before


def test_donated_buffers_do_not_reach_the_checkpoint(folder):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"a": jnp.zeros((512, 1024)), "b": jnp.zeros((512, 1024))}
    template = abstract(state)
    checkpoints = Checkpoints(folder, keep=1)
    for step in range(1, 4):
        state = advance(state)
        checkpoints.save(step, state)
        saved_value = 3 * (step - 1) + 1
        state = advance(advance(state))  # overwrites, if it may, what is being written
        _, restored = checkpoints.restore(template)
        assert all((np.asarray(leaf) == saved_value).all() for leaf in restored.values())
    checkpoints.close()


def test_restores_onto_another_sharding(folder):
    devices = np.array(jax.devices())
    assert len(devices) >= 2
    mesh = Mesh(devices, ("x",))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    value = jnp.arange(64 * 4, dtype=jnp.float32).reshape(64, 4)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, {"w": jax.device_put(value, place("x"))})
    for sharding in (place(), place("x", None), jax.sharding.SingleDeviceSharding(devices[0])):
        _, state = checkpoints.restore({"w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)})
        assert state["w"].sharding == sharding
        np.testing.assert_array_equal(np.asarray(state["w"]), np.asarray(value))
    checkpoints.close()


def test_the_same_step_twice_is_an_error(saved, folder):
    shutil.copytree(saved, folder)
    checkpoints = Checkpoints(folder, keep=3)
    with pytest.raises(ValueError, match="already exists"):
        checkpoints.save(2, make_state(2))
    checkpoints.close()
    assert restore(folder)[0] == 2


def test_every_flipped_bit_is_detected(saved, folder):
    rng = random.Random(0)
    names = [path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file()]
    assert len(names) > 8
    for name in names:
        shutil.copytree(saved, folder)
        data = bytearray((folder / name).read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)
        step, state, said = restore(folder)
        assert step == 1, f"{name} was not noticed"
        assert len(said) == 1 and "step 2" in said[0] and str(name.relative_to("2")) in said[0]
        assert_equal(state, make_state(1))
        assert (folder / "2.damaged").is_dir() and (folder / "2.damaged.manifest.json").is_file()
        assert not (folder / "2").exists() and not (folder / "2.manifest.json").exists()
        shutil.rmtree(folder)


@pytest.mark.parametrize("damage", ["truncated", "removed", "added", "manifest cut", "manifest of another step"])
def test_damage_of_other_kinds_is_detected(saved, folder, damage):
    shutil.copytree(saved, folder)
    victim = max((folder / "2").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    manifest = folder / "2.manifest.json"
    if damage == "truncated":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "removed":
        victim.unlink()
    elif damage == "added":
        (victim.parent / "stranger").write_text("")
    elif damage == "manifest cut":
        os.truncate(manifest, manifest.stat().st_size // 2)
    else:
        shutil.copy(folder / "1.manifest.json", manifest)
    step, _, said = restore(folder)
    assert step == 1 and len(said) == 1
    assert restore(folder)[::2] == (1, []), "the damaged one is out of the way"


def test_a_damaged_step_can_be_saved_and_damaged_again(saved, folder):
    shutil.copytree(saved, folder)
    for _ in range(2):
        (folder / "2" / "_METADATA").write_text("{}")
        assert restore(folder)[0] == 1
        checkpoints = Checkpoints(folder, keep=3)
        checkpoints.save(2, make_state(2))
        checkpoints.close()
        assert restore(folder)[0] == 2


def test_when_all_are_damaged_there_is_nothing_to_restore(saved, folder):
    shutil.copytree(saved, folder)
    for step in "12":
        (folder / step / "_METADATA").unlink()
    step, _, said = restore(folder)
    assert step is None and len(said) == 2


def test_remnants_are_removed_and_strangers_stay(saved, folder):
    shutil.copytree(saved, folder)
    shutil.copytree(folder / "2", folder / "3")  # no manifest: a kill before it, or in the midst of a removal
    shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    shutil.copy(folder / "2.manifest.json", folder / "5.manifest.json")
    (folder / ".3.manifest.json.tmp").write_text("{")
    (folder / "notes.txt").write_text("mine")
    assert restore(folder)[0] == 2
    assert sorted(os.listdir(folder)) == ["1", "1.manifest.json", "2", "2.manifest.json", "notes.txt"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p | {"layer": p["layer"] | {"w": jnp.zeros((16, 9))}}, "params/layer/w is float32[16, 8] there"),
        (lambda p: p | {"layer": p["layer"] | {"b": jnp.zeros(8)}}, "params/layer/b is bfloat16[8] there"),
        (lambda p: p | {"head": jnp.zeros(2)}, "params/head is absent there and float32[2] here"),
        (lambda p: {"layer": p["layer"]}, "params/embedding is float32[8, 16] there and absent here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, folder, change, named):
    shutil.copytree(saved, folder)
    state = make_state()
    with pytest.raises(UserError) as error:
        restore(folder, replace(state, params=change(state.params)))
    assert named in str(error.value) and "another model" in str(error.value)
    assert restore(folder)[0] == 2, "it was not damaged"


def test_a_part_is_read_without_touching_the_folder(saved, folder):
    shutil.copytree(saved, folder)
    (folder / "2" / "_METADATA").write_text("{}")
    shutil.copytree(folder / "1", folder / "3.orbax-checkpoint-tmp")  # a save on its way
    before, said = sorted(os.listdir(folder)), []
    part = {"params": abstract(make_state()).params}
    step, read = read_newest(folder, part, said.append)
    assert step == 1 and len(said) == 1 and "step 2" in said[0]
    assert_equal(read, {"params": make_state(1).params})
    assert sorted(os.listdir(folder)) == before
    part["params"]["layer"]["w"] = part["params"]["embedding"]
    with pytest.raises(UserError, match="params/layer/w is float32.16, 8. there and float32.8, 16. here"):
        read_newest(folder, part, said.append)
    assert read_newest(folder / "nowhere", part) is None


@pytest.mark.parametrize("limit", [2000, 200_000])
def test_a_full_disk_leaves_the_last_checkpoint_whole(folder, limit, capfd):
    """No file may grow beyond the limit, as on a full disk: in orbax's threads, and before they begin."""
    noise = lambda step: {"a": jax.random.normal(jax.random.key(step), (100_000,))}  # noqa: E731
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, noise(1))
    checkpoints.wait()
    state = noise(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match="disk is full.* step 2 .*step 1 is whole"):
            checkpoints.save(2, state)
            checkpoints.save(3, state)  # raises what the one before met
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert "Traceback" not in "".join(capfd.readouterr())
    step, state, _ = restore(folder, noise(1))
    assert step == 1
    assert_equal(state, noise(1))


def test_errors_of_the_thread_surface(folder, monkeypatch):
    def broken(*_):
        raise RuntimeError("no manifest today")

    monkeypatch.setattr("lcx.training.checkpointing.write_json", broken)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, make_state())
    with pytest.raises(RuntimeError, match="no manifest today"):
        checkpoints.save(2, make_state())
    checkpoints.close()


# A trainer that is killed over and over. It imports once and forks a child for each life; a life restores, checks, and
# saves step after step until it kills itself at the named point or is killed at a random moment.
LIVES = """
import json, os, random, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
import lcx.files
from lcx.training import checkpointing
from lcx.training.checkpointing import Checkpoints

folder, seed, points = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

def half_removed(path):
    os.unlink(os.path.join(path, "_METADATA"))
    die()

Path = type(checkpointing.epath.Path("/"))

def one_act_only(path, target):
    os.replace(path, target)
    die()

POINTS = {
    "folder without manifest": (checkpointing, "write_json", die),
    "manifest under a temporary name": (lcx.files.os, "replace", die),
    "manifest there, old checkpoint too": (Checkpoints, "_remove", die),
    "old manifest gone, folder there": (Path, "rmtree", die),
    "old folder half gone": (Path, "rmtree", half_removed),
}

def live(report, point):
    signal.alarm(20)  # where the point is never reached
    checkpoints = Checkpoints(folder, keep=2)
    for name in os.listdir(folder):
        assert "tmp" not in name, name
        assert not name.isdigit() or os.path.exists(f"{folder}/{name}.manifest.json"), name
        if name.endswith(".manifest.json") and "damaged" not in name:
            files = json.load(open(f"{folder}/{name}"))["files"]
            assert all(os.path.exists(f"{folder}/{name.split('.')[0]}/{file}") for file in files), name
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=device)}
    if point == "half set aside":
        open(f"{folder}/{checkpoints.latest()}/_METADATA", "w").close()
        Path.rename = Path.replace = one_act_only
    step, state = checkpoints.restore(template) or (0, {"w": jnp.zeros((64, 64))})
    assert (np.asarray(state["w"]) == step).all()
    os.write(report, f"restored {step}\\n".encode())
    begin = step
    while True:
        if step == begin + 3 and point:
            checkpoints.wait()
            setattr(*POINTS[point])
        step, state = step + 1, {"w": state["w"] + 1}
        checkpoints.save(step, state)
        if latest := checkpoints.latest():
            os.write(report, f"committed {latest}\\n".encode())

random.seed(seed)
committed = 0
for point in points + [None]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            live(writer, None if point == "random" else point)
        finally:
            os._exit(1)
    os.close(writer)
    lines = os.fdopen(reader)
    if point == "half set aside":
        assert not lines.read()
        assert any(name.endswith(".damaged") for name in os.listdir(folder)), "nothing that was saved is removed"
        committed = 1  # the one before it
        os.waitpid(child, 0)
        continue
    restored = int(next(lines).split()[1])
    assert restored >= committed, (point, restored, committed)
    if point in ("random", None):
        for _ in range(random.randint(1, 4)):
            next(lines)
        time.sleep(random.random() * 0.06)
        os.kill(child, signal.SIGKILL)
    for line in lines:  # until the child is dead
        committed = max(committed, int(line.split()[1]))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, point
    print(point, "restored", restored, "committed", committed, flush=True)
"""


def live_and_die(folder, seed, points):
    folder.mkdir(parents=True)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LIVES), str(folder), str(seed), *points]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kill_at_random_moments(folder):
    live_and_die(folder, seed=0, points=["random"] * 8)


def test_kill_between_any_two_acts_of_a_commit(folder):
    points = [
        "folder without manifest",
        "manifest under a temporary name",
        "manifest there, old checkpoint too",
        "old manifest gone, folder there",
        "old folder half gone",
        "half set aside",
    ]
    live_and_die(folder, seed=1, points=points)


def test_a_checkpoint_that_is_removed_while_it_is_read_is_named(saved, folder):
    shutil.copytree(saved, folder)
    state = make_state()
    shapes = {"layer": state.params["layer"], "embedding": state.params["embedding"]}
    read = ParameterReader(folder, 1, shapes)
    np.testing.assert_array_equal(read("layer/w"), state.params["layer"]["w"])
    shutil.rmtree(folder / "1")
    with pytest.raises(UserError, match=r"embedding of checkpoint .*checkpoints/1 cannot be read: it was removed"):
        read("embedding")


def test_a_checkpoint_that_is_removed_while_it_is_opened_is_named(saved, folder, monkeypatch):
    shutil.copytree(saved, folder)
    monkeypatch.setattr(checkpointing, "check_whole", lambda folder, step: shutil.rmtree(folder / str(step)))
    with pytest.raises(UserError, match=r"the checkpoint of step 1 in .*checkpoints has no metadata: it was removed"):
        ParameterReader(folder, 1, make_state().params)
