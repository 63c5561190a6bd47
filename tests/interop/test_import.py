"""Runs begun from other people's folders: what is taken over, what is refused by name, hybrids; no PyTorch."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

import lcx
from lcx.cli.main import main
from lcx.files import read_json
from tests.interop.test_export import leaves

WIDTH, ROWS, BLOCKS = 32, 300, 4
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}


def llama(folder, changes=None, drop=(), dtype=np.float32):
    """A Llama of another program's, with random weights; returns its tensors."""
    random = np.random.default_rng(0)
    shapes = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,), "self_attn.q_proj": (WIDTH, WIDTH)}
    shapes |= {"self_attn.k_proj": (16, WIDTH), "self_attn.v_proj": (16, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH)}
    shapes |= {"mlp.gate_proj": (48, WIDTH), "mlp.up_proj": (48, WIDTH), "mlp.down_proj": (WIDTH, 48)}
    names = {f"model.layers.{block}.{name}.weight": shape for block in range(BLOCKS) for name, shape in shapes.items()}
    names |= {
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (ROWS, WIDTH),
    }
    tensors = {name: random.standard_normal(shape).astype(dtype) for name, shape in names.items()}
    fields = {name: value for name, value in (LLAMA | (changes or {})).items() if name not in drop}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def run(*words) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_then_export_is_bitwise_equal(dtype, tmp_path, capsys):
    from lcx.interop.safetensors import DTYPES, Reader

    tensors = llama(tmp_path / "llama", dtype=DTYPES[dtype])
    assert run("import_hf", f"--source={tmp_path / 'llama'}", f"--workdir={tmp_path / 'run'}") == 0
    assert "llama, 50,208 parameters" in capsys.readouterr().out
    assert run("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--noverify") == 0
    reader = Reader(tmp_path / "out")
    assert reader.shapes.keys() == tensors.keys()
    for name, array in tensors.items():
        assert reader.tensor(name).dtype == array.dtype and reader.tensor(name).tobytes() == array.tobytes()
    config = read_json(tmp_path / "run" / "config.json")["config"]["model"]
    assert config["mixers"]["attention"]["rope_base"] == 5e5 and config["norm_eps"] == 1e-6
    model, tokenizer = lcx.load(tmp_path / "run")
    assert tokenizer.fingerprint == "bytes" and not config["tie_embeddings"]
    np.testing.assert_array_equal(
        np.asarray(model.embedding.table[...]), tensors["model.embed_tokens.weight"].astype(np.float32)
    )


@pytest.mark.parametrize(
    "changes, drop, message",
    [
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}},
            (),
            'rope_type "llama3"; factor=8',
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_parameters",), 'rope_type "linear"; factor=2'),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, (), "partial_rotary_factor"),
        ({"attention_bias": True}, (), "attention_bias is true: lcx has no biases there"),
        ({"hidden_act": "gelu"}, (), "hidden_act is 'gelu': lcx computes 'silu' only"),
        ({"model_type": "gpt2"}, (), 'model_type "gpt2"; lcx reads llama, mistral'),
        ({}, ("intermediate_size",), 'has no "intermediate_size"'),
        ({"num_hidden_layers": 5}, (), "does not hold what its config.json says: no place for []; no values for"),
        ({"intermediate_size": 40}, (), "mlp.gate_proj.weight has shape [48, 32], not [40, 32]"),
    ],
)
def test_what_cannot_be_imported_is_named(changes, drop, message, tmp_path, capsys):
    llama(tmp_path / "llama", changes, drop)
    assert run("import_hf", f"--source={tmp_path / 'llama'}", f"--workdir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said, said
    assert not (tmp_path / "run" / "config.json").exists()


def test_older_files(tmp_path):
    """rope_theta beside the other fields, and the buffers that were saved then."""
    tensors = llama(tmp_path / "llama", {"rope_theta": 700.0, "rope_scaling": None}, ("rope_parameters",))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "llama" / "model.safetensors", metadata={"format": "pt"})
    assert run("import_hf", f"--source={tmp_path / 'llama'}", f"--workdir={tmp_path / 'run'}") == 0
    assert read_json(tmp_path / "run" / "config.json")["config"]["model"]["mixers"]["attention"]["rope_base"] == 700.0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--source={0}/none", "--workdir={0}/run"], "--source: there is no folder"),
        (["--source={0}", "--workdir={0}/run"], "is no Hugging Face folder: it has no config.json"),
        (
            ["--source={0}/bin", "--workdir={0}/run"],
            "lcx does not read pytorch_model.bin: save the model as safetensors",
        ),
        (["--source={0}/llama", "--workdir={0}/run", "--layer_map=0"], "--layer_map needs --pattern"),
        (["--source={0}/llama", "--workdir={0}/llama"], "holds a run already"),
        (
            ["--source={0}/llama", "--workdir={0}/run", "--config.model.d_model=64"],
            "an override of the model does not fit the weights",
        ),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    llama(tmp_path / "llama")
    llama(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    assert run("import_hf", *(flag.format(tmp_path) for flag in flags)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said, said


def test_a_hybrid_takes_over_what_fits(tmp_path, capsys):
    tensors = llama(tmp_path / "llama")
    flags = ["--pattern=mamba mlp swa mlp infini mlp", "--layer_map=0,1,3,-,2,0", "--config.model.mixers.swa.window=16"]
    assert run("import_hf", f"--source={tmp_path / 'llama'}", f"--workdir={tmp_path / 'run'}", *flags) == 0
    assert "2 attention, 2 infini, 5 mlp, 2 new mamba, 1 new mlp" in capsys.readouterr().out
    config = read_json(tmp_path / "run" / "config.json")["config"]["model"]
    assert config["periods"] == 2 and config["mixers"]["swa"]["window"] == 16
    assert config["mixers"]["infini"]["num_kv_heads"] == 2 and config["mixers"]["swa"]["rope_base"] == 5e5
    params = leaves(lcx.params.split(lcx.load(tmp_path / "run")[0])[1])
    take = lambda block, name: tensors[f"model.layers.{block}.{name}.weight"]  # noqa: E731
    same = [
        ("stack/layers/0_mamba/norm/scale", 0, take(0, "input_layernorm")),
        ("stack/layers/1_mlp/mixers/mlp/gate/weight", 0, take(0, "mlp.gate_proj").T),
        ("stack/layers/2_swa/mixers/swa/value/weight", 0, take(1, "self_attn.v_proj").T.reshape(WIDTH, 2, 8)),
        ("stack/layers/2_swa/mixers/swa/value/weight", 1, take(2, "self_attn.v_proj").T.reshape(WIDTH, 2, 8)),
        ("stack/layers/4_infini/mixers/infini/output/weight", 0, take(3, "self_attn.o_proj").T.reshape(4, 8, WIDTH)),
        ("stack/layers/5_mlp/norm/scale", 1, take(0, "post_attention_layernorm")),
    ]
    for path, period, expected in same:
        np.testing.assert_array_equal(params[path][period], expected, err_msg=path)
    np.testing.assert_array_equal(params["head/table"], tensors["lm_head.weight"])
    assert not np.array_equal(params["stack/layers/1_mlp/mixers/mlp/gate/weight"][1], take(1, "mlp.gate_proj").T)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pattern=mamba mlp swa mlp infini mlp"], "has 3 blocks, which do not divide 4: give a --layer_map"),
        (["--pattern=mamba mlp swa mlp", "--layer_map=0,4"], "the source has no block 4; it has 4, counted from 0"),
        (["--pattern=mamba mlp swa mlp", "--layer_map=0,x"], "must be numbers of source blocks, or -"),
        (["--pattern=mambo mlp"], 'unknown mixer "mambo"'),
        (["--pattern=swa mlp", "--config.model.mixers.swa.num_heads=8"], "swa.num_heads=8 keeps"),
    ],
)
def test_hybrids_that_cannot_be(flags, message, tmp_path, capsys):
    llama(tmp_path / "llama")
    assert run("import_hf", f"--source={tmp_path / 'llama'}", f"--workdir={tmp_path / 'run'}", *flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said, said


def test_training_begins_with_the_weights(tmp_path, capsys):
    """At a learning rate of 0 the first checkpoint holds what was imported; the model stays what it is."""
    tensors = llama(tmp_path / "llama")
    (tmp_path / "words").mkdir()
    for number in range(12):
        (tmp_path / "words" / f"{number}.txt").write_text("some words and others " * 20)
    source = ["--source", tmp_path / "llama", "--config.model.mixers.attention.rope_base=1e6"]
    workdir = tmp_path / "run"
    assert run("import_hf", *source, f"--workdir={workdir}") == 0
    train = ["train", f"--config={workdir}/config.json", f"--workdir={workdir}", "--config.train.steps=2"]
    train += ["--config.train.sequence_length=16", f"--config.data.sources[0].path={tmp_path / 'words'}"]
    train += ["--config.optimizer.learning_rate=0", "--config.evaluation.max_rows=1"]
    assert run(*train, "--config.model.mixers.attention.rope_base=1e4") == 2
    assert "model.mixers.attention.rope_base is 1000000.0 there and 10000.0 here" in capsys.readouterr().err
    assert run(*train) == 0
    params = leaves(lcx.params.split(lcx.load(workdir)[0])[1])
    assert (workdir / "checkpoints" / "2").exists()
    np.testing.assert_array_equal(
        params["stack/layers/1_mlp/mixers/mlp/down/weight"][3], tensors["model.layers.3.mlp.down_proj.weight"].T
    )
    assert read_json(workdir / "config.json")["fingerprints"] is not None
    assert run("export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--step=1") == 2
    assert re.search(r"has no checkpoint of step 1; there are: 2\.", capsys.readouterr().err)
