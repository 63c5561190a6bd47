"""Training steps of EasyDeL, for a Python of its own, where it is installed: it needs other versions of JAX and flax.

Started by `lcx.benchmarks.peers.easydel_step` as `python easydel_worker.py FAMILY BATCH TIME SIZES`, SIZES being JSON.
Answers each line of its input with a line: the loss of one more step, which its own `training_step` takes.
"""

import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import easydel
import jax
import jax.numpy as jnp
import numpy as np
import optax
from easydel.trainers.trainer._fn import training_step
from flax import nnx

RATE = 3e-4


def build(family: str, time: int, sizes: dict):
    """Its Llama or Mamba in float32."""
    common = dict(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        vocab_size=sizes["vocabulary"],
        tie_word_embeddings=False,
    )
    if family == "transformer":
        make, config = (
            easydel.LlamaForCausalLM,
            easydel.LlamaConfig(
                **common,
                intermediate_size=sizes["d_ff"],
                num_attention_heads=sizes["heads"],
                num_key_value_heads=sizes["heads"],
                max_position_embeddings=time,
                attn_mechanism="sdpa",
                attn_dtype=jnp.float32,
            ),
        )
    else:
        make, config = easydel.MambaForCausalLM, easydel.MambaConfig(**common)
    return make(config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def main(family: str, batch: str, time: str, sizes: str) -> None:
    """Serves steps until its input ends."""
    rows, length = int(batch), int(time)
    values = json.loads(sizes)
    model = build(family, length, values)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, 0.9, 0.95, weight_decay=0.1))
    state = model.to_state().init_tx(optimizer)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, values["vocabulary"], (rows, length)), jnp.int32)
    given = {"input_ids": tokens, "labels": tokens, "attention_mask": jnp.ones_like(tokens)}
    step = jax.jit(lambda state, given: training_step(state, given, learning_rate_fn=lambda _: RATE), donate_argnums=0)
    with model.mesh:
        for _ in range(2):  # it compiles twice: what a step returns is laid out otherwise than what it was given
            state, metrics = step(state, given)
        print("ready", flush=True)
        for _ in sys.stdin:
            state, metrics = step(state, given)
            print(float(metrics.loss), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
