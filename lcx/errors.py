"""The one error that speaks to the user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: its message is one clear sentence, and the process exits with code 2."""

    exit_code = 2


class SaveFailed(UserError):
    """A checkpoint could not be written. Threads that wait for the rest of it would keep the process from ending."""


class RunFailed(UserError):
    """A run that does not get better by being started again: its message says what was tried."""

    exit_code = 1


class Unresponsive(UserError):
    """A process of the run, or a step of this one, does not answer: the same command goes on from the last save."""

    exit_code = 75


def suggest(name: str, choices: Iterable[str]) -> str:
    """The tail of a sentence about an unknown `name`: the nearest of `choices`, if one is near, and all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    guess = f'did you mean "{near[0]}"? ' if near else ""
    return f"{guess}Allowed: {', '.join(choices) or 'nothing'}."
