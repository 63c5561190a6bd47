"""Models that transformers made, imported and exported again: the same tensors, bit for bit."""

import numpy as np
import pytest
import transformers

from lcx.cli.main import main
from lcx.interop.safetensors import Reader

pytestmark = pytest.mark.parity

SMALL = dict(vocab_size=256, hidden_size=64, num_hidden_layers=3, tie_word_embeddings=False)
MADE = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL, state_size=8)),
}


@pytest.mark.parametrize("made", MADE)
def test_import_then_export_gives_the_same_tensors(made, tmp_path):
    source, run, out = (tmp_path / name for name in ("source", "run", "out"))
    MADE[made]().save_pretrained(source, max_shard_size="100KB")
    assert main(["import_hf", f"--source={source}", f"--workdir={run}"]) == 0
    assert main(["export", f"--workdir={run}", f"--out={out}"]) == 0  # with the stamp
    before, after = Reader(source), Reader(out)
    assert len(list(source.glob("*.safetensors"))) > 1 and before.shapes.keys() == after.shapes.keys()
    for name in before.shapes:
        there, here = before.tensor(name), after.tensor(name)
        assert there.dtype == here.dtype == np.float32 and there.tobytes() == here.tobytes(), name
