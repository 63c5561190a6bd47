"""Exports in PyTorch: each family, trained, against lcx: logits, greedy continuations, padded batches, gradients."""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lcx
from lcx.models.generate import generate
from tests.parity.exports import FAMILIES, TIME, Run, make_export, make_run, text

pytestmark = pytest.mark.parity

LOGITS = 1e-4
LENGTHS = (50, 9, 33)  # of prompts
NEW = 64  # tokens written after them
CLASSES = {
    "transformer": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def run(family, tmp_path_factory) -> Run:
    workdir = make_run(family, tmp_path_factory.mktemp(family))
    return Run(workdir, make_export(workdir))


@pytest.fixture(scope="module")
def there(run, family) -> torch.nn.Module:
    """As a user loads it: stock classes without our code, where the family has one."""
    known = family in CLASSES
    model = AutoModelForCausalLM.from_pretrained(run.export, trust_remote_code=not known, dtype=torch.float32)
    assert type(model).__name__ == CLASSES.get(family, "LcxForCausalLM")
    return model.eval()


@pytest.fixture(scope="module")
def here(run):
    return lcx.load(run.workdir)


@pytest.fixture(scope="module")
def prompts(here) -> list[np.ndarray]:
    return [here[1].encode(text(400, seed)[-length:]) for seed, length in enumerate(LENGTHS)]


def left_padded(prompts: list[np.ndarray]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.from_numpy(prompt).long(), 1
    return {"input_ids": ids, "attention_mask": mask}


def write(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [batch, NEW], their logits [batch, NEW, vocab_size]) of `generate()`."""
    settings = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    out = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -NEW:].numpy(), torch.stack(out.logits, dim=1).numpy()


def same_until_a_tie(a: np.ndarray, b: np.ndarray, logits: np.ndarray, error: float) -> int:
    """How many tokens are the same, which is all of them, or all to where the two likeliest are as good as equal."""
    differ = np.flatnonzero(a != b)
    if not len(differ):
        return len(a)
    second, first = np.sort(logits[differ[0]])[-2:]
    assert first - second <= 10 * error, f"token {differ[0]} differs, whose logits lie {first - second:.1e} apart"
    return int(differ[0])


def test_the_stamp(run):
    stamp = json.loads((run.export / "fidelity.json").read_text())
    assert stamp["verified"] and stamp["beyond_windows"]
    for part in ("prefill", "decode"):
        assert stamp[part]["max_error"] < LOGITS and stamp[part]["top1_agreement"] > 0.99, stamp[part]


def test_logits(run, here, there, family, say):
    """Held-out text of 100 tokens, longer than windows, segments and the training rows."""
    tokens = np.stack([here[1].encode(text(1000, seed=seed)[-100:])[:100] for seed in (3, 4)])
    expected = here[0](tokens)[0][..., : there.config.vocab_size]
    with torch.no_grad():
        found = there(torch.from_numpy(tokens).long()).logits.numpy()
    error = np.abs(found - expected).max()
    say(f"export of {family}: logits of {tokens.shape[1]} tokens differ by at most {error:.1e}")
    assert error < LOGITS


def test_greedy_continuations(here, there, prompts, family, say):
    tokens, logits = write(there, left_padded(prompts))
    error = json_error(there)
    ours = np.stack(list(generate(here[0], prompts, NEW, temperature=0)), axis=1)
    same = [same_until_a_tie(*row, error) for row in zip(tokens, ours, logits, strict=True)]
    say(f"export of {family}: {same} of {NEW} greedy tokens the same, {len(prompts)} prompts in a left-padded batch")
    assert sum(same) > 2 * NEW


def json_error(model: torch.nn.Module) -> float:
    with open(f"{model.name_or_path}/fidelity.json") as file:
        stamp = json.load(file)
    return max(stamp[part]["max_error"] for part in ("prefill", "decode"))


def test_left_padded_batches_equal_single_prompts(there, prompts):
    tokens, logits = write(there, left_padded(prompts))
    for row, prompt in enumerate(prompts):
        alone, alone_logits = write(there, {"input_ids": torch.from_numpy(prompt).long()[None]})
        same = same_until_a_tie(tokens[row], alone[0], logits[row], LOGITS / 10)
        assert np.abs(logits[row, : same + 1] - alone_logits[0, : same + 1]).max() < LOGITS


def test_the_tokenizer(run, here):
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    for example in ("def main(", "\u00e9t\u00e9 \U0001f600\n\x00", " <|end|><|start|> ", ""):
        assert tokenizer(example)["input_ids"] == here[1].encode(example).tolist()
    assert tokenizer.decode(here[1].encode("\u00e9t\u00e9 x"), skip_special_tokens=True) == "\u00e9t\u00e9 x"


def test_lcx_loads_the_export(run, here):
    model, tokenizer = lcx.load(run.export)
    tokens = tokenizer.encode("an export")[None]
    rows = model.embedding.table.shape[0]
    np.testing.assert_array_equal(model(tokens)[0], here[0](tokens)[0][..., :rows])


class TestOwnCode:
    """modeling_lcx.py."""

    @pytest.fixture(autouse=True)
    def only_own(self, family):
        if family in CLASSES:
            pytest.skip("a class of transformers")

    def test_gradients(self, there, here, prompts):
        tokens = torch.from_numpy(prompts[0]).long()[None]
        there.zero_grad()
        loss = there(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        missing = [name for name, parameter in there.named_parameters() if parameter.grad is None]
        assert not missing
        model, _ = here
        graphdef, params = lcx.params.split(model)

        def mean_loss(params):
            from flax import nnx

            logits = nnx.merge(graphdef, params)(prompts[0][None])[0][:, :-1, : there.config.vocab_size]
            picked = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), prompts[0][None, 1:, None], axis=-1)
            return -picked.mean()

        expected, gradients = jax.value_and_grad(mean_loss)(params)
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
        table = gradients["embedding"]["table"][: there.config.vocab_size]
        found = there.get_input_embeddings().weight.grad.numpy()
        assert np.linalg.norm(found - table) < 1e-4 * np.linalg.norm(table)

    def test_bfloat16(self, run, there, prompts):
        model = AutoModelForCausalLM.from_pretrained(run.export, trust_remote_code=True, dtype=torch.bfloat16)
        inputs = left_padded(prompts)
        with torch.no_grad():
            exact, found = there(**inputs).logits[:, -1], model(**inputs).logits[:, -1]
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
        assert torch.linalg.norm(found - exact) < 0.05 * torch.linalg.norm(exact)
        tokens, _ = write(model, inputs)
        assert tokens.shape == (len(prompts), NEW)

    def test_chunks_and_right_padding(self, there, prompts):
        """Any cut of the prompt gives the same logits, and so does padding after it."""
        tokens = torch.from_numpy(prompts[0]).long()[None]
        with torch.no_grad():
            whole = there(tokens).logits
            cache, parts = None, []
            for part in torch.split(tokens, [7, 1, 30, tokens.shape[1] - 38], dim=1):
                out = there(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            assert (torch.cat(parts, dim=1) - whole).abs().max() < LOGITS
            padded = torch.cat([tokens, tokens[:, :5]], dim=1)
            mask = torch.ones_like(padded)
            mask[:, -5:] = 0
            assert (there(padded, attention_mask=mask).logits[:, :-5] - whole).abs().max() < LOGITS

    def test_beams(self, there, prompts):
        settings = dict(do_sample=False, max_new_tokens=8, num_beams=3, eos_token_id=None, pad_token_id=0)
        inputs = left_padded(prompts)
        with_cache, without = (there.generate(**inputs, **settings, use_cache=use) for use in (True, False))
        assert torch.equal(with_cache, without)

    def test_it_needs_nothing_of_ours(self, run):
        code = (run.export / "modeling_lcx.py").read_text()
        assert "import lcx" not in code and "from lcx" not in code
        assert AutoConfig.from_pretrained(run.export, trust_remote_code=True).model_type == "lcx"


def test_short_rows_were_trained():
    assert TIME < 100, "test_logits reads beyond the training rows"
