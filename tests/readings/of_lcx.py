"""A model of lcx, written the way the readings take it."""

import numpy as np

from lcx.config import ModelConfig
from lcx.models.pattern import layer_names, parse_pattern


def attention(params: dict) -> dict:
    """Of the mixers attention and infini."""
    weights = {name: params[name]["weight"] for name in ("query", "key", "value", "output")}
    return weights | ({"gate": params["gate"]} if "gate" in params else {})


def mlp(params: dict) -> dict:
    return {name: params[name]["weight"] for name in ("gate", "up", "down")}


def mamba(params: dict) -> dict:
    in_proj = params["in_proj"]["weight"]
    weights = {name: params[name] for name in ("dt_proj", "dt_bias", "A_log")}
    weights |= {"conv_weight": params["conv"]["weight"], "conv_bias": params["conv"]["bias"]}
    weights |= {name: params[name]["scale"] for name in ("dt_norm", "B_norm", "C_norm") if name in params}
    weights |= {"in_proj": in_proj.reshape(in_proj.shape[0], -1), "skip": params["D"]}
    return weights | {name: params[name]["weight"] for name in ("x_proj", "out_proj")}


def mamba2(params: dict) -> dict:
    """The pieces of in_proj and of the convolution side by side, heads and groups as runs of channels."""
    d_model, inner = params["dt_proj"]["weight"].shape[0], params["norm_scale"].size
    columns = [params[name]["weight"].reshape(d_model, -1) for name in ("z_x_proj", "B_C_proj", "dt_proj")]
    convs = [params[name] for name in ("x_conv", "B_C_conv")]
    weights = {"in_proj": np.concatenate(columns, axis=1), "skip": params["D"]} | {
        "conv_weight": np.concatenate([conv["weight"].reshape(-1, conv["weight"].shape[-1]) for conv in convs]),
        "conv_bias": np.concatenate([conv["bias"].reshape(-1) for conv in convs]),
        "norm": params["norm_scale"].reshape(-1),
        "out_proj": params["out_proj"]["weight"].reshape(inner, d_model),
    }
    return weights | {name: params[name] for name in ("dt_bias", "A_log")}


WEIGHTS = {"attention": attention, "infini": attention, "mlp": mlp, "mamba": mamba, "mamba2": mamba2}


def model(config: ModelConfig, params: dict) -> dict:
    """All weights of a tied model of NumPy parameters whose layers have one mixer each."""
    pattern, layers = parse_pattern(config.pattern, config.mixers), []
    for period in range(config.periods):
        for key, (name,) in zip(layer_names(pattern), pattern, strict=True):
            layer = _index(params["stack"]["layers"][key], period)
            weights = WEIGHTS[config.mixers[name]["type"]](layer["mixers"][name])
            layers.append({"norm": layer["norm"]["scale"], "weights": weights})
    return {"embedding": params["embedding"]["table"], "final_norm": params["norm"]["scale"], "layers": layers}


def _index(tree: dict, period: int) -> dict:
    return {key: _index(value, period) if isinstance(value, dict) else value[period] for key, value in tree.items()}
