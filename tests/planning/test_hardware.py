"""The table of chips, and which topologies there are."""

import pytest

from lcx.errors import UserError
from lcx.planning import mfu
from lcx.planning.hardware import CHIPS, parse_hardware, peak_flops


@pytest.mark.parametrize(
    "text, devices, shape",
    [
        ("v5p:4x4x4", 64, (4, 4, 4)),
        ("v5p:2x2x1", 4, (2, 2, 1)),
        ("v5p:4x4x12", 192, (4, 4, 12)),
        ("v5e:1x1", 1, (1, 1)),
        ("v6e:16x16", 256, (16, 16)),
        ("h100:8", 8, (1, 8)),
        ("h100:8x16", 128, (16, 8)),
        ("cpu:8", 8, (8,)),
    ],
)
def test_topologies_that_there_are(text, devices, shape):
    hardware = parse_hardware(text)
    assert (hardware.devices, hardware.shape, hardware.name) == (devices, shape, text)
    assert hardware.memory > 0


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("v5p:3x3x3", "a v5p slice is 2x2x1, 2x2x2, 2x2x4, 2x4x4 or multiples of 4"),
        ("v5p:8x4x4", "in ascending order"),
        ("v5p:16x16x28", "up to 16x16x24"),
        ("v5e:4x4x4", "a v5e slice is one of 1x1, 2x2"),
        ("v6e:32x32", "a v6e slice is one of"),
        ("v5p", "write the kind and its topology, like v5e:4x4 or v5p:4x4x4"),
        ("v5p:4x4x", "write the kind and its topology"),
        ("v5x:4x4", 'unknown kind "v5x": did you mean'),
        ("h100:16", "a node has 1 to 8 GPUs"),
        ("h100:8x0", "write the kind and its topology"),
        ("cpu:2x2", "a CPU plays 1 to 64 devices"),
        ("cpu:1000", "a CPU plays 1 to 64 devices"),
    ],
)
def test_topologies_that_there_are_not(text, sentence):
    with pytest.raises(UserError) as refused:
        parse_hardware(text)
    assert sentence in str(refused.value) and str(refused.value).startswith("--hardware")


def test_gpus_of_several_nodes():
    two = parse_hardware("h100:8x2")
    assert not two.crosses_nodes([0, 7]) and two.crosses_nodes([0, 8]) and two.crosses_nodes([7, 8])
    assert not parse_hardware("v5p:4x4x4").crosses_nodes([0, 63])


def test_peaks_are_known_by_the_names_that_jax_gives_devices():
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5", "bfloat16") == 459e12
    assert peak_flops("TPU v6 lite", "bfloat16") == 918e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 2 * peak_flops("NVIDIA H100 80GB HBM3", "float32")
    assert peak_flops("cpu", "float32") is None and peak_flops("TPU v5", "float64") is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_utilisation_by_hand():
    # 1e12 FLOPs forward for 1,000 tokens, three times that in training, at 50,000 tokens a second: 150 TFLOP/s.
    assert mfu(10**12, 1000, 50_000.0, devices=2, peak=100e12) == pytest.approx(0.75)
    assert mfu(None, 1000, 5e4, 2, 1e14) is None and mfu(10**12, 1000, 5e4, 2, None) is None
