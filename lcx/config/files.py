"""Configs at the edge, as `ConfigDict`s: the files that make them, their options, and overrides of a command line."""

import ast
import importlib.util
import json
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lcx.config.sections import Config
from lcx.errors import UserError, suggest
from lcx.schema import coerce, join, plain

# Records that take names which are not there yet, on a command line too.
OPEN_RECORDS = (
    "model.mixers.",
    "model.remat",
    "data.sources[",
    "mesh.parameter_rules",
    "mesh.activation_rules",
    "evaluation.options",
)
RETURNS = {"get_config": "ConfigDict", "get_sweep": "dict"}  # the functions of config files, and what they return


def default_config() -> ConfigDict:
    """All fields with their defaults, to be changed by a config file."""
    return _config_dict(Config().to_dict())


def choose(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """`table[name]`; a UserError names the `kind` of thing, the nearest match and what there is."""
    if name not in table:
        raise UserError(f'unknown {kind} "{name}": {suggest(name, table)}')
    return table[name]


def parse_options(arg: str, **defaults: Any) -> dict[str, Any]:
    """The options of a config file: "size=421m,sequence_length=32768" over `defaults`, with their types.

    A default that is a type (`sequence_length=int`) means None when the option is left out; a default of None takes
    text. Raises UserError for an unknown option and for a value of another type.
    """
    options = {name: None if isinstance(default, type) else default for name, default in defaults.items()}
    for part in filter(None, arg.split(",")):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UserError(f'"{part}" is not an option of a config file: write name=value. {suggest(name, defaults)}')
        default = choose("option of the config file", name, defaults)
        kind = default if isinstance(default, type) else str if default is None else type(default)
        options[name] = coerce(text, kind, f'option "{name}"')
    return options


def load_config(argument: str | os.PathLike) -> ConfigDict:
    """The config of a file: "configs/samba.py:size=421m" runs its `get_config("size=421m")` over `default_config()`.

    The config.json of a workdir is the config of its run.

    Whatever goes wrong in the file is a UserError that names the file, the line and the mistake.
    """
    path = os.fspath(argument).partition(":")[0]
    if path.endswith(".json") and os.path.isfile(path):
        return _config_of_run(path)
    config = default_config()
    config.update(_config_dict(call_config_file(argument, "get_config")))
    return config


def call_config_file(argument: str | os.PathLike, function: str) -> Mapping[str, Any]:
    """What `function(options)` of a config file returns; `argument` is "FILE.py:OPTIONS" or "FILE.py".

    Whatever goes wrong in the file is a UserError that names the file, the line and the mistake.
    """
    path, _, arg = os.fspath(argument).partition(":")
    if not os.path.isfile(path):
        raise UserError(f'config file "{path}" is not there (from {os.getcwd()}).')
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", f"lcx_config_{path}"), path)
    if spec is None:
        raise UserError(f'config file "{path}" must be a Python file (.py).')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f'config file "{path}" has no function {function}(arg="").')
        values = getattr(module, function)(arg) if arg else getattr(module, function)()
    except UserError:
        raise
    except Exception as error:
        line = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {line[-1]}" if line else path
        raise UserError(f"config file {where}: {type(error).__name__}: {error}") from error
    if not hasattr(values, "items"):
        raise UserError(f'{function} of "{path}" must return a {RETURNS[function]}, not {type(values).__name__}.')
    return values


def _config_of_run(path: str) -> ConfigDict:
    try:
        with open(path, "rb") as file:
            values = json.load(file)["config"]
        return _config_dict(Config.from_dict(values).to_dict())
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f'config file "{path}" is not the config.json of a workdir.') from None


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets a field as `assign` does, from text.

    The text is read as a Python literal, or kept where it is none, or where the field holds text.
    """
    node, last, current = _find(config, key)
    value = _literal(text)
    node[last] = text if isinstance(current, str) and not isinstance(value, str) else value


def assign(config: ConfigDict, key: str, value: Any) -> None:
    """Sets the field `key` ("model.mixers.swa.window", "data.sources[0].path") of `config` in place.

    Options of a mixer, remat policies, rules of a mesh and fields of a source need not exist yet, and
    `model.mixers.NAME.type` makes a new mixer; any other unknown key is a UserError.
    """
    node, last, _ = _find(config, key)
    node[last] = plain(value)


def _find(config: ConfigDict, key: str) -> tuple[Any, str | int, Any]:
    """Where a field lies: (the record or list that holds it, its place in there, what it is now)."""
    if not re.fullmatch(r"[^.\[\]]+(\[\d+\])*(\.[^.\[\]]+(\[\d+\])*)*", key):
        raise UserError(f'"{key}" is not a key of the config: write it like model.d_model or data.sources[0].path.')
    *parents, last = (int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", key))
    node, path = config, ""
    for step in parents:
        if path == "model.mixers" and last == "type" and hasattr(node, "items") and step not in node:
            node[step] = {}
        if path.startswith(("data.sources[", "evaluation.options")) and hasattr(node, "items") and step not in node:
            node[step] = {}  # a source's options, or a suite's, which a file may leave out
        node, path = _child(node, step, path), _extend(path, step)
    open_record = path.startswith(OPEN_RECORDS)
    is_new = open_record and hasattr(node, "items") and last not in node
    return node, last, None if is_new else _child(node, last, path)


def _child(node: Any, step: str | int, path: str) -> Any:
    key = _extend(path, step)
    if isinstance(step, int):
        if not isinstance(node, list):
            raise UserError(f'"{key}" is not a key of the config: {path} is not a list.')
        if step >= len(node):
            raise UserError(f"{key} is out of range: {path} has {len(node)} element(s), counted from 0.")
    elif not hasattr(node, "items"):
        raise UserError(f'unknown key "{key}": {path} has no fields of its own.')
    elif step not in node:
        raise UserError(f'unknown key "{key}": {suggest(step, node.keys())}')
    return node[step]


def _extend(path: str, step: str | int) -> str:
    return f"{path}[{step}]" if isinstance(step, int) else join(path, step)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _config_dict(values: Any) -> ConfigDict:
    """A ConfigDict that takes a value of any type: what is allowed is decided in one place, `Config.from_dict`."""
    return ConfigDict(plain(values), type_safe=False)
