"""A config made small: narrower, shallower, shorter, and otherwise the same."""

import math

import pytest

from lcx.config import Config, load_config
from lcx.errors import UserError
from lcx.laws.shrink import shrink, without_repeats
from lcx.models.pattern import parse_pattern

MESH = {"data": 2, "fsdp": 1, "seq": 4, "tensor": 1}


def small(text: str, mesh: dict, **sections) -> Config:
    file, _, options = text.partition(":")
    values = load_config(f"configs/{file}.py:{options}").to_dict()
    for section, changes in sections.items():
        values[section] |= changes
    return shrink(Config.from_dict(values), MESH | mesh, lambda config: None)


def test_what_is_not_size_stays():
    values = load_config("configs/samba.py:size=421m").to_dict()["model"]["remat"] | {"mlp": "time:2048"}
    shrunk = small("samba:size=421m", {}, train={"accumulate": 4, "z_loss": 0.5}, model={"remat": values})
    assert shrunk.model.remat["mlp"] == "time:5"  # of rows of 16
    assert shrunk.model.pattern == "mamba mlp swa mlp" and shrunk.model.periods == 2
    assert shrunk.model.mixers == {
        "mamba": {"type": "mamba", "state_size": 4, "chunk_size": 4},
        "mlp": {"type": "mlp", "d_ff": 40},
        "swa": {
            "type": "attention", "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "window": 7, "sink_tokens": 0,
        },
    }  # fmt: skip
    assert (shrunk.model.d_model, shrunk.model.vocab_size, shrunk.model.remat["swa"]) == (32, 61, "full")
    assert shrunk.train.sequence_length == 16 and shrunk.train.accumulate == 2 and shrunk.train.z_loss == 0.5
    assert shrunk.train.batch_size == 12  # three rows for each of the two shards, twice


@pytest.mark.parametrize(
    "text, tensor, heads",
    [
        ("samba:size=1.7b", 1, (8, 2)),  # 32 : 4, the ratio up to 4
        ("samba:size=1.7b", 4, (16, 4)),
        ("samba:size=3.8b", 1, (4, 1)),  # 11 : 1
        ("samba:size=1.3b", 2, (2, 2)),
        ("samba:size=1.3b", 6, (6, 6)),
    ],
)
def test_heads_divide_as_before(text, tensor, heads):
    record = small(text, {"tensor": tensor}).model.mixers["swa"]
    assert (record["num_heads"], record["num_kv_heads"]) == heads


@pytest.mark.parametrize("size, tensor, groups", [("370m", 4, 1), ("codestral-7b", 4, 4), ("codestral-7b", 1, 2)])
def test_groups_divide_or_do_not_as_before(size, tensor, groups):
    shrunk = small(f"mamba2:size={size}", {"tensor": tensor}).model
    record = shrunk.mixers["mamba2"]
    assert record["num_groups"] == groups
    assert 2 * shrunk.d_model // record["head_dim"] % math.lcm(groups, tensor) == 0


def test_a_wider_window_stays_the_wider_one():
    mixers = small("samba:size=421m,pattern=two-windows", {}).model.mixers
    assert (mixers["swa"]["window"], mixers["wide"]["window"]) == (7, 13)


def test_windows_that_are_small_already_stay():
    assert small("sink:form=token,window=3", {}).model.mixers["attention"]["window"] == 3


@pytest.mark.parametrize("seq, length", [(1, 16), (2, 16), (3, 18), (4, 16), (8, 32)])
def test_shards_of_time_have_some_tokens(seq, length):
    assert small("samba", {"seq": seq}, train={"sequence_length": 24 * seq}).train.sequence_length == length


def test_a_width_that_a_users_mixer_needs_is_found():
    def fits(config):
        if config.model.d_model % 12:
            raise UserError("d_model must be a multiple of 12.")

    config = Config.from_dict(load_config("configs/samba.py:size=421m"))
    assert shrink(config, MESH, fits).model.d_model == 48

    def never(config):
        raise UserError("no.")

    with pytest.raises(UserError, match="no."):
        shrink(config, MESH, never)


def test_long_patterns_lose_repeats():
    long = "mamba mlp attention mlp " + "mamba mlp " * 3 + "parallel(mamba, attention) mlp " + "mamba mlp " * 2
    short = without_repeats(long, ["mamba", "mlp", "attention"])
    assert short == "mamba mlp attention mlp mamba mlp parallel(mamba, attention) mlp mamba mlp"
    assert len(parse_pattern(short, ["mamba", "mlp", "attention"])) == 10
    assert without_repeats("mamba mamba mlp mlp", ["mamba", "mlp"]) == "mamba mamba mlp mlp"
