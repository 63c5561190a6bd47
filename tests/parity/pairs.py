"""Models in both libraries: the same sizes, the same random weights."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lcx.config import ModelConfig
from lcx.interop.architecture import architecture
from lcx.interop.formats import FORMATS
from lcx.interop.tables import ATTENTION as ATTENTION_NAMES
from lcx.interop.tables import MAMBA as MAMBA_NAMES
from lcx.interop.tables import MLP as MLP_NAMES
from lcx.interop.tables import Table, table

torch.set_num_threads(1)  # for matrices as small as these, threads only wait for each other

VOCAB, PERIODS, EPS = 256, 2, 1e-5
D_MODEL, D_FF = 48, 80
HEADS, KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 16, 11  # together the query heads are wider than the stream
STATE_SIZE, RANK = 8, 3
LLAMA3_BASE, BASE = 500_000.0, 10_000.0

# Jamba with attention in every second layer and no experts.
JAMBA_MODEL = table(
    """
    model.embed_tokens.weight                         =           embedding/table
    model.layers.2*.input_layernorm.weight            =           stack/layers/0_mamba/norm/scale
    model.layers.2*.mamba.                            MAMBA       stack/layers/0_mamba/mixers/mamba/
    model.layers.2*.pre_ff_layernorm.weight           =           stack/layers/1_mlp/norm/scale
    model.layers.2*.feed_forward.                     MLP         stack/layers/1_mlp/mixers/mlp/
    model.layers.2*+1.input_layernorm.weight          =           stack/layers/2_nope/norm/scale
    model.layers.2*+1.self_attn.                      ATTENTION   stack/layers/2_nope/mixers/nope/
    model.layers.2*+1.pre_ff_layernorm.weight         =           stack/layers/3_mlp/norm/scale
    model.layers.2*+1.feed_forward.                   MLP         stack/layers/3_mlp/mixers/mlp/
    model.final_layernorm.weight                      =           norm/scale
    lm_head.weight                                    =           head/table
    """,
    ATTENTION=ATTENTION_NAMES,
    MLP=MLP_NAMES,
    MAMBA=MAMBA_NAMES,
)


@dataclass(frozen=True)
class Pair:
    """A Hugging Face model, and the `model` section of the lcx config that should be the same function."""

    family: type[PreTrainedModel]
    config: PreTrainedConfig
    section: dict
    format: str | None  # whose names they are; None: Jamba's, which lcx does not write
    packs: bool  # does the model there keep apart documents that share a row?

    @property
    def table(self) -> Table:
        """Where each parameter there stands here."""
        if self.format is None:
            return JAMBA_MODEL
        return FORMATS[self.format].names(architecture(ModelConfig.from_dict(self.section)))

    def make(self, seed: int) -> PreTrainedModel:
        """The model there, with random weights."""
        model = self.family(self.config).train()
        randomize(model, seed)
        return model

    def logits(self, model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The model's logits [batch, time, vocab]; where it cannot pack, each document is computed by itself."""
        if self.packs:
            return model(tokens, position_ids=positions, use_cache=False).logits
        if bool((positions[:, 1:] > 0).all()):
            return model(tokens, use_cache=False).logits
        rows = []
        for row, places in zip(tokens, positions, strict=True):
            borders = [*torch.nonzero(places == 0).flatten().tolist(), len(row)]
            documents = [row[None, start:stop] for start, stop in itertools.pairwise(borders)]
            rows.append(torch.cat([model(document, use_cache=False).logits for document in documents], dim=1))
        return torch.cat(rows)


def randomize(module: nn.Module, seed: int) -> None:
    """Fills all parameters, so that none is without effect: matrices with variance 1 / fan_in, norms near 1."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if name.endswith("A_log"):
                parameter.copy_(torch.log(torch.arange(1.0, parameter.shape[-1] + 1)) + 0.1 * noise)
            elif name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.copy_(-3.0 + noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
            elif name.endswith(("bias", "sinks")):
                parameter.copy_(noise)
            else:  # norms and D
                parameter.copy_(1.0 + 0.2 * noise)


def named_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """The parameters by name; one that has two names (a tied head) has the first."""
    return {name: parameter.detach().numpy().copy() for name, parameter in module.named_parameters()}


def named_gradients(module: nn.Module) -> dict[str, np.ndarray]:
    """The gradients that the last backward pass left, by the parameters' names."""
    return {name: parameter.grad.numpy().copy() for name, parameter in module.named_parameters()}


ATTENTION = dict(type="attention", num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
MLP = dict(type="mlp", d_ff=D_FF)
MAMBA = dict(type="mamba", state_size=STATE_SIZE, dt_rank=RANK)


def _section(pattern: str, tied: bool, **mixers: dict) -> dict:
    sizes = dict(periods=PERIODS, d_model=D_MODEL, vocab_size=VOCAB, norm_eps=EPS)
    return dict(pattern=pattern, mixers=mixers, tie_embeddings=tied, compute_dtype="float32", **sizes)


def _transformer(
    family: type, config: type, *, base: float = BASE, tied: bool = False, there: dict | None = None, **here
) -> Pair:
    """Llama or one of its kin; `there` and `here` are what it has besides."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=PERIODS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    section = _section("attention mlp", tied, attention=ATTENTION | {"rope_base": base} | here, mlp=MLP)
    return Pair(family, config(**settings | (there or {})), section, config.model_type, packs=True)


def _mamba(*, tied: bool) -> Pair:
    config = MambaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=PERIODS,
        state_size=STATE_SIZE,
        time_step_rank=RANK,
        layer_norm_epsilon=EPS,
        use_bias=False,
        use_conv_bias=True,
        residual_in_fp32=True,
        tie_word_embeddings=tied,
    )
    return Pair(MambaForCausalLM, config, _section("mamba", tied, mamba=MAMBA), "mamba", packs=False)


def _mamba2(*, tied: bool, groups: int, limit: tuple[float, float] = (0.0, math.inf)) -> Pair:
    """Chunks there are of another length than here."""
    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=PERIODS,
        num_heads=2 * D_MODEL // HEAD_DIM,
        head_dim=HEAD_DIM,
        state_size=STATE_SIZE,
        n_groups=groups,
        chunk_size=16,
        time_step_limit=limit,
        layer_norm_epsilon=EPS,
        use_bias=False,
        use_conv_bias=True,
        residual_in_fp32=True,
        tie_word_embeddings=tied,
    )
    mixer = dict(type="mamba2", head_dim=HEAD_DIM, state_size=STATE_SIZE, num_groups=groups, chunk_size=12)
    mixer |= {} if limit[1] == math.inf else {"dt_limit": limit}
    return Pair(Mamba2ForCausalLM, config, _section("mamba2", tied, mamba2=mixer), "mamba2", packs=False)


def _jamba() -> Pair:
    """A hybrid: Mamba with norms of dt, B and C, and attention without positions, MLPs between them."""
    config = JambaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=2 * PERIODS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        rms_norm_eps=EPS,
        mamba_d_state=STATE_SIZE,
        mamba_dt_rank=RANK,
        pad_token_id=None,  # its row of the embedding would have no gradient
        attn_implementation="eager",
    )
    section = _section(
        "mamba mlp nope mlp",
        False,
        mamba=MAMBA | {"dt_B_C_norm": True},
        nope=ATTENTION | {"head_dim": D_MODEL // HEADS, "rope_base": None},
        mlp=MLP,
    )
    return Pair(JambaForCausalLM, config, section, None, packs=False)


PAIRS = {
    "llama": _transformer(LlamaForCausalLM, LlamaConfig, base=LLAMA3_BASE),
    "llama-tied": _transformer(LlamaForCausalLM, LlamaConfig, tied=True),
    "mistral": _transformer(MistralForCausalLM, MistralConfig, there={"sliding_window": WINDOW}, window=WINDOW),
    "qwen3": _transformer(Qwen3ForCausalLM, Qwen3Config, qk_norm=True),
    "mamba": _mamba(tied=True),
    "mamba-untied": _mamba(tied=False),
    "mamba2": _mamba2(tied=True, groups=1),
    "mamba2-grouped": _mamba2(tied=False, groups=2, limit=(0.02, 0.2)),
    "jamba": _jamba(),
}
