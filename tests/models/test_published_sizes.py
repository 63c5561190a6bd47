"""Every shipped size, built abstractly: the published parameter counts, summed over the leaves of the model."""

import importlib.util
from pathlib import Path

import pytest

from lcx.config import Config, load_config
from lcx.training.train_state import blueprint, count_parameters

CONFIGS = Path("configs")
# FACTS of the papers and their code; Transformer++ of the Mamba papers is published without counts.
PUBLISHED = {
    ("transformer", "438m"): 438_081_024,
    ("transformer", "1.3b"): 1_347_842_304,
    ("transformer", "1.6b"): 1_641_187_328,
    ("mamba", "130m"): 129_135_360,
    ("mamba", "370m"): 371_516_416,
    ("mamba", "790m"): 793_204_224,
    ("mamba", "1.4b"): 1_372_178_432,
    ("mamba", "2.8b"): 2_768_345_600,
    ("mamba", "432m"): 432_804_864,
    ("mamba", "samba-1.3b"): 1_334_740_992,
    ("mamba", "1.8b"): 1_795_295_232,
    ("samba", "421m"): 421_793_280,
    ("samba", "1.3b"): 1_330_207_488,
    ("samba", "1.7b"): 1_742_194_688,
    ("samba", "3.8b"): 3_864_275_712,
    ("transformer", "pp-125m"): 123_568_896,
    ("transformer", "pp-350m"): 359_818_240,
    ("transformer", "pp-760m"): 756_782_592,
    ("transformer", "pp-1.3b"): 1_317_324_800,
    ("transformer", "mistral-1.6b"): 1_641_187_328,
}


def sizes_of(family: str) -> list[str]:
    spec = importlib.util.spec_from_file_location(family, CONFIGS / f"{family}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.SIZES)


ALL = [(family, size) for family in ("transformer", "mamba", "samba") for size in sizes_of(family)]


@pytest.mark.parametrize("family, size", ALL)
def test_parameter_count(family, size):
    config = Config.from_dict(load_config(CONFIGS / f"{family}.py:size={size}"))
    count = count_parameters(blueprint(config).shapes)
    assert count == PUBLISHED[family, size] if size != "tiny" else count < 2_000_000


def test_every_published_count_is_shipped():
    assert set(PUBLISHED) <= set(ALL)
