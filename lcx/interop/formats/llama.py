"""Llama and its kin: Mistral with windows, Qwen3 with normed heads."""

from collections.abc import Callable

from lcx.errors import UserError
from lcx.interop.architecture import Architecture
from lcx.interop.formats.base import Fields, Format, expect, in_layers, section
from lcx.interop.tables import ATTENTION, MLP, Table, table


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
        expect(fields, "hidden_act", "silu")
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
        return section(fields, "attention mlp", fields["num_hidden_layers"], "rms_norm_eps", 1e-6) | {
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
            "would be another one. To begin from its weights with the plain base, take that field out of config.json."
        )
    if float(rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1) != 1:
        raise UserError("its RoPE turns a part of each head (partial_rotary_factor): lcx turns whole heads.")
    return float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0)


def _llama_kin(architecture: str, model_type: str, windowed: bool = False, normed: bool = False) -> Format:
    fit, read = _fit_transformer(windowed, normed), _read_transformer(windowed, normed)
    return Format(architecture, model_type, fit, _transformer_names, read, in_layers("model"), 2)


LLAMA = _llama_kin("LlamaForCausalLM", "llama")
MISTRAL = _llama_kin("MistralForCausalLM", "mistral", windowed=True)
QWEN3 = _llama_kin("Qwen3ForCausalLM", "qwen3", normed=True)
