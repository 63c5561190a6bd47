"""The formats: how a model is called and described elsewhere, and back.

A format is a row of FORMATS. Where its `fit` finds that a model is one of its own, it gives `config.json`'s fields and
the table of names; `read` turns such a config.json into a `model` section. Adding a format is adding a row.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lcx.config import choose
from lcx.errors import UserError
from lcx.interop.architecture import Architecture
from lcx.interop.tables import ATTENTION, MAMBA, MAMBA2, MLP, PARTS, Table, table

TRANSFORMERS = ">=5.0,<6"  # the versions that exports are for
Fields = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One way to write a model down."""

    architecture: str  # the class there
    fit: Callable[[Architecture], Fields | str]  # the fields of config.json; or why the model is not of this kind
    names: Callable[[Architecture], Table]
    read: Callable[[Fields], Fields]  # from config.json's fields to the `model` section of an lcx config
    blocks: Callable[[str], str]  # the module of the block there that a tensor belongs to, "" for none
    layers_per_block: int = 1  # layers here
    library: str = "transformers"  # that runs it
    model_type: str = ""
    code: bool = False  # does modeling_lcx.py belong to it?


# ---- Llama and its kin ------------------------------------------------------------------------------------------------


def _transformer_names(model: Architecture) -> Table:
    """Two layers here are one there."""
    lines = ["model.embed_tokens.weight = embedding/table"]
    blocks = len(model.pattern) // 2
    for index, (path, (name,)) in enumerate(zip(model.layer_paths, model.pattern, strict=True)):
        there = f"model.layers.{blocks}*+{index // 2}"
        norm, mixer = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))[index % 2]
        lines.append(f"{there}.{norm}.weight = {path}/norm/scale")
        lines.append(f"{there}.{mixer}. MIXER{index % 2} {path}/mixers/{name}/")
    lines += ["model.norm.weight = norm/scale", "lm_head.weight = head/table"]
    return table("\n".join(lines), MIXER0=ATTENTION, MIXER1=MLP)


def _fit_transformer(windowed: bool, normed: bool) -> Callable[[Architecture], Fields | str]:
    def fit(model: Architecture) -> Fields | str:
        config, found = model.config, model.alternates("attention", "mlp")
        if found is None:
            return "its layers are not one attention and one mlp in turn"
        heads, mlp = found
        if heads.sink is not None or heads.sink_tokens:
            return "its attention has sinks"
        if heads.rope_base is None:
            return "its attention has no positions"
        if heads.qk_norm != normed:
            return f"its heads are {'not ' * normed}normed"
        if heads.window is not None and not windowed:
            return "its attention has a window"
        if not (windowed or normed) and config.d_model % heads.num_heads:
            return f"num_heads={heads.num_heads} does not divide d_model={config.d_model}"
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": mlp.d_ff,
            "num_hidden_layers": config.periods * len(model.pattern) // 2,
            "num_attention_heads": heads.num_heads,
            "num_key_value_heads": heads.num_kv_heads,
            "head_dim": heads.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": heads.rope_base},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": config.tie_embeddings,
        } | ({"sliding_window": heads.window} if windowed else {"mlp_bias": False} if not normed else {})

    return fit


def _read_transformer(windowed: bool, normed: bool) -> Callable[[Fields], Fields]:
    def read(fields: Fields) -> Fields:
        for name in ("attention_bias", "mlp_bias"):
            if fields.get(name):
                raise UserError(f"{name} is true: lcx has no biases there.")
        _expect(fields, "hidden_act", "silu")
        heads = fields["num_attention_heads"]
        attention = {
            "type": "attention",
            "num_heads": heads,
            "num_kv_heads": fields.get("num_key_value_heads") or heads,
            "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
            "rope_base": _rope_base(fields),
        }
        if windowed and fields.get("sliding_window", 4096 if "sliding_window" not in fields else None):
            attention["window"] = fields.get("sliding_window", 4096)
        if normed:
            attention["qk_norm"] = True
            if fields.get("use_sliding_window"):
                raise UserError("use_sliding_window is true: lcx does not read Qwen3's windows.")
        return _section(fields, "attention mlp", fields["num_hidden_layers"], "rms_norm_eps", 1e-6) | {
            "family": "transformer",
            "mixers": {"attention": attention, "mlp": {"type": "mlp", "d_ff": fields["intermediate_size"]}},
        }

    return read


def _rope_base(fields: Fields) -> float:
    """The base, from today's `rope_parameters` or the `rope_theta` and `rope_scaling` of older files.

    Raises UserError where the frequencies are scaled: lcx has no such scaling.
    """
    rope = dict(fields.get("rope_scaling") or {}) | dict(fields.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        numbers = ", ".join(f"{name}={value}" for name, value in rope.items() if name not in ("rope_type", "type"))
        raise UserError(
            f'its RoPE is scaled (rope_type "{kind}"; {numbers}), which lcx does not compute: without it the model '
            "would be another one. To begin from its weights with the plain base, take that field out of its config.json."
        )
    if float(rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1) != 1:
        raise UserError("its RoPE turns a part of each head (partial_rotary_factor): lcx turns whole heads.")
    return float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0)


# ---- Mamba ------------------------------------------------------------------------------------------------------------


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


def _read_mamba_options(fields: Fields) -> Fields:
    _expect(fields, "hidden_act", "silu")
    _expect(fields, "use_bias", False)
    _expect(fields, "use_conv_bias", True)
    names = {"state_size": "state_size", "expand": "expand", "conv_kernel": "conv_width"}
    names |= {"time_step_min": "dt_min", "time_step_max": "dt_max", "time_step_floor": "dt_init_floor"}
    return {here: fields[there] for there, here in names.items() if there in fields}


def _read_mamba(fields: Fields) -> Fields:
    options = {"type": "mamba", "state_size": 16} | _read_mamba_options(fields)
    rank = fields.get("time_step_rank", "auto")
    options |= {} if rank == "auto" else {"dt_rank": rank}
    section = _section(fields, "mamba", fields["num_hidden_layers"], "layer_norm_epsilon", 1e-5, tied=True)
    return section | {"family": "mamba", "mixers": {"mamba": options}}


def _read_mamba2(fields: Fields) -> Fields:
    options = {"type": "mamba2"} | _read_mamba_options(fields)
    options |= {"head_dim": fields.get("head_dim", 64), "num_groups": fields.get("n_groups", 8)}
    options |= {"chunk_size": fields["chunk_size"]} if "chunk_size" in fields else {}
    low, high = map(float, fields.get("time_step_limit") or (0.0, math.inf))
    options |= {} if (low, high) == (0.0, math.inf) else {"dt_limit": [low, min(high, 1e30)]}
    section = _section(fields, "mamba2", fields["num_hidden_layers"], "layer_norm_epsilon", 1e-5, tied=False)
    return section | {"family": "mamba2", "mixers": {"mamba2": options}}


# ---- modeling_lcx.py: any pattern of the mixers in tables.PARTS -------------------------------------------------------


def _lcx_names(model: Architecture) -> Table:
    lines = ["model.embed_tokens.weight = embedding/table"]
    parts: dict[str, Table] = {}
    for index, (path, layer) in enumerate(zip(model.layer_paths, model.pattern, strict=True)):
        there = f"model.layers.{len(model.pattern)}*+{index}"
        lines.append(f"{there}.norm.weight = {path}/norm/scale")
        for name in layer:
            parts[f"MIXER_{name}"] = PARTS[model.types[name]]
            lines.append(f"{there}.mixers.{name}. MIXER_{name} {path}/mixers/{name}/")
    lines += ["model.norm.weight = norm/scale", "lm_head.weight = head/table"]
    return table("\n".join(lines), **parts)


def _fit_lcx(model: Architecture) -> Fields | str:
    for name, kind in model.types.items():
        if kind not in PARTS:
            return f'its mixer "{name}" is {kind}, which modeling_lcx.py does not have'
    config = model.config
    windows = [getattr(options, "window", None) for options in model.options.values() if hasattr(options, "window")]
    return {
        "auto_map": {"AutoConfig": "modeling_lcx.LcxConfig", "AutoModelForCausalLM": "modeling_lcx.LcxForCausalLM"},
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.periods * len(model.pattern),
        "pattern": [list(names) for names in model.pattern],  # the mixers of each layer, repeated over the layers
        "mixers": {name: {"type": model.types[name]} | asdict(record) for name, record in model.options.items()},
        "norm_eps": config.norm_eps,
        "residual_dtype": config.residual_dtype,
        "tie_word_embeddings": config.tie_embeddings,
    } | ({"sliding_window": max(windows)} if windows and None not in windows else {})


def _read_lcx(fields: Fields) -> Fields:
    layers = [names[0] if len(names) == 1 else f"parallel({', '.join(names)})" for names in fields["pattern"]]
    section = _section(fields, " ".join(layers), fields["num_hidden_layers"] // len(layers), "norm_eps", 1e-5)
    return section | {"family": "custom", "mixers": fields["mixers"], "residual_dtype": fields["residual_dtype"]}


# ---- flash-linear-attention's SAMBA -----------------------------------------------------------------------------------


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
    mamba = {"type": "mamba", "state_size": 16} | _read_mamba_options(fields)
    rank = fields.get("time_step_rank", "auto")
    mamba |= {} if rank == "auto" else {"dt_rank": rank}
    swa = {"type": "attention", "num_heads": heads["num_heads"], "num_kv_heads": heads.get("num_kv_heads")}
    swa |= {"window": heads["window_size"], "rope_base": heads.get("rope_theta", 10_000.0)}
    mlp = {"type": "mlp", "d_ff": fields["intermediate_size"]}
    section = _section(fields, "mamba mlp swa mlp", blocks // 2, "norm_eps", 1e-5)
    return section | {"family": "samba", "mixers": {"mamba": mamba, "swa": swa, "mlp": mlp}}


# ---- the table --------------------------------------------------------------------------------------------------------


def _in_layers(prefix: str) -> Callable[[str], str]:
    def block(name: str) -> str:
        rest = name.removeprefix(f"{prefix}.layers.")
        return "" if rest == name else f"{prefix}.layers.{rest.partition('.')[0]}"

    return block


def _llama_kin(architecture: str, model_type: str, windowed: bool = False, normed: bool = False) -> Format:
    fit, read = _fit_transformer(windowed, normed), _read_transformer(windowed, normed)
    return Format(architecture, fit, _transformer_names, read, _in_layers("model"), 2, model_type=model_type)


# In the order in which a model's own format is looked for: the first that fits.
FORMATS = {
    "llama": _llama_kin("LlamaForCausalLM", "llama"),
    "mistral": _llama_kin("MistralForCausalLM", "mistral", windowed=True),
    "qwen3": _llama_kin("Qwen3ForCausalLM", "qwen3", normed=True),
    "mamba": Format(
        "MambaForCausalLM", _fit_mamba, _mamba_names(MAMBA), _read_mamba, _in_layers("backbone"), model_type="mamba"
    ),
    "mamba2": Format(
        "Mamba2ForCausalLM", _fit_mamba2, _mamba_names(MAMBA2), _read_mamba2, _in_layers("backbone"),
        model_type="mamba2",
    ),
    "lcx": Format("LcxForCausalLM", _fit_lcx, _lcx_names, _read_lcx, _in_layers("model"), model_type="lcx", code=True),
    "fla": Format(
        "SambaForCausalLM", _fit_fla, _fla_names, _read_fla, _in_layers("backbone"), 2, "fla", model_type="samba"
    ),
}  # fmt: skip


def choose_format(model: Architecture, name: str) -> tuple[str, Fields]:
    """The format called `name`, or the model's own for "auto", and config.json's fields.

    Raises UserError for an unknown name, and for a model that cannot be written so, with the reason.
    """
    if name == "auto":
        fits = {known: form.fit(model) for known, form in FORMATS.items()}
        found = next((known for known, fields in fits.items() if not isinstance(fields, str)), "lcx")
        if isinstance(fits[found], str):
            raise UserError(f"the model cannot be exported: {fits[found]}.")
        return found, fits[found]
    fields = choose("format", name, FORMATS).fit(model)
    if isinstance(fields, str):
        raise UserError(f"the model cannot be exported with --format={name}: {fields}; leave --format out.")
    return name, fields


def find_format(fields: Mapping[str, Any]) -> str:
    """The format of a config.json. Raises UserError for a kind of model that lcx does not read."""
    kind = fields.get("model_type")
    for name, form in FORMATS.items():
        if form.model_type == kind:
            return name
    known = ", ".join(form.model_type for form in FORMATS.values())
    raise UserError(f'its config.json has model_type "{kind}"; lcx reads {known}.')


def _section(
    fields: Fields, pattern: str, periods: int, norm_eps: str, default_eps: float, tied: bool = False
) -> Fields:
    """What all models have; `norm_eps` is the name of the field there, `tied` what is meant where nothing is said."""
    return {
        "pattern": pattern,
        "periods": periods,
        "d_model": fields["hidden_size"],
        "vocab_size": fields["vocab_size"],
        "norm_eps": fields.get(norm_eps, default_eps),
        "tie_embeddings": fields.get("tie_word_embeddings", tied),
    }


def _expect(fields: Fields, name: str, value: Any) -> None:
    if fields.get(name, value) != value:
        raise UserError(f"{name} is {fields[name]!r}: lcx computes {value!r} only.")
