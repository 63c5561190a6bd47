"""Parameters, bytes of state and FLOPs of a model, from its config alone: nothing is allocated or compiled."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lcx.config import ModelConfig
from lcx.models import LanguageModel
from lcx.params import count_parameters, split

HEAD = "head"  # as its scope is called in compiled programs
TRAINING = 3  # passes of a step, by their FLOPs: forward, and twice as many backward
# The `model` section of a config in any form, or the model itself, with or without values.
Model = ModelConfig | Mapping[str, Any] | LanguageModel


def abstract_model(model: Model) -> LanguageModel:
    """The model without values; takes no memory. Raises UserError for a config that cannot be built.

    All functions of this module do this to what they are given, so that several questions about one model are answered
    faster from what this returns.
    """
    if isinstance(model, LanguageModel):
        return model
    return nnx.eval_shape(lambda: LanguageModel(model, nnx.Rngs(0)))


def parameter_count(model: Model) -> int:
    """The number of parameters; a tied embedding counts once."""
    return count_parameters(split(abstract_model(model))[1])


def state_bytes(model: Model, context: int) -> int:
    """Bytes of what one sequence of `context` tokens leaves behind for the next token.

    That is `init_state(1, context)`: keys and values in the compute dtype, recurrent states in at least float32, two
    int32 counters. A compute_dtype of "auto" is what it means on this machine.
    """
    model = abstract_model(model)
    state = jax.eval_shape(lambda: model.init_state(1, context))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def flops_per_token(model: Model, tokens: int) -> float | None:
    """Forward FLOPs of a document of `tokens` tokens, divided by its tokens.

    What counts is said in `Mixer.flops`; the head is included. None if a mixer of the model does not know its own.
    """
    total = abstract_model(model).flops(tokens)
    return None if total is None else total / tokens


def flops_by_kind(model: Model, tokens: int) -> dict[str, int | None]:
    """Forward FLOPs of a document of `tokens` tokens, by mixer of the pattern and of the "head".

    None for a mixer that does not know its own.
    """
    model = abstract_model(model)
    head = model.output
    return model.stack.by_mixer(lambda mixer: mixer.flops(tokens)) | {HEAD: head.flops(tokens)}


def vector_flops_by_kind(model: Model, tokens: int) -> dict[str, int | None]:
    """The part of `flops_by_kind` that matrix units cannot do, by mixer."""
    return abstract_model(model).stack.by_mixer(lambda mixer: mixer.vector_flops(tokens))


def mfu(
    flops_per_document: int | None, tokens: int, tokens_per_second: float, devices: int, peak: float | None
) -> float | None:
    """Model FLOPs utilisation in training: model FLOPs, backward being twice forward, over what the chips could do.

    What remat computes again does not count (PaLM, arXiv 2204.02311, appendix B).

    Args:
      flops_per_document: forward, of a document of `tokens` tokens; None where it is not known.
      tokens_per_second: of all devices together.
      peak: FLOP/s of one device; None where it is not known.
    """
    if flops_per_document is None or peak is None:
        return None
    return TRAINING * flops_per_document / tokens * tokens_per_second / (devices * peak)
