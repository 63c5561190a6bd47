"""Laws that a mixer declares to break by nature (`Mixer.lawful_except`)."""

from collections.abc import Iterable

from lcx.errors import UserError, suggest
from lcx.mixers import Mixer

LAWS = ("causality", "continuation", "isolation", "sharding", "backend")


def declared_exceptions(mixers: Iterable[type[Mixer]]) -> dict[str, str]:
    """The laws that some of the mixers break, each with the name of the first that does.

    Raises UserError for a name that is no law's.
    """
    found = {}
    for mixer in mixers:
        for law in mixer.lawful_except:
            if law not in LAWS:
                raise UserError(f'{mixer.__name__}.lawful_except: unknown law "{law}": {suggest(law, LAWS)}')
            found.setdefault(law, mixer.__name__)
    return found
