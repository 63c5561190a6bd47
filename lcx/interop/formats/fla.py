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
        "hidden_act": "swish",
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
        "hidden_ratio": _ratio(config.d_model, mlp.d_ff),
        "mlp_intermediate_size": mlp.d_ff,  # for lcx: there, the width follows from the ratio
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_fla(fields: Fields) -> Fields:
    heads, blocks = fields["attn"], fields["num_hidden_layers"]
    if list(heads["layers"]) != list(range(1, blocks, 2)) or blocks % 2:
        raise UserError("its attention is not in every second block: lcx reads SAMBA's own order only.")
    d_ff = fields.get("mlp_intermediate_size") or _width(fields["hidden_size"], fields["hidden_ratio"])
    mamba = {"type": "mamba", "state_size": 16} | read_mamba_options(fields | {"hidden_act": "silu"})
    rank = fields.get("time_step_rank", "auto")
    mamba |= {} if rank == "auto" else {"dt_rank": rank}
    swa = {"type": "attention", "num_heads": heads["num_heads"], "num_kv_heads": heads.get("num_kv_heads")}
    swa |= {"window": heads["window_size"], "rope_base": heads.get("rope_theta", 10_000.0)}
    mlp = {"type": "mlp", "d_ff": d_ff}
    shared = section(fields, "mamba mlp swa mlp", blocks // 2, "norm_eps", 1e-5)
    return shared | {"family": "samba", "mixers": {"mamba": mamba, "swa": swa, "mlp": mlp}}


def _width(d_model: int, ratio: float) -> int:
    """The width of an MLP there: two thirds of ratio * d_model, rounded up to a multiple of 256."""
    return -(-int(d_model * ratio * 2 / 3) // 256) * 256


def _ratio(d_model: int, d_ff: int) -> float:
    """The ratio that gives a width, or comes nearest to it."""
    whole = round(1.5 * d_ff / d_model)
    return whole if _width(d_model, whole) == d_ff else 1.5 * (d_ff - 1) / d_model


def _caveat(model: Architecture) -> str:
    """What keeps flash-linear-attention from loading the export as it is."""
    (d_ff,) = {options.d_ff for options in model.options.values() if hasattr(options, "d_ff")}
    width = _width(model.config.d_model, _ratio(model.config.d_model, d_ff))
    if width == d_ff:
        return ""
    return f"; its MLPs have widths that are multiples of 256, {width} here, and these have {d_ff}: change its code"


FLA = Format(
    "SambaForCausalLM",
    "samba",
    _fit_fla,
    _fla_names,
    _read_fla,
    in_layers("backbone"),
    2,
    library="fla",
    caveat=_caveat,
)
