"""`lcx VERB ...`: finds the verb's main, runs it, and turns what a user can mend into one sentence and exit code 2."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from lcx import __version__
from lcx.cli.flags import Help
from lcx.errors import SaveFailed, UserError, suggest

# The verb: (the module whose `main(argv) -> exit code` it is, what it does).
VERBS = {
    "train": ("lcx.cli.train", "train a model, or go on with a run"),
    "evaluate": ("lcx.cli.evaluate", "ask a trained model what it does with long contexts, and compare runs"),
    "generate": ("lcx.cli.generate", "write text with a trained model"),
    "prepare_data": ("lcx.cli.prepare_data", "turn a corpus into shards of tokens"),
    "export": ("lcx.cli.export", "write a trained model for transformers, and prove that it is the model"),
    "import_hf": ("lcx.cli.import_hf", "start a run from pretrained weights"),
    "verify": ("lcx.cli.verify", "try a config on a mesh: same numbers as one device?"),
    "plan": ("lcx.cli.plan", "what a config takes of hardware that need not be here"),
    "sweep": ("lcx.cli.sweep", "run many trials, compare them fairly, and draw a report"),
    "coordinates": ("lcx.cli.coordinates", "check that activations keep their size over widths (muP)"),
    "benchmark": ("lcx.cli.benchmark", "time lcx beside its alternatives"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's) and returns the exit code."""
    return run(_dispatch, sys.argv[1:] if argv is None else argv)


def run(verb_main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """The exit code of `verb_main(argv)`.

    The error's own code with the message on stderr for a UserError (2, unless it says otherwise), 0 with the text on
    stdout for `--help`, 1 for an interrupt that the verb did not answer by saving. Any other exception goes through: a
    traceback, and exit code 1.
    """
    try:
        return verb_main(list(argv))
    except Help as text:
        print(text)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, SaveFailed):
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was saved", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-help", "-h", "help"):
        raise Help(_usage())
    verb, *rest = argv
    if verb == "--version":
        raise Help(f"lcx {__version__}")
    if verb not in VERBS:
        raise UserError(f'unknown verb "{verb}": {suggest(verb, VERBS)}')
    return importlib.import_module(VERBS[verb][0]).main(rest)


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: lcx VERB [flags]", "", *verbs, "", "lcx VERB --help tells a verb's flags."])
