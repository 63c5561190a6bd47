"""Exports with modeling_lcx.py: besides what holds of all, gradients, bfloat16, chunks, right padding, beams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoConfig, AutoModelForCausalLM

from lcx.params import split
from tests.parity.export_checks import *  # noqa: F403
from tests.parity.export_checks import LOGITS, left_padded, write

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=["samba", "infini", "sink"])
def family(request):
    return request.param


def test_gradients(there, here, prompts):
    tokens = torch.from_numpy(prompts[0]).long()[None]
    there.zero_grad()
    loss = there(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    missing = [name for name, parameter in there.named_parameters() if parameter.grad is None]
    assert not missing
    model, _ = here
    graphdef, params = split(model)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        logits = nnx.merge(graphdef, params)(prompts[0][None])[0][:, :-1, : there.config.vocab_size]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), prompts[0][None, 1:, None], axis=-1)
        return -picked.mean()

    expected, gradients = mean_loss(params)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    table = gradients["embedding"]["table"][: there.config.vocab_size]
    found = there.get_input_embeddings().weight.grad.numpy()
    assert np.linalg.norm(found - table) < 1e-4 * np.linalg.norm(table)


def test_bfloat16(run, there, prompts):
    model = AutoModelForCausalLM.from_pretrained(run.export, trust_remote_code=True, dtype=torch.bfloat16)
    inputs = left_padded(prompts)
    with torch.no_grad():
        exact, found = there(**inputs).logits[:, -1], model(**inputs).logits[:, -1]
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    assert torch.linalg.norm(found - exact) < 0.05 * torch.linalg.norm(exact)
    tokens, _ = write(model, inputs, 2)
    assert tokens.shape == (len(prompts), 2)


def test_chunks_and_right_padding(there, prompts):
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


def test_beams(there, prompts):
    settings = dict(do_sample=False, max_new_tokens=8, num_beams=3, eos_token_id=None, pad_token_id=0)
    inputs = left_padded(prompts)
    with_cache, without = (there.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_it_needs_nothing_of_ours(run):
    code = (run.export / "modeling_lcx.py").read_text()
    assert "import lcx" not in code and "from lcx" not in code
    assert AutoConfig.from_pretrained(run.export, trust_remote_code=True).model_type == "lcx"
