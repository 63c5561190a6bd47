"""SAMBA in the names of flash-linear-attention."""

from lcx.errors import UserError
from lcx.interop.architecture import Architecture
from lcx.interop.formats.base import Fields, Format, in_layers, section
from lcx.interop.formats.mamba import read_mamba_options
from lcx.interop.tables import PARTS, Table, table


def _fla_names(model: Architecture) -> Table:
    """Two layers here are one block there: a mixer and an MLP."""
    lines = ["backbone.embeddings.weight = embedding/table"]
    parts, blocks = {}, len(model.pattern) // 2
    for index, (path, (name,)) in enumerate(zip(model.layer_paths, model.pattern, strict=True)):
        there = f"backbone.layers.{blocks}*+{index // 2}"
        mixer = ("mixer", "mlp")[index % 2]
        parts[f"MIXER_{name}"] = PARTS[model.types[name]]
        lines.append(f"{there}.{mixer}_norm.weight = {path}/norm/scale")
        lines.append(f"{there}.{mixer}. MIXER_{name} {path}/mixers/{name}/")
    lines += ["backbone.norm_f.weight = norm/scale", "lm_head.weight = head/table"]
    return table("\n".join(lines), **parts)


def _fit_fla(model: Architecture) -> Fields | str:
    found = model.alternates("mamba", "mlp", "attention", "mlp")
    if found is None:
        return "its layers are not mamba, mlp, attention, mlp in turn"
    mamba, mlp, heads, second = found
    if mlp != second:
        return "its MLPs are not all of one width"
    if heads.window is None or heads.sink is not None or heads.sink_tokens or heads.qk_norm or heads.rope_base is None:
        return "its attention is not plain sliding-window attention with rotary positions"
    if heads.head_dim * heads.num_heads != model.config.d_model:
        return "its heads together are not as wide as the model"
    if mamba.dt_B_C_norm:
        return "its mamba layers have norms of dt, B and C"
    config = model.config
    blocks = config.periods * len(model.pattern) // 2
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": blocks,
        "state_size": mamba.state_size,
        "expand": mamba.expand,
        "conv_kernel": mamba.conv_width,
        "time_step_rank": mamba.dt_rank,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "norm_eps": config.norm_eps,
        "residual_in_fp32": config.residual_dtype == "float32",
        "attn": {
            "layers": list(range(1, blocks, 2)),
            "num_heads": heads.num_heads,
            "num_kv_heads": heads.num_kv_heads,
            "qkv_bias": False,
            "window_size": heads.window,
            "rope_theta": heads.rope_base,
        },
        "intermediate_size": mlp.d_ff,
        "hidden_ratio": None,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_fla(fields: Fields) -> Fields:
    heads, blocks = fields["attn"], fields["num_hidden_layers"]
    if list(heads["layers"]) != list(range(1, blocks, 2)) or blocks % 2:
        raise UserError("its attention is not in every second block: lcx reads SAMBA's own order only.")
    if not fields.get("intermediate_size"):
        raise UserError("it gives no intermediate_size: set it to the width of the MLPs.")
    mamba = {"type": "mamba", "state_size": 16} | read_mamba_options(fields)
    rank = fields.get("time_step_rank", "auto")
    mamba |= {} if rank == "auto" else {"dt_rank": rank}
    swa = {"type": "attention", "num_heads": heads["num_heads"], "num_kv_heads": heads.get("num_kv_heads")}
    swa |= {"window": heads["window_size"], "rope_base": heads.get("rope_theta", 10_000.0)}
    mlp = {"type": "mlp", "d_ff": fields["intermediate_size"]}
    shared = section(fields, "mamba mlp swa mlp", blocks // 2, "norm_eps", 1e-5)
    return shared | {"family": "samba", "mixers": {"mamba": mamba, "swa": swa, "mlp": mlp}}


FLA = Format("SambaForCausalLM", "samba", _fit_fla, _fla_names, _read_fla, in_layers("backbone"), 2, library="fla")
