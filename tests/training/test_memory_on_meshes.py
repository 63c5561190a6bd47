"""What a device needs for a longer sequence, where eight devices share it."""

import itertools

import jax
import pytest

from lcx.config import MESH_AXES, Config, load_config
from lcx.parallel.mesh import make_mesh
from lcx.training.trainer import lower_step, make_program

FAMILIES = {"transformer": {}, "samba": {"swa": {"window": 128}}, "infini": {"infini": {"segment_length": 128}}}
LENGTHS = [4096, 8192, 16_384, 32_768, 65_536, 131_072]  # each twice as long as the one before


def temporaries(family: str, length: int, shards: int) -> int:
    values = load_config(f"configs/{family}.py:sequence_length={length}")
    for name, options in FAMILIES[family].items():
        values.model.mixers[name].update(options)
    values.train.batch_size = 1
    values.mesh.update(dict.fromkeys(MESH_AXES, 1) | {"seq": shards})
    config = Config.from_dict(values)
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:shards]))
    return lower_step(program).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.mesh
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_longer_sequence_costs_a_seventh(family, record_property):
    """At every length: of the temporaries that twice the length adds, a device of eight has a seventh at most."""
    held = {shards: [temporaries(family, length, shards) for length in LENGTHS] for shards in (1, 8)}
    added = {shards: [long - short for short, long in itertools.pairwise(found)] for shards, found in held.items()}
    ratios = {length: eight / one for length, one, eight in zip(LENGTHS, added[1], added[8], strict=False)}
    what = f"slope of temporaries over T, seq=8 over seq=1, {family}"
    record_property("deviation", (what, "float32", max(ratios.values())))
    assert all(0 < ratio <= 1 / 7 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_full_attention_takes_memory_in_proportion_to_its_length():
    """Masks and what fills them do not depend on a layer's input, and were kept for all blocks of queries at once."""
    short, long = (temporaries("transformer", length, shards=1) for length in (4096, 16_384))
    assert long < 4.2 * short
