"""Where each parameter of a Hugging Face model stands in lcx's parameter tree.

A line is: name there, layout, path here. In a name, `*` is the number of the layer there and of the period here, where
layers are stacked on a first axis; with two layers a period, `2*+1` is every second one.

A name that has several lines is cut along its first axis, one piece a line, in their order.

Layout T: there a matrix is [outputs, inputs], here [*inputs, *outputs], where heads or halves are axes of their own.
Layout =: the same order of numbers in both, though axes of size 1 may be missing here.
In capitals: the lines of that table, each with what stands here in front. Lines that a model has not are passed over.
"""

import math
import re
from collections.abc import Mapping

import jax
import numpy as np

from lcx.params import path_name

Table = tuple[tuple[str, str, str], ...]  # (name there, T or =, path here)


def _table(text: str, **parts: Table) -> Table:
    lines = []
    for name, layout, path in map(str.split, text.strip().splitlines()):
        part = parts.get(layout, (("", layout, ""),))
        lines += [(name + inner, turned, path + place) for inner, turned, place in part]
    return tuple(lines)


ATTENTION = _table("""
    q_proj.weight       T   query/weight
    k_proj.weight       T   key/weight
    v_proj.weight       T   value/weight
    o_proj.weight       T   output/weight
    q_norm.weight       =   query_norm/scale
    k_norm.weight       =   key_norm/scale
    sinks               =   sink_logit
""")

MLP = _table("""
    gate_proj.weight    T   gate/weight
    up_proj.weight      T   up/weight
    down_proj.weight    T   down/weight
""")

MAMBA = _table("""
    in_proj.weight      T   in_proj/weight
    conv1d.weight       =   conv/weight
    conv1d.bias         =   conv/bias
    x_proj.weight       T   x_proj/weight
    dt_layernorm.weight =   dt_norm/scale
    b_layernorm.weight  =   B_norm/scale
    c_layernorm.weight  =   C_norm/scale
    dt_proj.weight      T   dt_proj
    dt_proj.bias        =   dt_bias
    A_log               =   A_log
    D                   =   D
    out_proj.weight     T   out_proj/weight
""")

MAMBA2 = _table("""
    in_proj.weight      T   z_x_proj/weight
    in_proj.weight      T   B_C_proj/weight
    in_proj.weight      T   dt_proj/weight
    conv1d.weight       =   x_conv/weight
    conv1d.weight       =   B_C_conv/weight
    conv1d.bias         =   x_conv/bias
    conv1d.bias         =   B_C_conv/bias
    dt_bias             =   dt_bias
    A_log               =   A_log
    D                   =   D
    norm.weight         =   norm_scale
    out_proj.weight     T   out_proj/weight
""")

# Llama, Mistral, Qwen3
TRANSFORMER_MODEL = _table(
    """
    model.embed_tokens.weight                         =           embedding/table
    model.layers.*.input_layernorm.weight             =           stack/layers/0_attention/norm/scale
    model.layers.*.self_attn.                         ATTENTION   stack/layers/0_attention/mixers/attention/
    model.layers.*.post_attention_layernorm.weight    =           stack/layers/1_mlp/norm/scale
    model.layers.*.mlp.                               MLP         stack/layers/1_mlp/mixers/mlp/
    model.norm.weight                                 =           norm/scale
    lm_head.weight                                    =           head/table
    """,
    ATTENTION=ATTENTION,
    MLP=MLP,
)


def _mamba_model(mixer: str, parts: Table) -> Table:
    return _table(
        f"""
        backbone.embeddings.weight                    =           embedding/table
        backbone.layers.*.norm.weight                 =           stack/layers/0_{mixer}/norm/scale
        backbone.layers.*.mixer.                      MIXER       stack/layers/0_{mixer}/mixers/{mixer}/
        backbone.norm_f.weight                        =           norm/scale
        lm_head.weight                                =           head/table
        """,
        MIXER=parts,
    )


MAMBA_MODEL = _mamba_model("mamba", MAMBA)
MAMBA2_MODEL = _mamba_model("mamba2", MAMBA2)

# Jamba with attention in every second layer and no experts
JAMBA_MODEL = _table(
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
    ATTENTION=ATTENTION,
    MLP=MLP,
    MAMBA=MAMBA,
)


def to_lcx(arrays: Mapping[str, np.ndarray], table: Table, shapes: dict) -> dict:
    """Parameters, or their gradients, in lcx's layout.

    Args:
      arrays: by the names there; a head that is tied to the embedding is left out.
      table: of the model, or of a mixer by itself.
      shapes: lcx's tree, with a shape in each leaf.

    Returns the tree, filled. Raises ValueError unless each name there has its place here and the other way round.
    """
    wanted = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    left, found = dict(arrays), {}
    for name, layout, path in table:
        if path not in wanted:
            continue
        periods = wanted[path][0] if "*" in name else 1
        pieces = [_cut(left, _numbered(name, period), math.prod(wanted[path]) // periods) for period in range(periods)]
        if all(piece is not None for piece in pieces):
            found[path] = np.stack([piece.T if layout == "T" else piece for piece in pieces]).reshape(wanted[path])
    if left or found.keys() != wanted.keys():
        raise ValueError(f"no place for {sorted(left)}; no values for {sorted(wanted.keys() - found.keys())}")
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], shapes)


def _cut(arrays: dict[str, np.ndarray], name: str, size: int) -> np.ndarray | None:
    """Takes the first rows of an array, `size` numbers, out of the dict; None where it is not there."""
    if name not in arrays:
        return None
    whole = arrays.pop(name)
    rows = size // math.prod(whole.shape[1:])
    if rows < len(whole):
        arrays[name] = whole[rows:]
    return whole[:rows]


def _numbered(name: str, period: int) -> str:
    return re.sub(r"(\d*)\*\+?(\d*)", lambda found: str(int(found[1] or 1) * period + int(found[2] or 0)), name)
