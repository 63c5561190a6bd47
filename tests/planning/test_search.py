"""The largest batch that fits, and which meshes and policies are worth compiling."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lcx.config import Config, load_config
from lcx.planning.hardware import parse_hardware
from lcx.planning.largest import by_compiling, in_proportion
from lcx.planning.search import candidates, order

MEMORY = 1000


def planned(memory, state=100, **train):
    """What `largest` reads of a plan whose program needs that much memory."""
    return SimpleNamespace(
        fits=memory <= MEMORY,
        memory=SimpleNamespace(total=memory, state=state),
        hardware=SimpleNamespace(memory=MEMORY),
        config=SimpleNamespace(train=SimpleNamespace(**train)),
    )


def found(need, batch_size):
    """by_compiling where a batch needs `need(batch)`, and which batches were compiled."""
    seen = []

    def compiled(**train):
        sizes = {"batch_size": batch_size, "sequence_length": 64} | train
        if "batch_size" in train:
            seen.append(train["batch_size"])
        return planned(need(sizes["batch_size"]) if "batch_size" in train else MEMORY + 1, **sizes)

    start = planned(need(batch_size), batch_size=batch_size, sequence_length=64)
    return by_compiling(start, {"batch_size": 4, "sequence_length": 64}, compiled)["batch_size"], seen


@pytest.mark.parametrize("batch_size", [4, 8, 60, 88, 92, 200, 4000])
def test_the_largest_is_found_by_a_line_and_compiled(batch_size):
    largest, seen = found(lambda batch: 120 + 10 * batch, batch_size)  # 88 rows fit, and are a multiple of 4
    assert largest == 88 and (88 in seen or batch_size == 88) and len(seen) <= 4


@pytest.mark.parametrize("batch_size", [4, 32, 400])
def test_what_is_not_a_line_gives_no_more_than_what_was_compiled(batch_size):
    """Buffers that are dropped from some size on, and others that come in."""
    need = lambda batch: 150 + 12 * batch - (100 if batch > 50 else 0) + (batch // 40) * 30  # noqa: E731
    largest, seen = found(need, batch_size)
    assert largest in {*seen, batch_size} and need(largest) <= MEMORY


def test_nothing_fits():
    assert found(lambda batch: MEMORY + batch, 8)[0] is None


def test_in_proportion_by_hand():
    plan = planned(400, batch_size=8, sequence_length=640)
    unit = {"batch_size": 4, "sequence_length": 128}
    # 300 bytes grow, 900 are free: three times as many tokens.
    assert in_proportion(plan, unit) | {"method": ""} == {"batch_size": 24, "sequence_length": 1920, "method": ""}
    assert in_proportion(planned(2000, batch_size=8, sequence_length=640), unit)["batch_size"] is None


@pytest.fixture(scope="module")
def ranked():
    config = Config.from_dict(load_config("configs/samba.py:size=421m,sequence_length=32768"))
    config = replace(config, train=replace(config.train, batch_size=8), mesh=replace(config.mesh, data=1, fsdp=8))
    hardware = parse_hardware("v5p:2x2x2")
    return config, hardware, list(candidates(config, hardware))


def test_candidates_fill_the_devices_and_divide_the_batch(ranked):
    config, hardware, found = ranked
    assert len({candidate.key for candidate in found}) == len(found) > 10
    for candidate in found:
        mesh = candidate.mesh
        assert mesh.data * mesh.fsdp * mesh.seq * mesh.tensor == hardware.devices
        assert config.train.batch_size % (mesh.data * mesh.fsdp) == 0 and config.train.sequence_length % mesh.seq == 0
        assert replace(candidate, mesh=config.mesh, model=config.model) == config  # nothing else is changed


def test_policies_are_chosen_by_mixer_for_the_room_that_there_is(ranked):
    """With room nothing is computed again; on chips of 16 GB something of every choice is, and not always all."""
    config, _, roomy = ranked
    assert set(roomy[0].model.remat.values()) == {"none"}
    tight = [candidate.model.remat for candidate in candidates(config, parse_hardware("v5e:2x4"))]
    assert all(set(remat.values()) != {"none"} for remat in tight[:3])
    assert any(len(set(remat.values())) > 1 for remat in tight)


def test_plans_are_ordered_by_what_fits_then_by_time():
    plan = lambda fits, seconds, total: SimpleNamespace(  # noqa: E731
        fits=fits, seconds=seconds, memory=SimpleNamespace(total=total)
    )
    plans = [plan(False, 1.0, 1), plan(True, None, 5), plan(True, 3.0, 9), plan(True, 2.0, 9), plan(True, 2.0, 8)]
    assert [(one.fits, one.seconds, one.memory.total) for one in sorted(plans, key=order)] == [
        (True, 2.0, 8),
        (True, 2.0, 9),
        (True, 3.0, 9),
        (True, None, 5),
        (False, 1.0, 1),
    ]
    assert math.isinf(order(plans[1])[1])
