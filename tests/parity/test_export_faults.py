"""The stamp on small models of every format and option, on published widths, and on exports with a planted fault."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lcx.config import ModelConfig, load_config
from lcx.interop import export as exporting
from lcx.interop.architecture import architecture
from lcx.interop.export import Settings, check, export
from lcx.interop.fidelity import Unfaithful
from lcx.interop.formats import FORMATS
from tests.interop.models import MODELS, draw, model, source
from tests.parity.exports import ROOT

pytestmark = pytest.mark.parity

QUIET = lambda _: None  # noqa: E731
WIDTHS = {
    "transformer.py:size=pp-125m": {},
    "mamba.py:size=130m": {},
    "mamba2.py:size=130m": {},
    "samba.py:size=421m": {"swa": {"window": 24}},
    "infini.py:size=paper": {"infini": {"segment_length": 24}},
    "sink.py:size=160m": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_small_models(name, tmp_path, say):
    stamp = export(source(*model(name)), tmp_path / "out", Settings(prompt=40), QUIET)
    assert stamp["verified"] and stamp["beyond_windows"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [FORMATS[MODELS[name][0]].architecture]
    errors = [stamp[part]["max_error"] for part in ("prefill", "decode")]
    say(f"export of small {name}: logits differ by at most {max(errors):.1e}")
    assert max(errors) < 1e-4


@pytest.mark.parametrize("argument", WIDTHS)
def test_published_widths(argument, tmp_path, say):
    """One period of a published size, its window or segment cut so that the prompt passes it; random values."""
    section = load_config(f"{ROOT}/configs/{argument}").model.to_dict()
    section |= {"periods": 1, "vocab_size": 512, "compute_dtype": "float32", "remat": {}}
    for mixer, options in WIDTHS[argument].items():
        section["mixers"][mixer] |= options
    made = architecture(ModelConfig.from_dict(section))
    stamp = export(source(made, draw(made)), tmp_path / "out", Settings(prompt=40), QUIET)
    errors = [stamp[part]["max_error"] for part in ("prefill", "decode")]
    say(f"export of {argument}, width {made.config.d_model}: logits differ by at most {max(errors):.1e}")
    assert stamp["verified"] and max(errors) < 1e-4


# A wrong table, which the checkpoint's values agree with bit for bit: only running the model finds it.
WRONG = {
    "samba": ("model.layers.2.mixers.swa.o_proj.weight", "model.layers.2"),
    "llama": ("model.layers.1.self_attn.o_proj.weight", "model.layers.1"),
    "mamba2": ("backbone.layers.1.mixer.out_proj.weight", "backbone.layers.1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_transposed_matrix_in_the_table(name, tmp_path, monkeypatch):
    made, params = model(name) if name != "mamba2" else model(name, d_model=32)
    tensor, layer = WRONG[name]
    true = exporting._Plan.values

    def values(plan, wanted):
        array = true(plan, wanted)
        return array.T.reshape(array.shape) if wanted == tensor else array

    monkeypatch.setattr(exporting._Plan, "values", values)
    with pytest.raises(Unfaithful, match=rf"logits differ by more than .* the first layer that differs is {layer} "):
        export(source(made, params), tmp_path / "out", Settings(prompt=24), QUIET)
    assert not (tmp_path / "out").exists()
    stamp = json.loads((tmp_path / "out.failed" / "fidelity.json").read_text())
    assert not stamp["verified"] and layer in stamp["reason"]


@pytest.mark.parametrize("name", ["llama", "samba", "mamba"])
def test_swapped_layers_in_the_table(name, tmp_path, monkeypatch):
    """The first two layers of one kind."""
    true, other = exporting._Plan.values, {"samba": "2"}.get(name, "1")
    skip = "mixers." if name == "samba" else "layers."

    def values(plan, wanted):
        if name == "samba":
            places = {".1.": ".3.", ".3.": ".1."}
        else:
            places = {".0.": f".{other}.", f".{other}.": ".0."}
        found = re.search(r"\.\d\.", wanted)
        if found and found[0] in places and skip in wanted:
            wanted = wanted.replace(found[0], places[found[0]], 1)
        return true(plan, wanted)

    monkeypatch.setattr(exporting._Plan, "values", values)
    first = {"llama": "model.layers.0", "samba": "model.layers.1", "mamba": "backbone.layers.0"}[name]
    with pytest.raises(Unfaithful, match=f"the first layer that differs is {first} "):
        export(source(*model(name)), tmp_path / "out", Settings(prompt=24), QUIET)


def test_a_wrong_head(tmp_path, monkeypatch):
    true = exporting._Plan.values
    flipped = lambda plan, name: true(plan, name)[::-1] if name == "lm_head.weight" else true(plan, name)  # noqa: E731
    monkeypatch.setattr(exporting._Plan, "values", flipped)
    with pytest.raises(Unfaithful, match="the first layer that differs is the last norm or the head"):
        export(source(*model("llama", tie_embeddings=False)), tmp_path / "out", Settings(prompt=24), QUIET)


def test_a_wrong_option_of_config_json(tmp_path):
    """An export whose tensors are right and whose config says another rotary base."""
    made, params = model("llama")
    export(source(made, params), tmp_path / "out", Settings(prompt=24), QUIET)
    file = tmp_path / "out" / "config.json"
    fields = json.loads(file.read_text())
    fields["rope_parameters"]["rope_theta"] = 500.0
    file.write_text(json.dumps(fields))
    with pytest.raises(Unfaithful, match="the first layer that differs is model.layers.0 "):
        check(source(made, params), tmp_path / "out", Settings(prompt=24), QUIET)


def test_a_lost_tensor(tmp_path):
    made, params = model("samba")
    export(source(made, params), tmp_path / "out", Settings(run=False), QUIET)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.extra"] = np.zeros(3, np.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Unfaithful, match="LcxForCausalLM does not take its tensor model.layers.0.extra"):
        check(source(made, params), tmp_path / "out", Settings(prompt=24), QUIET)


def test_half_precision(tmp_path):
    """The files are bfloat16; both sides compute in float32 with those weights, so the tolerance is the same."""
    stamp = export(source(*model("samba")), tmp_path / "out", Settings(prompt=24, dtype="bfloat16"), QUIET)
    assert stamp["verified"] and stamp["prefill"]["max_error"] < 1e-4
    assert dataclasses.asdict(Settings())["tolerance"] == stamp["tolerance"] == 1e-4
