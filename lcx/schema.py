"""Frozen dataclasses as schemas: one engine that coerces and validates plain values by a dataclass's annotations.

A field's annotation says what is allowed (`int`, `float | None`, `Literal["a", "b"]`, `tuple[float, float]`, another
dataclass, ...), and `limited(...)` adds a range. Every refusal is a `UserError` with the full dotted key, what was
given and what is allowed. Mixers use the same engine for their options: `build(Options, values, "model.mixers.swa")`.
"""

import dataclasses
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from lcx.errors import UserError, suggest

Record = TypeVar("Record")


def limited(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A dataclass field with a range. `limits`: minimum, maximum (both allowed), above, below (both excluded).

    The range holds for each element of a tuple, and `None` lies in every range.
    """
    unknown = limits.keys() - _LIMITS.keys()
    if unknown:
        raise TypeError(f"unknown limits: {', '.join(sorted(unknown))}")
    return dataclasses.field(default=default, metadata=limits)


def build(cls: type[Record], values: Any, key: str = "") -> Record:
    """An instance of the dataclass `cls` from a mapping (a dict, a ConfigDict) or from an instance of `cls`.

    `key` is the dotted name of the record and stands before each field's name in messages. Fields that are left out
    take their defaults. Raises `UserError` for an unknown key, a missing field without default, a wrong type or a
    value out of range.
    """
    if isinstance(values, cls):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(cls)}
    values = _items(values, key or "config")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f'unknown key "{join(key, name)}": {suggest(str(name), fields)}')
    annotations = typing.get_type_hints(cls)
    coerced = {}
    for name, field in fields.items():
        if name in values:
            coerced[name] = coerce(values[name], annotations[name], join(key, name))
            _check_limits(coerced[name], field.metadata, join(key, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f'"{join(key, name)}" is missing: it must be {_describe(annotations[name])}.')
    return cls(**coerced)


def coerce(value: Any, annotation: Any, key: str) -> Any:
    """`value` as the type that `annotation` names.

    "1e3" and 1000.0 are integers, "true" is a truth value, "none" is None where None is allowed, lists are tuples.
    Raises `UserError` that names `key`, the value and what is allowed.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return plain(value)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, annotation, key)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f'{key} cannot be "{value}": {suggest(str(value), map(str, arguments))}')
        return value
    if origin is tuple:
        return _coerce_tuple(value, annotation, key)
    if origin is not None and issubclass(origin, Mapping):
        return {str(name): coerce(item, arguments[1], join(key, name)) for name, item in _items(value, key).items()}
    if dataclasses.is_dataclass(annotation):
        return build(annotation, value, key)
    try:
        return _SCALARS[annotation](value)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{key} must be {_describe(annotation)}, not {value!r}.") from None


def plain(value: Any) -> Any:
    """`value` with every mapping as a dict, every tuple as a list and every path as text: what JSON can hold."""
    if hasattr(value, "items"):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def join(key: str, name: str) -> str:
    """The dotted key of `name` inside the record `key`; "" is the root."""
    return f"{key}.{name}" if key else str(name)


def _items(value: Any, key: str) -> dict:
    if not hasattr(value, "items"):
        raise UserError(f"{key} must be a mapping of names to values, not {value!r}.")
    return dict(value.items())


def _coerce_union(value: Any, annotation: Any, key: str) -> Any:
    alternatives = typing.get_args(annotation)
    if types.NoneType in alternatives and (value is None or str(value).lower() == "none"):
        return None
    alternatives = [alternative for alternative in alternatives if alternative is not types.NoneType]
    if len(alternatives) == 1 and alternatives[0] not in _SCALARS:
        return coerce(value, alternatives[0], key)  # the refusal from inside says more
    for alternative in alternatives:
        try:
            return coerce(value, alternative, key)
        except UserError:
            continue
    raise UserError(f"{key} must be {_describe(annotation)}, not {value!r}.")


def _coerce_tuple(value: Any, annotation: Any, key: str) -> tuple:
    elements = typing.get_args(annotation)
    repeated = len(elements) == 2 and elements[1] is Ellipsis
    if not isinstance(value, list | tuple) or not (repeated or len(value) == len(elements)):
        raise UserError(f"{key} must be {_describe(annotation)}, not {plain(value)!r}.")
    kinds = [elements[0]] * len(value) if repeated else elements
    return tuple(coerce(item, kind, f"{key}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, numbers.Real) and value == math.floor(value):
        return int(value)
    return operator.index(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _to_bool(value: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def _to_str(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ValueError
    return os.fspath(value)


_SCALARS: dict[type, Callable[[Any], Any]] = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str}
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
_LIMITS = {
    "minimum": (operator.ge, "at least"),
    "maximum": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each element {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} ({', '.join(map(_describe, arguments))})"
    return "a mapping of names to values"


def _check_limits(value: Any, limits: Mapping[str, float], key: str) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_limits(item, limits, f"{key}[{i}]")
    elif value is not None:
        for name, limit in limits.items():
            holds, words = _LIMITS[name]
            if not holds(value, limit):
                raise UserError(f"{key} must be {words} {limit}, not {value}.")
