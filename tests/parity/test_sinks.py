"""gpt-oss's attention by itself: a trained logit a head in the softmax's denominator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import GptOssConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from lcx.interop.tables import ATTENTION, to_lcx
from lcx.laws.measure import deviation
from lcx.mixers import ModelDims, build_mixer
from lcx.models.language_model import make_context
from lcx.params import split
from tests.parity.pairs import (
    D_MODEL,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    WINDOW,
    named_arrays,
    named_gradients,
    randomize,
)

pytestmark = pytest.mark.parity

BATCH, TIME, BASE = 3, 40, 150_000.0
CONFIG = GptOssConfig(
    hidden_size=D_MODEL,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    attention_bias=False,  # ours has none
    rope_parameters={"rope_type": "default", "rope_theta": BASE},
    attn_implementation="eager",
)


def there(layer: int, sinks: np.ndarray, x: np.ndarray, cotangent: np.ndarray) -> tuple[dict, dict]:
    """(parameters, {"output": y, "input": dx, "parameters": gradients by name}) of one attention module."""
    module = GptOssAttention(CONFIG, layer).train()
    randomize(module, seed=3)
    module.sinks.data.copy_(torch.from_numpy(sinks))
    inputs = torch.from_numpy(x).requires_grad_()
    positions = torch.arange(TIME)[None]
    make_mask = (create_sliding_window_causal_mask, create_causal_mask)[layer]
    mask = make_mask(config=CONFIG, inputs_embeds=inputs, attention_mask=None, past_key_values=None)
    y, _ = module(inputs, GptOssRotaryEmbedding(CONFIG)(inputs, positions), mask)
    y.backward(torch.from_numpy(cotangent))
    results = {"output": y.detach().numpy(), "input": inputs.grad.numpy(), "parameters": named_gradients(module)}
    return named_arrays(module), results


def here(mixer: nnx.Module, params: dict, x: np.ndarray, cotangent: np.ndarray) -> dict:
    """The same of lcx's mixer, gradients as a tree."""
    graphdef, _ = split(mixer)

    def call(params: dict, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x, None, make_context(x.shape[:2], None, None, None))[0]

    @jax.jit
    def pull(params: dict, x: jax.Array) -> tuple:
        y, back = jax.vjp(call, params, x)
        return y, *back(jnp.asarray(cotangent))

    y, gradients, dx = pull(params, x)
    return {"output": y, "input": dx, "parameters": gradients}


@pytest.mark.parametrize("sink", ["logit", "zero"])
@pytest.mark.parametrize("window", [WINDOW, None])
def test_output_and_gradients(window, sink, request, say):
    random = np.random.default_rng(0)
    x, cotangent = (random.standard_normal((BATCH, TIME, D_MODEL), np.float32) for _ in range(2))
    sinks = 2 * random.standard_normal(HEADS, np.float32) if sink == "logit" else np.zeros(HEADS, np.float32)
    options = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope_base=BASE)
    record = {"type": "attention", "window": window, "sink": sink} | options
    mixer = build_mixer("attention", record, ModelDims(d_model=D_MODEL, sublayers=2), nnx.Rngs(0))

    weights, expected = there([WINDOW, None].index(window), sinks, x, cotangent)
    if sink == "zero":  # a constant here
        weights.pop("sinks"), expected["parameters"].pop("sinks")
    shapes = split(mixer)[1]
    expected["parameters"] = to_lcx(expected["parameters"], ATTENTION, shapes)
    found = here(mixer, to_lcx(weights, ATTENTION, shapes), x, cotangent)

    output = deviation({"output": found["output"]}, {"output": expected["output"]})
    gradient = deviation(*({kind: tree[kind] for kind in ("input", "parameters")} for tree in (found, expected)))
    largest = np.abs(found["output"] - expected["output"]).max()
    say(
        f"gpt-oss attention {request.node.callspec.id}: output {output.value:.1e} (largest {largest:.1e}), "
        f"worst gradient {gradient}"
    )
    assert output.value < 1e-4 and largest < 1e-4, output
    assert gradient.value < 1e-3, gradient
