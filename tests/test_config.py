"""Configs: defaults, coercion, refusals, options, overrides and files."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from lcx.config import (
    Config,
    DataConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    choose,
    default_config,
    load_config,
    override,
    parse_options,
)
from lcx.errors import UserError


@pytest.fixture
def config():
    config = default_config()
    config.model.pattern = "swa mlp"
    config.model.mixers = {"swa": {"type": "attention", "num_heads": 8}, "mlp": {"type": "mlp", "d_ff": 384}}
    return config


def test_defaults_are_the_dataclasses_in_every_form():
    plain = json.loads(json.dumps(Config().to_dict()))
    for form in (default_config(), default_config().to_dict(), plain, Config(), {}):
        assert Config.from_dict(form) == Config()


def test_sections_alone_name_their_keys_in_full(config):
    model = ModelConfig.from_dict(config.model)
    assert model == Config.from_dict(config).model == ModelConfig.from_dict(model)
    config.model.d_modle = 3
    with pytest.raises(UserError, match='"model.d_modle": did you mean "d_model"'):
        ModelConfig.from_dict(config.model)


def test_an_instance_is_validated_again():
    with pytest.raises(UserError, match="train.steps must be at least 1, not 0"):
        TrainConfig.from_dict(TrainConfig(steps=0))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "1e3", 1000),
        ("train.steps", "1000.0", 1000),
        ("train.z_loss", "1", 1.0),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.betas", "0.8,0.9", (0.8, 0.9)),
        ("optimizer.betas", "[0, 0.9]", (0.0, 0.9)),
        ("model.tie_embeddings", "False", False),
        ("model.tie_embeddings", "false", False),
        ("model.tie_embeddings", "TRUE", True),
        ("model.pattern", "swa", "swa"),
        ("model.pattern", "'swa mlp'", "swa mlp"),
        ("data.tokenizer", "123", "123"),
        ("model.remat", "{'swa': 'full'}", {"swa": "full"}),
        ("model.remat", "{'swa': 'time:2048'}", {"swa": "time:2048"}),
        ("data.sources", "[{'name': 'a', 'path': 'b'}]", (SourceConfig(name="a", path="b"),)),
    ],
)
def test_a_text_becomes_the_fields_type(config, key, text, value):
    override(config, key, text)
    section, name = key.split(".")
    found = getattr(getattr(Config.from_dict(config), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("train.steps", 0, "train.steps must be at least 1, not 0."),
        ("train.steps", 1.5, "train.steps must be an integer, not 1.5."),
        ("train.steps", "1.5", "train.steps must be an integer, not '1.5'."),
        ("train.steps", True, "train.steps must be an integer, not True."),
        ("train.steps", None, "train.steps must be an integer, not None."),
        ("train.steps", "nan", "train.steps must be an integer, not 'nan'."),
        ("train.seed", 2**31, "train.seed must be at most 2147483647, not 2147483648."),
        ("train.accumulate", 3, "train.accumulate = 3 must divide train.batch_size = 8."),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate must be a number, not inf."),
        ("optimizer.eps", 0, "optimizer.eps must be above 0, not 0.0."),
        ("optimizer.betas", (0.9, 1.0), "optimizer.betas[1] must be below 1, not 1.0."),
        ("optimizer.betas", (0.9,), "optimizer.betas must be a list of 2 (a number, a number), not [0.9]."),
        ("optimizer.schedule", "cosin", 'optimizer.schedule cannot be "cosin": did you mean "cosine"?'),
        ("model.tie_embeddings", 2, "model.tie_embeddings must be true or false, not 2."),
        ("model.param_dtype", "float8", 'model.param_dtype cannot be "float8": did you mean "float64"?'),
        ("model.mixers", {"a": 3}, "model.mixers.a must be a mapping of names to values, not 3."),
        ("model.remat", {"mpl": "full"}, 'model.remat.mpl: no mixer has this name: did you mean "mlp"?'),
        (
            "model.remat",
            {"mlp": "all"},
            'model.remat.mlp cannot be "all": did you mean "full"? Allowed: dots, full, none, offload, time:TOKENS.',
        ),
        ("model.remat", {"mlp": "time:0"}, 'model.remat.mlp cannot be "time:0": did you mean "time:TOKENS"?'),
        ("data.sources", [], "data.sources is empty"),
        ("data.sources", [{"name": "a"}], '"data.sources[0].path" is missing'),
        ("data.sources", [{"name": "a", "path": "b", "pth": 1}], '"data.sources[0].pth": did you mean "path"?'),
        ("data.sources", [{"name": "a", "path": "b", "weight": 0}], "data.sources[0].weight must be above 0"),
        ("data.sources", [{"name": "a", "path": "b"}] * 2, "must have different names"),
        ("mesh.seq", 0, "mesh.seq must be at least 1, or -1"),
        ("mesh.seq", -1, "mesh.data and mesh.seq are both -1"),
        ("train.stepz", 3, 'unknown key "train.stepz": did you mean "steps"? Allowed: accumulate,'),
        ("trian", {}, 'unknown key "trian": did you mean "train"?'),
        ("train", 3, "train must be a mapping of names to values, not 3."),
    ],
)
def test_a_bad_value_is_one_sentence(config, key, value, sentence):
    section, _, name = key.partition(".")
    target, name = (config[section], name) if name else (config, section)
    target[name] = value
    with pytest.raises(UserError) as refusal:
        Config.from_dict(config)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@given(st.integers(1, 2**53), st.sampled_from([int, float, str, np.int64, np.float64, lambda n: f"{n}.0"]))
def test_integers_keep_their_value_in_every_spelling(steps, spelling):
    assert TrainConfig.from_dict({"steps": spelling(steps)}).steps == steps


def test_an_integer_that_a_float_cannot_hold_is_kept():
    for spelling in (int, str, np.int64):
        assert TrainConfig.from_dict({"steps": spelling(2**53 + 1)}).steps == 2**53 + 1


def test_to_dict_is_json_and_comes_back(config):
    config.data.sources = [{"name": "a", "path": "x", "weight": 2}]
    config.model.mixers.swa.scale = (1, 2)
    typed = Config.from_dict(config)
    assert Config.from_dict(json.loads(json.dumps(typed.to_dict()))) == typed


def test_overriding_a_field_that_is_none(config):
    config.model.mixers.swa.window = None
    override(config, "model.mixers.swa.window", "64")
    assert config.model.mixers.swa.window == 64
    override(config, "model.mixers.swa.window", "none")
    assert config.model.mixers.swa.window is None


def test_overriding_what_the_file_does_not_mention(config):
    override(config, "model.mixers.swa.qk_norm", "true")
    override(config, "model.remat.swa", "time:2048")
    override(config, "model.mixers.mine.type", "my_package.mixers:Mine")
    override(config, "model.mixers.mine.width", "64")
    model = Config.from_dict(config).model
    assert model.mixers["swa"] == {"type": "attention", "num_heads": 8, "qk_norm": True}
    assert model.mixers["mine"] == {"type": "my_package.mixers:Mine", "width": 64}
    assert model.remat == {"swa": "time:2048"}


@pytest.mark.parametrize("kind", [list, tuple])
def test_overriding_an_element_of_a_list(config, kind):
    config.data.sources = kind([{"name": "a", "path": "x"}, {"name": "b", "path": "y"}])
    config.optimizer.betas = kind([0.9, 0.95])
    override(config, "data.sources[1].path", "/corpus/2024")
    override(config, "data.sources[1].weight", "3")
    override(config, "model.mixers.swa.scale", f"{kind([1, 2])}")
    override(config, "optimizer.betas[1]", "0.99")
    override(config, "model.mixers.swa.scale[0]", "3")
    typed = Config.from_dict(config)
    assert typed.data.sources[1] == SourceConfig(name="b", path="/corpus/2024", weight=3.0)
    assert typed.data.sources[0].path == "x"
    assert typed.optimizer.betas == (0.9, 0.99)
    assert typed.model.mixers["swa"]["scale"] == [3, 2]


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("train.stepz", 'unknown key "train.stepz": did you mean "steps"?'),
        ("trian.steps", 'unknown key "trian": did you mean "train"?'),
        ("model.mixers.sva.window", 'unknown key "model.mixers.sva": did you mean "swa"?'),
        ("model.mixers.full", 'unknown key "model.mixers.full"'),
        ("train.steps.more", "train.steps has no fields of its own"),
        ("train.steps[0]", "train.steps is not a list"),
        ("data.sources[1].path", "data.sources[1] is out of range: data.sources has 1 element(s)"),
        ("data.sources[-1].path", "is not a key of the config"),
        ("a..b", "is not a key of the config"),
        ("", "is not a key of the config"),
    ],
)
def test_overriding_an_unknown_key(config, key, sentence):
    before = config.to_dict()
    with pytest.raises(UserError) as refusal:
        override(config, key, "1")
    assert sentence in str(refusal.value)
    assert config.to_dict() == before


def test_options_take_the_types_of_their_defaults():
    defaults = dict(size="tiny", length=512, rate=1.0, small=False, name=None, steps=int)
    assert parse_options("", **defaults) == defaults | {"steps": None}
    given = parse_options("size=1,length=1e3,rate=2,small=true,name=3,steps=7", **defaults)
    assert given == dict(size="1", length=1000, rate=2.0, small=True, name="3", steps=7)


@pytest.mark.parametrize(
    ("arg", "sentence"),
    [
        ("sise=421m", 'unknown option of the config file "sise": did you mean "size"? Allowed: length, size.'),
        ("421m", '"421m" is not an option of a config file: write name=value.'),
        ("length=many", "option \"length\" must be an integer, not 'many'."),
    ],
)
def test_bad_options(arg, sentence):
    with pytest.raises(UserError) as refusal:
        parse_options(arg, size="tiny", length=512)
    assert sentence in str(refusal.value)


def test_choose_lists_what_there_is():
    assert choose("size", "tiny", {"tiny": 1}) == 1
    with pytest.raises(UserError, match='unknown size "tini": did you mean "tiny"\\? Allowed: 1.3b, tiny.'):
        choose("size", "tini", {"tiny": 1, "1.3b": 2})


def test_a_file_is_laid_over_the_defaults(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(arg=''):\n    return {'train': {'steps': 7}, 'model': {'family': arg}}\n")
    config = load_config(f"{path}:a=b")
    assert isinstance(config, ConfigDict)
    override(config, "optimizer.clip_norm", "1.0")  # the file does not mention it
    assert Config.from_dict(config) == Config(model=ModelConfig(family="a=b"), train=TrainConfig(steps=7))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1\n", "has no function get_config"),
        ("def get_config(arg=''):\n    return 3\n", "must return a ConfigDict, not int"),
        ("def get_config(arg=''):\n    return 1 / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("def get_config(arg='')\n", "mine.py: SyntaxError"),
        ("import nothing_of_this_name\n", "mine.py, line 1: ModuleNotFoundError"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        load_config(str(path))
    assert sentence in str(refusal.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match='config file ".*none.py" is not there'):
        load_config(tmp_path / "none.py")
    (tmp_path / "mine.yaml").write_text("steps: 1")
    with pytest.raises(UserError, match="must be a Python file"):
        load_config(tmp_path / "mine.yaml")


def test_paths_are_text(tmp_path):
    data = DataConfig.from_dict({"sources": [{"name": "a", "path": tmp_path}]})
    assert data.sources[0].path == str(tmp_path)
