"""What a device needs for a longer sequence, where eight devices share it."""

import jax
import pytest

from lcx.config import MESH_AXES, Config, load_config
from lcx.parallel.mesh import make_mesh
from lcx.training.trainer import lower_step, make_program

SHORT, LONG = 8192, 16384
FAMILIES = {"transformer": {}, "samba": {"swa": {"window": 128}}, "infini": {"infini": {"segment_length": 128}}}


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
    slopes = {shards: temporaries(family, LONG, shards) - temporaries(family, SHORT, shards) for shards in (1, 8)}
    ratio = slopes[8] / slopes[1]
    record_property("deviation", (f"slope of temporaries over T, seq=8 over seq=1, {family}", "float32", ratio))
    assert ratio <= 1 / 7, slopes
