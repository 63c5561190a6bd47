"""Equal architectures: counts within 1%, widths that divide, and what was chosen is said."""

import itertools

import pytest

from lcx.cli.sweep import Measure
from lcx.errors import UserError
from lcx.schema import build
from lcx.sweeps.expand import expand
from lcx.sweeps.spec import Sweep

FAMILIES = ["transformer", "mamba", "mamba2", "samba", "infini", "sink"]
MEASURE = Measure()


def trials_of(families, **fields):
    configs = {family: f"configs/{family}.py:size=tiny" for family in families}
    return expand(build(Sweep, {"configs": configs} | fields), MEASURE)


def check(trials, match):
    """All of one size within 1% of each other, with widths and heads that eight devices divide."""
    for _, group in itertools.groupby(sorted(trials, key=lambda trial: trial.size), key=lambda trial: trial.size):
        group = list(group)
        counts = [MEASURE(trial.config, match) for trial in group]
        assert max(counts) <= 1.01 * min(counts), {
            trial.name: count for trial, count in zip(group, counts, strict=True)
        }
        assert abs(counts[0] / group[0].size - 1) < 0.06
        for trial in group:
            model = trial.config["model"]
            assert model["d_model"] % 8 == 0
            for record in model["mixers"].values():
                assert record.get("d_ff", 8) % 8 == 0 and record.get("num_heads", 8) % 8 == 0
                if record["type"] == "mamba2":
                    assert 2 * model["d_model"] // record["head_dim"] % 8 == 0
            base = expand(build(Sweep, {"configs": {"x": f"configs/{trial.family}.py:size=tiny"}}), MEASURE)[0].config[
                "model"
            ]
            for key in ("d_model", "periods"):
                assert (f"model.{key}" in trial.chosen) == (model[key] != base[key]), "what was chosen is said"


@pytest.mark.parametrize("match, size", [("parameters", 8e5), ("flops", 2e6)])
def test_two_families_within_one_percent(match, size):
    check(trials_of(["transformer", "mamba"], match=match, sizes=[size]), match)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("match, sizes", [("parameters", [3e5, 1e6, 4e6]), ("flops", [1e6, 4e6])])
def test_all_families_within_one_percent_at_several_sizes(match, sizes):
    trials = trials_of(FAMILIES, match=match, sizes=sizes)
    assert len(trials) == len(FAMILIES) * len(sizes)
    check(trials, match)


def test_without_sizes_the_first_config_stays_what_it_is():
    first, second = trials_of(["samba", "transformer"], match="parameters")
    assert not first.chosen and first.size == 987_776
    assert abs(MEASURE(second.config, "parameters") / 987_776 - 1) < 0.01 and second.chosen


def test_equal_tokens_by_steps():
    fields = {"set": {"train.steps": 50}, "grid": {"train.batch_size": [2, 8]}}
    with pytest.raises(UserError, match='match="tokens" decides it'):
        trials_of(["mamba"], match="tokens", sizes=[1e5], **fields)
    trials = trials_of(["mamba"], match="tokens", sizes=[409_600], grid=fields["grid"])
    assert [trial.config["train"]["steps"] for trial in trials] == [400, 100]


def test_budgets_decide_steps():
    """FLOPs of a training are three times those of its forward passes."""
    (small, large) = trials_of(["mamba"], budgets=[1e12, 2e12])
    per_step = 3 * MEASURE(small.config, "flops") * 8 * 512
    steps = [trial.config["train"]["steps"] for trial in (small, large)]
    assert steps == [round(1e12 / per_step), round(2e12 / per_step)]
    assert small.name == "mamba-1e+12FLOPs" and small.chosen == {"train.steps": steps[0]}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sizes": [2000.0]}, "cannot have 2K parameters"),
        ({"match": "tokens", "sizes": [6000.0]}, "no number of steps of 4096 tokens is within 1% of 6K tokens"),
    ],
)
def test_what_cannot_be_matched_is_said(fields, message):
    with pytest.raises(UserError, match=message):
        trials_of(["transformer", "mamba"], **({"match": "parameters"} | fields))
