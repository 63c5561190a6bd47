"""Mamba and Mamba-2."""

import math
from collections.abc import Callable
from typing import Any

from lcx.interop.architecture import Architecture
from lcx.interop.formats.base import Fields, Format, expect, in_layers, section
from lcx.interop.tables import MAMBA as MAMBA_PARTS
from lcx.interop.tables import MAMBA2 as MAMBA2_PARTS
from lcx.interop.tables import Table, table


def _mamba_names(parts: Table) -> Callable[[Architecture], Table]:
    def names(model: Architecture) -> Table:
        lines = ["backbone.embeddings.weight = embedding/table"]
        for index, (path, (name,)) in enumerate(zip(model.layer_paths, model.pattern, strict=True)):
            there = f"backbone.layers.{len(model.pattern)}*+{index}"
            lines += [f"{there}.norm.weight = {path}/norm/scale", f"{there}.mixer. MIXER {path}/mixers/{name}/"]
        lines += ["backbone.norm_f.weight = norm/scale", "lm_head.weight = head/table"]
        return table("\n".join(lines), MIXER=parts)

    return names


def _mamba_fields(model: Architecture, options: Any) -> Fields:
    config = model.config
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.periods * len(model.pattern),
        "state_size": options.state_size,
        "expand": options.expand,
        "conv_kernel": options.conv_width,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_dtype == "float32",
        "tie_word_embeddings": config.tie_embeddings,
        "time_step_min": options.dt_min,
        "time_step_max": options.dt_max,
        "time_step_floor": options.dt_init_floor,
    }


def _fit_mamba(model: Architecture) -> Fields | str:
    found = model.alternates("mamba")
    if found is None:
        return "its layers are not all mamba, of one kind"
    if found[0].dt_B_C_norm:
        return "its mamba layers have norms of dt, B and C"
    return _mamba_fields(model, found[0]) | {
        "time_step_rank": found[0].dt_rank,
        "intermediate_size": found[0].expand * model.config.d_model,
    }


def _fit_mamba2(model: Architecture) -> Fields | str:
    found = model.alternates("mamba2")
    if found is None:
        return "its layers are not all mamba2, of one kind"
    options = found[0]
    fields = _mamba_fields(model, options) | {
        "num_heads": options.expand * model.config.d_model // options.head_dim,
        "head_dim": options.head_dim,
        "n_groups": options.num_groups,
        "chunk_size": options.chunk_size,
    }
    return fields | ({} if options.dt_limit is None else {"time_step_limit": list(options.dt_limit)})


def read_mamba_options(fields: Fields) -> Fields:
    expect(fields, "hidden_act", "silu")
    expect(fields, "use_bias", False)
    expect(fields, "use_conv_bias", True)
    names = {"state_size": "state_size", "expand": "expand", "conv_kernel": "conv_width"}
    names |= {"time_step_min": "dt_min", "time_step_max": "dt_max", "time_step_floor": "dt_init_floor"}
    return {here: fields[there] for there, here in names.items() if there in fields}


def _read_mamba(fields: Fields) -> Fields:
    options = {"type": "mamba", "state_size": 16} | read_mamba_options(fields)
    rank = fields.get("time_step_rank", "auto")
    options |= {} if rank == "auto" else {"dt_rank": rank}
    shared = section(fields, "mamba", fields["num_hidden_layers"], "layer_norm_epsilon", 1e-5, tied=True)
    return shared | {"family": "mamba", "mixers": {"mamba": options}}


def _read_mamba2(fields: Fields) -> Fields:
    options = {"type": "mamba2"} | read_mamba_options(fields)
    options |= {"head_dim": fields.get("head_dim", 64), "num_groups": fields.get("n_groups", 8)}
    options |= {"chunk_size": fields["chunk_size"]} if "chunk_size" in fields else {}
    low, high = map(float, fields.get("time_step_limit") or (0.0, math.inf))
    options |= {} if (low, high) == (0.0, math.inf) else {"dt_limit": [low, min(high, 1e30)]}
    shared = section(fields, "mamba2", fields["num_hidden_layers"], "layer_norm_epsilon", 1e-5, tied=False)
    return shared | {"family": "mamba2", "mixers": {"mamba2": options}}


MAMBA = Format("MambaForCausalLM", "mamba", _fit_mamba, _mamba_names(MAMBA_PARTS), _read_mamba, in_layers("backbone"))
MAMBA2 = Format(
    "Mamba2ForCausalLM", "mamba2", _fit_mamba2, _mamba_names(MAMBA2_PARTS), _read_mamba2, in_layers("backbone")
)
