"""docs/zoo.md says what the code says: every row of its tables is computed here.

Where a table differs, the failure shows the lines that belong on the page.
"""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from lcx.config import Config, load_config
from lcx.errors import UserError
from lcx.mixers import MIXERS
from lcx.planning import abstract_model, flops_per_token, parameter_count, state_bytes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "zoo.md").read_text()

CONTEXTS = {"4K": 2**12, "32K": 2**15, "256K": 2**18, "1M": 2**20}
SIZES_HEAD = [
    "| options | parameters | state at 4K | 32K | 256K | 1M | FLOPs per token at 4K | 32K |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
]
OPTIONS_HEAD = ["| option | default | |", "| --- | --- | --- |"]
# What a family has besides its sizes.
VARIANTS = {
    "samba": [
        *(f"size=421m,pattern={name}" for name in ("mamba-swa-mlp", "mamba-mlp", "swa-mlp", "nope", "two-windows")),
        "size=421m,full_attention=11",
        *(f"size=1.7b,pattern={name}" for name in ("mamba-swa-mlp", "mamba-mlp")),
    ],
    "infini": ["size=paper,update=segment_delta"],
    "sink": ["size=160m,form=token", "size=160m,form=token,window=1023"],
}


def config_module(path):
    spec = importlib.util.spec_from_file_location(f"zoo_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Every config file with sizes is a family.
FAMILIES = {
    path.stem: module
    for path in sorted((ROOT / "configs").glob("*.py"))
    if hasattr(module := config_module(path), "SIZES")
}


def digits(value, units):
    """Four significant digits, with the unit that leaves at most three before the point."""
    power = 0
    while round(value) >= 1000:
        value, power = value / 1000, power + 1
    return f"{value:#.4g} {units[power]}".rstrip()


def bytes_of(value):
    return digits(value, ("B", "kB", "MB", "GB", "TB"))


def row(family, options):
    model = Config.from_dict(load_config(f"{ROOT}/configs/{family}.py:{options}")).model
    model = abstract_model(dataclasses.replace(model, compute_dtype="bfloat16"))
    states = " | ".join(bytes_of(state_bytes(model, context)) for context in CONTEXTS.values())
    flops = " | ".join(
        digits(flops_per_token(model, CONTEXTS[name]), ("", "k", "M", "G", "T")) for name in ("4K", "32K")
    )
    return f"| `{options}` | {parameter_count(model):,} | {states} | {flops} |"


def section(heading):
    """The page from a heading to the next that is no deeper."""
    depth = len(heading.split()[0])
    assert PAGE.count(f"\n{heading}\n") == 1, f'docs/zoo.md should have the heading "{heading}" once'
    return re.split(rf"\n#{{2,{depth}}} ", PAGE.split(f"\n{heading}\n")[1])[0]


def assert_stands(lines, where):
    """The lines stand together in the section, as a whole table."""
    table = "\n".join(lines)
    assert f"\n\n{table}\n\n" in f"\n{section(where)}\n\n", (
        f'docs/zoo.md, "{where}", should have the table\n\n{table}\n'
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family):
    options = [f"size={size}" for size in FAMILIES[family].SIZES] + VARIANTS.get(family, [])
    assert_stands([*SIZES_HEAD, *(row(family, each) for each in options)], f"## configs/{family}.py")


def test_every_pattern_of_samba_has_a_row():
    shown = {option for options in VARIANTS["samba"] for option in options.split(",")}
    assert {f"pattern={name}" for name in FAMILIES["samba"].PATTERNS if name != "samba"} <= shown
    for pattern in FAMILIES["samba"].PATTERNS.values():
        assert f"`{pattern}`" in section("## configs/samba.py")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_of_a_config_file_is_named(family):
    with pytest.raises(UserError) as refusal:
        load_config(f"{ROOT}/configs/{family}.py:?=")
    for option in str(refusal.value).split("Allowed: ")[1].rstrip(".").split(", "):
        where = PAGE if option in ("size", "sequence_length") else section(f"## configs/{family}.py")
        assert f"`{option}" in where, option


@pytest.mark.parametrize("type_name", MIXERS)
def test_options(type_name):
    """Every option with its default; what stands in the last column is for people."""
    found = [line.split(" | ")[:2] for line in section(f"### {type_name}").splitlines() if line.startswith("| `")]
    expected = []
    for field in dataclasses.fields(MIXERS[type_name].Options):
        required = field.default is dataclasses.MISSING
        expected.append([f"| `{field.name}`", "required" if required else f"`{field.default}`".lower()])
    assert found == expected
