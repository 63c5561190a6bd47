"""What an export consists of, and what is said where it is not the model; nothing here needs PyTorch."""

import json
import re
import weakref

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

import lcx
from lcx.errors import UserError
from lcx.interop import safetensors
from lcx.interop.export import Settings, check, export
from lcx.interop.fidelity import Unfaithful
from lcx.interop.formats import FORMATS
from lcx.interop.importing import open_weights
from lcx.interop.tables import lay_out
from tests.interop.models import MODELS, model, source

QUIET = lambda _: None  # noqa: E731
STILL = Settings(run=False)


def leaves(tree: dict) -> dict[str, np.ndarray]:
    return {name: leaf for key, value in tree.items() for name, leaf in (
        {f"{key}/{inner}": leaf for inner, leaf in leaves(value).items()} if isinstance(value, dict) else {key: value}
    ).items()}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise_the_same(name, tmp_path):
    made, params = model(name)
    export(source(made, params), tmp_path / "out", STILL, QUIET)
    weights = open_weights(tmp_path / "out")
    assert weights.format == MODELS[name][0]
    found, expected = leaves(weights.parameters()), leaves(params)
    assert found.keys() == expected.keys()
    assert all(found[path].tobytes() == array.tobytes() for path, array in expected.items())
    (tmp_path / "out" / "lcx.json").unlink()  # a folder of someone else's
    other = open_weights(tmp_path / "out")
    kinds = lambda each: [[each.model.types[name] for name in names] for names in each.model.pattern]  # noqa: E731
    assert kinds(other) == kinds(weights) and other.model.config.periods == made.config.periods
    options = lambda model: [model.options[name] for names in model.pattern for name in names]  # noqa: E731
    theirs, ours = (options(each.model) for each in (other, weights))
    assert [vars(a) for a in theirs] == [vars(b) for b in ours]
    assert {path.split("/")[-1]: 0 for path in leaves(other.parameters())}.keys() == {
        path.split("/")[-1]: 0 for path in expected
    }.keys()


def test_fla_names(tmp_path):
    """Of flash-linear-attention's SambaForCausalLM; one tensor of each kind, in its place."""
    made, params = model("samba")
    stamp = export(source(made, params), tmp_path / "out", Settings(format="fla"), QUIET)
    assert (
        not stamp["verified"]
        and "need a GPU; its MLPs have widths that are multiples of 256, 256 here, and these have 48" in stamp["reason"]
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    layers = params["stack"]["layers"]
    np.testing.assert_array_equal(
        found["backbone.layers.3.mixer.q_proj.weight"],
        layers["2_swa"]["mixers"]["swa"]["query"]["weight"][1].reshape(32, 32).T,
    )
    np.testing.assert_array_equal(
        found["backbone.layers.2.mixer.A_log"], layers["0_mamba"]["mixers"]["mamba"]["A_log"][1]
    )
    np.testing.assert_array_equal(found["backbone.layers.3.mlp_norm.weight"], layers["3_mlp"]["norm"]["scale"][1])
    np.testing.assert_array_equal(found["backbone.layers.0.mixer_norm.weight"], layers["0_mamba"]["norm"]["scale"][0])
    assert found["backbone.layers.0.mixer.conv1d.weight"].shape == (64, 1, 4)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["model_type"] == "samba" and fields["attn"]["layers"] == [1, 3]
    assert "intermediate_size" not in fields  # it would be taken for the width of the Mamba layers
    (tmp_path / "out" / "lcx.json").unlink()
    back = leaves(open_weights(tmp_path / "out").parameters())
    assert all(back[path].tobytes() == array.tobytes() for path, array in leaves(params).items())


@pytest.mark.parametrize(
    "d_model, d_ff, ratio", [(1536, 4096, 4), (2304, 6144, 4), (2816, 9984, None), (1536, 4608, None)]
)
def test_widths_that_fla_can_express(d_model, d_ff, ratio):
    from lcx.interop.formats.fla import _ratio, _width

    assert _width(d_model, _ratio(d_model, d_ff)) == d_ff
    assert ratio is None or _ratio(d_model, d_ff) == ratio


@pytest.mark.parametrize(
    "name, format, message",
    [
        ("samba", "llama", "its layers are not one attention and one mlp in turn; leave --format out"),
        ("mistral", "llama", "its attention has a window"),
        ("logit", "mistral", "its attention has sinks"),
        ("llama", "fla", "its layers are not mamba, mlp, attention, mlp in turn"),
        ("llama", "lama", 'unknown format "lama": did you mean "llama"?'),
    ],
)
def test_formats_that_do_not_fit(name, format, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        export(source(*model(name)), tmp_path / "out", Settings(format=format), QUIET)
    assert not list(tmp_path.iterdir())


def test_a_mixer_of_ones_own_cannot_be_exported(tmp_path):
    from lcx.config import ModelConfig
    from lcx.interop.architecture import architecture

    section = dict(pattern="average", mixers={"average": {"type": "examples.moving_average:MovingAverage"}}, d_model=32)
    made = architecture(ModelConfig.from_dict(section))
    with pytest.raises(UserError, match="the model cannot be exported: its mixer .average. is examples.moving_average"):
        export(source(made, {}), tmp_path / "out", STILL, QUIET)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_and_dtypes(dtype, tmp_path):
    made, params = model("mamba", tie_embeddings=False)
    settings = Settings(run=False, dtype=dtype, shard_bytes=20_000)
    stamp = export(source(made, params), tmp_path / "out", settings, QUIET)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    found = {name: array for file in files for name, array in load_file(tmp_path / "out" / file).items()}
    assert all(name in load_file(tmp_path / "out" / file) for name, file in list(index["weight_map"].items())[::7])
    assert sum(array.nbytes for array in found.values()) == index["metadata"]["total_size"]
    assert {str(array.dtype) for array in found.values()} == {dtype}
    assert stamp["checksums"].keys() == found.keys() and "lm_head.weight" in found
    expected = params["stack"]["layers"]["0_mamba"]["mixers"]["mamba"]["D"][1].astype(safetensors.DTYPES[dtype])
    assert found["backbone.layers.1.mixer.D"].tobytes() == expected.tobytes()


def test_writing_holds_one_tensor(tmp_path):
    """When the next value is asked for, the one before is gone."""
    before = []

    def values(name):
        assert not before or before[-1]() is None, "two tensors are held at a time"
        array = np.full(tensors[name], len(before), np.float32)
        before.append(weakref.ref(array))
        return array

    tensors = {f"tensor.{number}": (3, 5) for number in range(6)}
    safetensors.write(epath.Path(tmp_path), tensors, values, "float32", shard_bytes=150)
    assert len(before) == 6


def test_the_vocabulary_is_cut_back_and_tied_weights_stay_tied(tmp_path):
    made, params = model("llama")
    export(source(made, params, vocab_size=257, start_token=256, end_token=256), tmp_path / "out", STILL, QUIET)
    found = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], params["embedding"]["table"][:257])
    assert "lm_head.weight" not in found
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["vocab_size"] == 257 and fields["tie_word_embeddings"] is True
    assert fields["bos_token_id"] == fields["eos_token_id"] == 256
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["bos_token_id"] == 256
    assert "| training tokens | 300 |" in (tmp_path / "out" / "README.md").read_text()


def test_an_unverified_export_warns(tmp_path, monkeypatch):
    monkeypatch.setattr("lcx.interop.fidelity.missing_libraries", lambda: ["torch", "transformers"])
    made, params = model("samba")
    stamp = export(source(made, params), tmp_path / "out", Settings(), QUIET)
    assert stamp["verified"] is False and stamp["reason"] == "torch and transformers not installed"
    with pytest.warns(UserWarning, match="out is unverified: torch and transformers not installed"):
        loaded, tokenizer = lcx.load(tmp_path / "out")
    assert tokenizer.vocab_size == 256
    tokens = np.arange(20, dtype=np.int32)[None]
    np.testing.assert_array_equal(loaded(tokens)[0], made.model(params)(tokens)[0])


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="out is there and not empty"):
        export(source(*model("llama")), tmp_path / "out", STILL, QUIET)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


# ---- faults that are planted in the files of an export ----


def flip(tensors):
    """The lowest bit of one number, which no logit would show."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(np.uint32)[3, 5] ^= 1
    return name, r"1 of 1536 numbers differ, the first at \[3, 5\]"


def swap(tensors):
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return "model.layers.0.", "not bit for bit"


def transpose(tensors):
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    return name, "but its transpose"


def shrink(tensors):
    name = "model.norm.weight"
    tensors[name] = tensors[name][:5]
    return name, r"float32\[5\], not float32\[32\]"


@pytest.mark.parametrize("fault", [flip, swap, transpose, shrink])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_planted_faults(fault, tmp_path):
    made, params = model("llama")
    out = tmp_path / "out"
    export(source(made, params), out, STILL, QUIET)
    check(source(made, params), out, STILL, QUIET)
    tensors = load_file(out / "model.safetensors")
    name, words = fault(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    layer = ".".join(name.split(".")[:3]) if ".layers." in name else "outside the layers"
    with pytest.raises(UserError, match=f"changed after it was stamped: {name}.*{layer}"):
        lcx.load(out)
    with pytest.raises(Unfaithful, match=f"first layer that differs is {layer}, in its tensor {name}.*{words}"):
        check(source(made, params), out, STILL, QUIET)
    assert not json.loads((out / "fidelity.json").read_text())["verified"]


@pytest.mark.parametrize("name", MODELS)
def test_each_table_names_every_parameter_once(name):
    made, _ = model(name)
    for form in FORMATS.values():
        if isinstance(form.fit(made), str):
            continue
        mapping = lay_out(form.names(made), made.shapes)
        pieces = [(piece.path, piece.period) for piece in mapping.pieces]
        assert len(pieces) == len(set(pieces))
        for tensor, shape in mapping.tensors.items():
            parts = sorted((piece.start, piece.shape[0]) for piece in mapping.pieces if piece.name == tensor)
            starts = np.cumsum([0, *(count for _, count in parts)])
            assert [start for start, _ in parts] == starts[:-1].tolist() and starts[-1] == shape[0]
