"""Where each parameter of a model in another library stands in lcx's parameter tree.

A line of a table is: name there, layout, path here. In a name `*` is the number of the period, where parameters are
stacked on a first axis here; with two layers a period `2*+1` is every second one. A name that has several lines is cut
along its first axis, one piece a line, in their order. Lines that a model has not are passed over.

| layout | there | here |
| --- | --- | --- |
| `=` | any | the same |
| `flat` | [n] | any, the same order |
| `T1` | [outputs, inputs] | [inputs, *outputs] |
| `T2` | [outputs, inputs] | [*two axes of inputs, *outputs] |
| `conv` | [channels, 1, width] | [*channels, width] |

A layout in capitals is another table, each of its lines with what stands here in front.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from lcx.params import path_name

Table = tuple[tuple[str, str, str], ...]  # (name there, layout, path here)
Shape = tuple[int, ...]


def table(text: str, **parts: Table) -> Table:
    """The lines of a table, written as in the module's docstring; `parts` are the tables in capitals."""
    lines = []
    for name, layout, path in map(str.split, text.strip().splitlines()):
        part = parts.get(layout, (("", layout, ""),))
        lines += [(name + inner, turned, path + place) for inner, turned, place in part]
    return tuple(lines)


HEADS = table("""
    q_proj.weight       T1    query/weight
    k_proj.weight       T1    key/weight
    v_proj.weight       T1    value/weight
    o_proj.weight       T2    output/weight
    q_norm.weight       =     query_norm/scale
    k_norm.weight       =     key_norm/scale
""")

ATTENTION = HEADS + table("sinks = sink_logit")

INFINI = HEADS + table("gate = gate")

MLP = table("""
    gate_proj.weight    T1    gate/weight
    up_proj.weight      T1    up/weight
    down_proj.weight    T1    down/weight
""")

MAMBA = table("""
    in_proj.weight      T1    in_proj/weight
    conv1d.weight       conv  conv/weight
    conv1d.bias         =     conv/bias
    x_proj.weight       T1    x_proj/weight
    dt_layernorm.weight =     dt_norm/scale
    b_layernorm.weight  =     B_norm/scale
    c_layernorm.weight  =     C_norm/scale
    dt_proj.weight      T1    dt_proj
    dt_proj.bias        =     dt_bias
    A_log               =     A_log
    D                   =     D
    out_proj.weight     T1    out_proj/weight
""")

MAMBA2 = table("""
    in_proj.weight      T1    z_x_proj/weight
    in_proj.weight      T1    B_C_proj/weight
    in_proj.weight      T1    dt_proj/weight
    conv1d.weight       conv  x_conv/weight
    conv1d.weight       conv  B_C_conv/weight
    conv1d.bias         flat  x_conv/bias
    conv1d.bias         flat  B_C_conv/bias
    dt_bias             =     dt_bias
    A_log               =     A_log
    D                   =     D
    norm.weight         flat  norm_scale
    out_proj.weight     T2    out_proj/weight
""")

# The mixers that have a form in PyTorch, by their type.
PARTS = {"attention": ATTENTION, "infini": INFINI, "mlp": MLP, "mamba": MAMBA, "mamba2": MAMBA2}


def _matrix(axes: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.reshape(math.prod(array.shape[:axes]), -1).T


# From the array of one period here to the one there.
_THERE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "=": lambda array: array,
    "flat": lambda array: array.reshape(-1),
    "T1": _matrix(1),
    "T2": _matrix(2),
    "conv": lambda array: array.reshape(-1, 1, array.shape[-1]),
}


def _shape_there(layout: str, shape: Shape) -> Shape:
    return _THERE[layout](np.broadcast_to(np.int8(0), shape)).shape


@dataclass(frozen=True)
class Piece:
    """One parameter of one period, and the rows of a tensor there that it is."""

    name: str  # the tensor there
    path: str  # the parameter here
    period: int | None  # None: the parameter is not stacked
    layout: str
    start: int  # the first row there
    shape: Shape  # there

    def there(self, array: np.ndarray) -> np.ndarray:
        """The rows there from the parameter here, [*shape here] of one period; rows that are too many are cut off."""
        return _THERE[self.layout](array)[: self.shape[0]]

    def here(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        """The parameter of one period, of that shape, from the rows there."""
        return (rows.T if self.layout in ("T1", "T2") else rows).reshape(shape)


@dataclass(frozen=True)
class Correspondence:
    """A table made out for one model: all tensors there, all pieces, in the order of the parameters here."""

    tensors: dict[str, Shape]
    pieces: tuple[Piece, ...]


def lay_out(lines: Table, shapes: dict, rows: Mapping[str, int] | None = None) -> Correspondence:
    """Makes a table out for the model whose parameter tree has these shapes.

    Args:
      lines: of the model, or of a mixer by itself.
      shapes: lcx's tree, with a shape in each leaf.
      rows: by path here, how many of a parameter's first rows there are kept; the rest is padding.

    Raises ValueError where a parameter has no line: the model cannot be written in these names.
    """
    wanted = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    tensors: dict[str, Shape] = {}
    pieces: dict[str, list[Piece]] = {path: [] for path in wanted}
    for name, layout, path in lines:
        if path not in wanted:
            continue
        stacked = "*" in name
        shape = _shape_there(layout, wanted[path][stacked:])
        shape = (min((rows or {}).get(path, shape[0]), shape[0]), *shape[1:])
        for period in range(wanted[path][0]) if stacked else [None]:
            there = _numbered(name, period or 0)
            start = tensors[there][0] if there in tensors else 0
            tensors[there] = (start + shape[0], *shape[1:])
            pieces[path].append(Piece(there, path, period, layout, start, shape))
    missing = [path for path, found in pieces.items() if not found]
    if missing:
        raise ValueError(f"no place for {', '.join(missing)}")
    return Correspondence(tensors, tuple(piece for found in pieces.values() for piece in found))


def to_lcx(arrays: Mapping[str, np.ndarray], lines: Table, shapes: dict) -> dict:
    """Parameters, or their gradients, in lcx's layout.

    Args:
      arrays: by the names there, all of them; a head that is tied to the embedding is left out.
      lines, shapes: see `lay_out`.

    Returns the tree, filled. Raises ValueError unless each name there has its place here and the other way round, in
    the shape that it should have.
    """
    mapping = lay_out(lines, shapes)
    check_names({name: array.shape for name, array in arrays.items()}, mapping.tensors)
    filled = dict(fill(mapping, lambda piece: arrays[piece.name][piece.start : piece.start + piece.shape[0]], shapes))
    return jax.tree_util.tree_map_with_path(lambda path, _: filled[path_name(path)], shapes)


def check_names(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Raises ValueError unless the tensors are those that are wanted, in their shapes."""
    extra, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    if extra or missing:
        raise ValueError(f"no place for {extra}; no values for {missing}")
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise ValueError(f"{name} has shape {list(found[name])}, not {list(shape)}")


def fill(
    mapping: Correspondence, read: Callable[[Piece], np.ndarray], shapes: dict
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters here, (path, array) one after the other, from the rows that `read` gives for each piece."""
    by_path: dict[str, list[Piece]] = {}
    for piece in mapping.pieces:
        by_path.setdefault(piece.path, []).append(piece)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        first, *rest = by_path[path_name(path)]
        if first.period is None:
            yield path_name(path), first.here(read(first), leaf.shape)
            continue
        whole = None
        for piece in (first, *rest):
            array = piece.here(read(piece), leaf.shape[1:])
            whole = np.empty(leaf.shape, array.dtype) if whole is None else whole
            whole[piece.period] = array
        yield path_name(path), whole


def _numbered(name: str, period: int) -> str:
    return re.sub(r"(\d*)\*\+?(\d*)", lambda found: str(int(found[1] or 1) * period + int(found[2] or 0)), name)
