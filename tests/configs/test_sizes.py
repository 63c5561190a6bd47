"""The shipped configs: published parameter counts by formula, recipes, and what every size must be able to do."""

import dataclasses
import math
from pathlib import Path

import pytest

from lcx.config import Config, load_config
from lcx.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"

# Published, or summed by hand from the published shapes.
COUNTS = {
    "transformer:438m": 438_081_024,
    "transformer:1.3b": 1_347_842_304,
    "transformer:1.6b": 1_641_187_328,
    "transformer:mistral-1.6b": 1_641_187_328,
    "transformer:pp-125m": 123_568_896,
    "transformer:pp-350m": 359_818_240,
    "transformer:pp-760m": 756_782_592,
    "transformer:pp-1.3b": 1_317_324_800,
    "mamba:130m": 129_135_360,
    "mamba:370m": 371_516_416,
    "mamba:790m": 793_204_224,
    "mamba:1.4b": 1_372_178_432,
    "mamba:2.8b": 2_768_345_600,
    "mamba:432m": 432_804_864,
    "mamba:samba-1.3b": 1_334_740_992,
    "mamba:1.8b": 1_795_295_232,
    "samba:421m": 421_793_280,
    "samba:1.3b": 1_330_207_488,
    "samba:1.7b": 1_742_194_688,
    "samba:3.8b": 3_864_275_712,
}
TINY = ["transformer:tiny", "mamba:tiny", "samba:tiny"]


def config_of(name, more=""):
    family, size = name.split(":")
    return Config.from_dict(load_config(f"{CONFIGS}/{family}.py:size={size}{more}"))


def attention_parameters(d_model, num_heads, num_kv_heads=None, head_dim=None, **_):
    width, kv_heads = head_dim or d_model // num_heads, num_kv_heads or num_heads
    return d_model * (num_heads + 2 * kv_heads) * width + num_heads * width * d_model


def mamba_parameters(d_model, expand=2, state_size=16, conv_width=4, **_):
    """The terms of Gu and Dao's mamba_simple.py: in, conv, x, dt with bias, A_log and D, out."""
    inner, rank = expand * d_model, math.ceil(d_model / 16)
    convolution, x = inner * (conv_width + 1), inner * (rank + 2 * state_size)
    return 2 * inner * d_model + convolution + x + (inner * rank + inner) + inner * (state_size + 1) + inner * d_model


PARAMETERS = {
    "attention": attention_parameters,
    "mamba": mamba_parameters,
    "mlp": lambda d_model, d_ff, **_: 3 * d_model * d_ff,
}


def parameters(model):
    """The number of parameters of a model, from its config alone; every residual layer has one norm."""
    layers = model.pattern.split() * model.periods
    mixers = sum(PARAMETERS[model.mixers[name]["type"]](model.d_model, **model.mixers[name]) for name in layers)
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * model.d_model
    return mixers + (len(layers) + 1) * model.d_model + embeddings


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    assert parameters(config_of(name).model) == COUNTS[name]


def test_every_size_is_counted():
    for family in ("transformer", "mamba", "samba"):
        with pytest.raises(UserError) as refusal:
            load_config(f"{CONFIGS}/{family}.py:size=?")
        sizes = str(refusal.value).split("Allowed: ")[1].rstrip(".").split(", ")
        assert {f"{family}:{size}" for size in sizes} == {n for n in [*COUNTS, *TINY] if n.startswith(family)}


@pytest.mark.parametrize("name", COUNTS)
def test_sequence_length_changes_neither_tokens_per_step_nor_steps(name):
    published, longer = config_of(name), config_of(name, ",sequence_length=32768")
    assert longer.train.sequence_length == 32_768
    assert longer.train.steps == published.train.steps
    tokens = [c.train.batch_size * c.train.sequence_length for c in (published, longer)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("name", "tokens", "per_step", "learning_rate", "final"),
    [
        ("samba:421m", 20e9, 512 * 4096, 4e-4, 4e-5),
        ("samba:1.7b", 230e9, 2048 * 4096, 6e-4, 6e-5),
        ("mamba:130m", 300e9, 2**19, 3e-3, 1e-5),
        ("mamba:2.8b", 300e9, 2**20, 8e-4, 1e-5),
        ("transformer:438m", 20e9, 512 * 4096, 4e-4, 4e-5),
        ("transformer:pp-125m", 4_800 * 2**19, 2**19, 3e-3, 1e-5),
        ("transformer:pp-1.3b", 50_000 * 2**19, 2**19, 1e-3, 1e-5),
    ],
)
def test_published_recipes(name, tokens, per_step, learning_rate, final):
    config = config_of(name)
    assert config.train.batch_size * config.train.sequence_length == per_step
    assert 0 <= config.train.steps * per_step - tokens < per_step
    assert config.optimizer.learning_rate == learning_rate
    assert math.isclose(config.optimizer.learning_rate * config.optimizer.final_ratio, final)
    assert config.optimizer.decay_all == (name in ("samba:421m", "samba:1.7b", "transformer:438m"))


@pytest.mark.parametrize("name", TINY)
def test_tiny_divides_on_every_mesh_of_up_to_eight_devices(name):
    config = config_of(name)
    sizes = [config.train.batch_size, config.train.sequence_length, config.model.d_model, config.model.vocab_size]
    for mixer in config.model.mixers.values():
        sizes += [mixer[key] for key in ("num_heads", "num_kv_heads", "d_ff", "window") if mixer.get(key)]
    assert all(size % 8 == 0 for size in sizes)
    assert config.model.vocab_size == 256 and config.data.tokenizer == "bytes"
    assert config.data.sources[0].path == "stdlib"


def test_quickstart_is_the_tiny_samba():
    quickstart = Config.from_dict(load_config(CONFIGS / "quickstart.py"))
    assert dataclasses.replace(quickstart.model, remat={}) == config_of("samba:tiny").model
    shorter = Config.from_dict(load_config(f"{CONFIGS}/quickstart.py:sequence_length=256"))
    assert shorter.train.sequence_length == 256


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_file_says_how_to_run_it_and_refuses_unknown_options(path):
    assert f"python scripts/train.py --config=configs/{path.name}" in path.read_text()
    Config.from_dict(load_config(path))
    with pytest.raises(UserError, match='did you mean "sequence_length"'):
        load_config(f"{path}:sequence_lenght=512")
