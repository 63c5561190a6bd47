"""modeling_lcx.py: any pattern of the mixers in `tables.PARTS`."""

from dataclasses import asdict

from lcx.interop.architecture import Architecture
from lcx.interop.formats.base import Fields, Format, in_layers, section
from lcx.interop.tables import PARTS, Table, table


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
    shared = section(fields, " ".join(layers), fields["num_hidden_layers"] // len(layers), "norm_eps", 1e-5)
    return shared | {"family": "custom", "mixers": fields["mixers"], "residual_dtype": fields["residual_dtype"]}


LCX = Format("LcxForCausalLM", "lcx", _fit_lcx, _lcx_names, _read_lcx, in_layers("model"), code=True)
