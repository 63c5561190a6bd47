"""The shipped configs: published parameter counts by formula, recipes, and what every size must be able to do."""

import dataclasses
import math
import re
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
    "mamba2:130m": 128_989_632,
    "mamba2:370m": 368_346_624,
    "mamba2:780m": 780_161_280,
    "mamba2:1.3b": 1_343_757_312,
    "mamba2:2.7b": 2_702_599_680,
    "mamba2:codestral-7b": 7_285_403_648,
    "samba:421m": 421_793_280,
    "samba:1.3b": 1_330_207_488,
    "samba:1.7b": 1_742_194_688,
    "samba:3.8b": 3_864_275_712,
    "infini:paper": 234_120_288,
    "sink:160m": 162_220_944,
}
# Ablations of the SAMBA paper, which it calls 400M, 1.6B and 1.9B; the others are named after the size they vary.
VARIANTS = {
    "samba:421m,pattern=mamba-swa-mlp": 394_999_296,
    "samba:1.7b,pattern=mamba-swa-mlp": 1_655_330_816,
    "samba:1.7b,pattern=mamba-mlp": 1_946_224_640,
    "samba:421m,pattern=mamba-mlp": 454_657_536,
    "samba:421m,pattern=swa-mlp": 388_929_024,
    "samba:421m,pattern=nope": 421_793_280,
    "samba:421m,pattern=two-windows": 421_793_280,
    "samba:421m,full_attention=1+5": 443_702_784,
    "transformer:438m,window=2048": 438_081_024,
    "infini:paper,update=segment_delta": 234_120_288,
    "sink:160m,form=zero": 162_220_944 - 12 * 12,
    "sink:160m,form=token,window=1023": 162_220_944 - 12 * 12,
}
FAMILIES = ["transformer", "mamba", "mamba2", "samba", "infini", "sink"]
TINY = [f"{family}:tiny" for family in FAMILIES] + ["sink:tiny,form=token", "samba:tiny,pattern=two-windows"]


def config_of(name, more=""):
    family, size = name.split(":")
    return Config.from_dict(load_config(f"{CONFIGS}/{family}.py:size={size}{more}"))


def attention_parameters(d_model, num_heads, num_kv_heads=None, head_dim=None, sink=None, **_):
    width, kv_heads = head_dim or d_model // num_heads, num_kv_heads or num_heads
    logits = num_heads if sink == "logit" else 0
    return d_model * (num_heads + 2 * kv_heads) * width + num_heads * width * d_model + logits


def mamba_parameters(d_model, expand=2, state_size=16, conv_width=4, **_):
    """The terms of Gu and Dao's mamba_simple.py: in, conv, x, dt with bias, A_log and D, out."""
    inner, rank = expand * d_model, math.ceil(d_model / 16)
    convolution, x = inner * (conv_width + 1), inner * (rank + 2 * state_size)
    return 2 * inner * d_model + convolution + x + (inner * rank + inner) + inner * (state_size + 1) + inner * d_model


def mamba2_parameters(d_model, expand=2, state_size=128, head_dim=64, num_groups=1, conv_width=4, **_):
    """The terms of Dao and Gu's mamba2.py: in, conv over x, B and C, dt_bias with A_log and D, norm, out."""
    inner, B_C = expand * d_model, 2 * num_groups * state_size
    heads = inner // head_dim
    return d_model * (2 * inner + B_C + heads) + (inner + B_C) * (conv_width + 1) + 3 * heads + inner + inner * d_model


PARAMETERS = {
    "attention": attention_parameters,
    "infini": lambda d_model, num_heads, **more: attention_parameters(d_model, num_heads, **more) + num_heads,
    "mamba": mamba_parameters,
    "mamba2": mamba2_parameters,
    "mlp": lambda d_model, d_ff, **_: 3 * d_model * d_ff,
}


def parameters(model):
    """The number of parameters of a model, from its config alone; every residual layer has one norm."""
    layers = model.pattern.split() * model.periods
    mixers = sum(PARAMETERS[model.mixers[name]["type"]](model.d_model, **model.mixers[name]) for name in layers)
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * model.d_model
    return mixers + (len(layers) + 1) * model.d_model + embeddings


@pytest.mark.parametrize("name", COUNTS | VARIANTS)
def test_published_counts(name):
    assert parameters(config_of(name).model) == (COUNTS | VARIANTS)[name]


def test_every_size_is_counted():
    for family in FAMILIES:
        with pytest.raises(UserError) as refusal:
            load_config(f"{CONFIGS}/{family}.py:size=?")
        sizes = str(refusal.value).split("Allowed: ")[1].rstrip(".").split(", ")
        counted = {name for name in [*COUNTS, f"{family}:tiny"] if name.startswith(f"{family}:")}
        assert {f"{family}:{size}" for size in sizes} == counted


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
        ("mamba2:130m", 300e9, 2**19, 3e-3, 1e-5),
        ("mamba2:2.7b", 300e9, 2**20, 8e-4, 1e-5),
        ("transformer:438m", 20e9, 512 * 4096, 4e-4, 4e-5),
        ("transformer:pp-125m", 4_800 * 2**19, 2**19, 3e-3, 1e-5),
        ("transformer:pp-1.3b", 50_000 * 2**19, 2**19, 1e-3, 1e-5),
        ("infini:paper", 30_000 * 2**21, 2**21, 3e-4, 3e-5),
        ("sink:160m", 143_000 * 2**19, 2**19, 6e-4, 6e-5),
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
        divided = ("num_heads", "num_kv_heads", "num_groups", "d_ff", "window", "segment_length")
        sizes += [mixer[key] for key in divided if mixer.get(key)]
        sizes += [2 * config.model.d_model // mixer["head_dim"]] if mixer["type"] == "mamba2" else []
    assert all(size % 8 == 0 for size in sizes)
    assert config.model.vocab_size == (256 if config.data.start_token is None else 264)
    assert config.data.tokenizer == "bytes"
    assert config.data.sources[0].path == "stdlib"


def test_ablations_are_what_their_names_say():
    nope = config_of("samba:421m,pattern=nope").model
    assert nope.mixers["swa"]["rope_base"] is None and nope.pattern == "mamba mlp swa mlp"
    windows = config_of("samba:421m,pattern=two-windows").model
    assert [windows.mixers[name]["window"] for name in ("swa", "wide")] == [2048, 8192] and windows.periods == 3
    full = config_of("samba:421m,full_attention=1+11").model
    blocks = full.pattern.split()[::2]
    assert [i for i, name in enumerate(blocks) if name == "attention"] == [1, 11] and len(blocks) == 12
    assert "window" not in full.mixers["attention"] and set(blocks) == {"mamba", "attention"}
    token = config_of("sink:160m,form=token,window=1023")
    assert token.data.start_token == 50_303 and token.model.mixers["attention"]["sink_tokens"] == 1
    assert config_of("sink:160m").data.start_token is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("samba:1.3b,pattern=two-windows", "8 layers, which do not divide the 36 of size=1.3b"),
        ("samba:421m,pattern=mamba", 'unknown pattern "mamba": did you mean'),
        ("samba:421m,full_attention=12", "full_attention=12: write blocks from 0 to 11"),
        ("samba:421m,full_attention=a", "full_attention=a: write blocks"),
        ("samba:421m,full_attention=1,pattern=nope", "no other pattern than mamba-mlp"),
        ("sink:tiny,form=tokens", 'unknown form "tokens": did you mean "token"'),
    ],
)
def test_impossible_variants_are_refused(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_of(name)


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
