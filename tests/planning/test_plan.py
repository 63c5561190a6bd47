"""Plans made of programs written by hand: what fits, and the estimate."""

from collections import Counter

import pytest

from lcx.config import Config, load_config
from lcx.planning import flops_per_token
from lcx.planning.hardware import CHIPS, parse_hardware
from lcx.planning.plan import Compiled, make_plan
from lcx.planning.roofline import layer_times, link_time, passes
from lcx.planning.work import Count, Work

GIB = 2**30
STATE = {"parameters": 2 * GIB, "optimizer": 4 * GIB}
MESH = {"data": 1, "fsdp": 4, "seq": 1, "tensor": 1}
PROGRAM = """HloModule m

ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  ROOT %y = f32[1024,1024]{1,0} sine(%x), metadata={op_name="jit(step)/jvp()/mixer_mlp/sin"}
}
"""


@pytest.fixture(scope="module")
def config():
    return Config.from_dict(load_config("configs/transformer.py:size=tiny"))


def planned(config, total, text=PROGRAM, hardware="v5e:2x2"):
    """A plan of a program that needs `total` bytes of a device."""
    arguments = 6 * GIB + 1000
    working = None if text is None else total - arguments
    return make_plan(
        config, parse_hardware(hardware), MESH, Compiled(text, arguments, arguments, working, 0, total, 1.0), STATE
    )


@pytest.mark.parametrize(
    "total, fits", [(15 * GIB, True), (int(15.75 * GIB), True), (int(15.75 * GIB) + 1, False), (40 * GIB, False)]
)
def test_what_fits(config, total, fits):
    plan = planned(config, total)
    assert plan.fits == fits and plan.to_dict()["fits"] == fits
    parts = plan.to_dict()["bytes_per_device"]
    assert (parts["parameters"], parts["optimizer"], parts["batch"], parts["total"]) == (2 * GIB, 4 * GIB, 1000, total)


def test_what_the_compiler_refuses_does_not_fit(config):
    plan = planned(config, 20 * GIB, text=None)
    assert not plan.fits and plan.memory.total == 20 * GIB and plan.seconds is None
    assert plan.model_flops > 0 and plan.to_dict()["wire"] == []


def test_the_estimate_is_the_sum_of_what_binds(config):
    plan, chip = planned(config, 10 * GIB), CHIPS["v5e"]
    train = config.train
    tokens = train.batch_size * train.sequence_length
    assert plan.model_flops == pytest.approx(
        3 * flops_per_token(config.model, train.sequence_length) * tokens, rel=1e-12
    )
    # On one of four chips: 2^20 sines, which read and write 4 MiB each; all else is products of the model.
    mlp = plan.times["mlp"]
    assert mlp.vector == 2**20 / chip.vector and mlp.memory == 2 * 2**22 / chip.memory_rate and mlp.link == 0
    rest = (3 * plan.flops["attention"] + 4 * plan.flops["head"]) / 4 / 197e12
    assert plan.seconds == pytest.approx(rest + max(mlp.matrix, mlp.vector, mlp.memory), rel=1e-12)
    assert plan.mfu == pytest.approx(plan.model_flops / (plan.seconds * 4 * 197e12), rel=1e-12)


def test_nothing_is_estimated_of_a_cpu_or_in_float64(config):
    assert planned(config, 10 * GIB, hardware="cpu:4").seconds is None


def test_passes_count_what_is_computed_again():
    remat = {"a": "full", "b": "dots", "c": "none", "d": "time:2048"}
    assert {kind: passes(kind, remat) for kind in (*"abcd", "e", "head")} == dict(a=4, b=3, c=3, d=4, e=3, head=4)


def test_a_kernels_own_work_is_the_mixers():
    """What a custom call computes cannot be read: the recurrence's FLOPs are the vector units', the rest products."""
    hardware = parse_hardware("v5p:2x2x2")
    flops, inside = {"mamba": 8e12}, {"mamba": 2e12}
    for kernels, vector in ((0, 1e9), (5, 1e9 + 2e12 * 3 / 8)):
        count = Count({"mamba": Work(vector=1e9, kernels=kernels)}, 0.0, {}, 0)
        times = layer_times(count, flops, inside, {}, hardware, "bfloat16")["mamba"]
        assert times.matrix == pytest.approx(6e12 * 3 / 8 / 459e12) and times.vector == vector / CHIPS["v5p"].vector


@pytest.mark.parametrize(
    "hardware, collective, members, rate",
    [
        ("v5p:2x2x2", "all-gather", [0, 1], 200e9),  # both ways round an axis
        ("v5p:2x2x2", "collective-permute", [0, 1], 100e9),  # one way
        ("h100:8x2", "all-gather", [0, 7], 450e9),  # NVLink
        ("h100:8x2", "collective-permute", [0, 7], 450e9),
        ("h100:8x2", "all-gather", [0, 8], 50e9),  # the network
    ],
)
def test_links(hardware, collective, members, rate):
    work = Work(wire=Counter({(collective, ("fsdp",)): 1e9}))
    assert link_time(work, {("fsdp",): members}, parse_hardware(hardware)) == pytest.approx(1e9 / rate)
