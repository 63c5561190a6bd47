"""What a device needs for a longer sequence, where eight devices share it."""

import jax
import pytest

from lcx.config import MESH_AXES, Config, load_config
from lcx.parallel.mesh import make_mesh
from lcx.training.trainer import lower_step, make_program

FAMILIES = {"transformer": {}, "samba": {"swa": {"window": 128}}, "infini": {"infini": {"segment_length": 128}}}
# The shorter length; the other one is twice that. With few thousand tokens a device, what the CPU's compiler lays out
# anew for a product moves the ratio by 4% either way. Full attention takes smaller blocks of queries where there are
# more keys: between these lengths they are the same on one device and on eight.
LENGTHS = {"transformer": 8192, "samba": 65_536, "infini": 65_536}


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
    length = LENGTHS[family]
    slopes = {
        shards: temporaries(family, 2 * length, shards) - temporaries(family, length, shards) for shards in (1, 8)
    }
    ratio = slopes[8] / slopes[1]
    record_property("deviation", (f"slope of temporaries over T, seq=8 over seq=1, {family}", "float32", ratio))
    assert ratio <= 1 / 7, slopes


@pytest.mark.slow
def test_full_attention_takes_memory_in_proportion_to_its_length():
    """Masks and what fills them do not depend on a layer's input, and were kept for all blocks of queries at once."""
    short, long = (temporaries("transformer", length, shards=1) for length in (4096, 16_384))
    assert long < 4.2 * short
