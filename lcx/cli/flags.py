"""Command lines: absl's flags in a private table, and `--config.section.field=value` collected in order.

A verb declares its flags and parses with them; every mistake is a `UserError` with one sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from lcx.config import Config, load_config, override
from lcx.errors import UserError, suggest

_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
    list: flags.DEFINE_multi_string,
}


@dataclass(frozen=True)
class Flag:
    """One flag of a verb, `--name=VALUE`; a truth value is also `--name` and `--noname`."""

    name: str
    help: str
    kind: type = str  # str, int, float or bool; list: text, given as often as wanted
    default: Any = None
    required: bool = False
    limits: dict[str, float] = field(default_factory=dict)  # lower_bound and upper_bound, both allowed; numbers only


CONFIG = Flag("config", "a Python file with get_config, and its options: configs/samba.py:size=tiny", required=True)
WORKDIR = Flag("workdir", "the folder of the run: config, metrics, checkpoints", required=True)


class Help(Exception):
    """`--help` was asked for: the message is the text to print, and the process exits with code 0."""


def parse(verb: str, summary: str, declared: Sequence[Flag], argv: Sequence[str]) -> SimpleNamespace:
    """The values of `lcx VERB ARGV...`, an attribute a flag.

    Args:
      verb: the verb's name, for messages.
      summary: what the verb does, the first lines of `--help`.
      declared: its flags. With one called `config` among them, `--config.KEY=VALUE` is taken too.
      argv: the words after the verb.

    Returns the values by name; `overrides`, a list of (key, text), where `config` is declared.
    Raises Help for `--help`, and UserError for an unknown flag (with the nearest match), a value of another type, a
    required flag that is not given or a word that is no flag.
    """
    if any(word in ("--help", "-help", "-h") for word in argv):
        raise Help(usage(verb, summary, declared))
    takes_config = _takes_config(declared)
    overrides, words = _split_overrides(argv) if takes_config else ([], list(argv))
    table = flags.FlagValues()
    for flag in declared:
        _DEFINE[flag.kind](flag.name, flag.default, flag.help, flag_values=table, **flag.limits)
    try:
        _, *rest = table([verb, *words])
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(verb, error.flagname, declared)) from error
    except (flags.Error, ValueError) as error:
        raise UserError(f"lcx {verb}: {_one_line(error)}") from error
    if rest:
        raise UserError(f'lcx {verb}: "{rest[0]}" is not a flag; flags are written --name=value.')
    values = {flag.name: table[flag.name].value for flag in declared}
    for flag in declared:
        if flag.required and values[flag.name] in (None, ""):
            raise UserError(f"lcx {verb} needs --{flag.name}: {flag.help}.")
    return SimpleNamespace(**values, **({"overrides": overrides} if takes_config else {}))


def read_config(values: SimpleNamespace) -> ConfigDict:
    """The config that `--config` names, changed by the overrides in the order of the command line; raises UserError."""
    config = load_config(values.config)
    for key, text in values.overrides:
        override(config, key, text)
    return config


def usage(verb: str, summary: str, declared: Sequence[Flag]) -> str:
    """What `lcx VERB --help` prints."""
    required = " ".join(f"--{flag.name}=..." for flag in declared if flag.required)
    rows = [(f"--{flag.name}", flag.help + _default(flag)) for flag in declared]
    if _takes_config(declared):
        place = 1 + [name for name, _ in rows].index("--config")
        rows.insert(place, ("--config.KEY", "any field of the config: --config.train.steps=500"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join([f"usage: lcx {verb} {required} [flags]", "", summary.strip(), "", *lines])


def _takes_config(declared: Sequence[Flag]) -> bool:
    return any(flag.name == CONFIG.name for flag in declared)


def _default(flag: Flag) -> str:
    return "" if flag.default is None else f" (default: {flag.default})"


def _split_overrides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The (key, text) pairs of `--config.key=text` and `--config.key text`, and the words that are left."""
    overrides, words, waiting = [], [], list(argv)
    while waiting:
        word = waiting.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        if not (word.startswith("-") and name.startswith("config.")):
            words.append(word)
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE.")
            text = waiting.pop(0)
        overrides.append((name.removeprefix("config."), text))
    return overrides, words


def _unknown(verb: str, name: str, declared: Sequence[Flag]) -> str:
    if _takes_config(declared) and name.split(".")[0] in Config.__dataclass_fields__:
        return f"lcx {verb}: unknown flag --{name}; a field of the config is written --config.{name}=value."
    return f"lcx {verb}: unknown flag --{name}: {suggest(name, [flag.name for flag in declared])}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."
