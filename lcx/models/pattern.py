"""A model's pattern: the text that says which mixers follow each other.

    "mamba mlp swa mlp"              four residual layers, one mixer each
    "parallel(mamba, swa) mlp"       the first layer sums two mixers of one normed input

The pattern is one period; the model repeats it.
"""

import re
from collections.abc import Iterable

from lcx.errors import UserError, suggest

_TOKEN = re.compile(r"\s*(?:parallel\(([^()]*)\)|([A-Za-z_]\w*)(?=\s|$))")

Pattern = tuple[tuple[str, ...], ...]  # the mixers of each layer


def parse_pattern(text: str, mixers: Iterable[str]) -> Pattern:
    """The layers of a pattern, each a tuple of the mixer names that it sums.

    Args:
      text: the pattern.
      mixers: the names that model.mixers defines.

    Raises UserError for an empty pattern, a piece that cannot be read, or an unknown mixer.
    """
    text, known, layers, place = text.strip(), tuple(mixers), [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise UserError(
                f'model.pattern: cannot read "{text[place:].strip()}"; '
                "write mixer names separated by spaces, or parallel(a, b)."
            )
        summed, single = match.groups()
        names = (single,) if single else tuple(name.strip() for name in summed.split(","))
        if len(set(names)) < len(names):
            raise UserError(
                f"model.pattern: parallel({summed}) names a mixer twice; give the second a name of its own."
            )
        for name in names:
            if name not in known:
                raise UserError(f'model.pattern: unknown mixer "{name}" ({suggest(name, known)[:-1]}).')
        layers.append(names)
        place = match.end()
    if not layers:
        raise UserError("model.pattern: the pattern is empty; name at least one mixer.")
    return tuple(layers)


def layer_names(pattern: Pattern) -> tuple[str, ...]:
    """A name for each layer of a period, unique and readable in parameter paths: "0_mamba", "1_mlp"."""
    return tuple(f"{index}_{'_'.join(names)}" for index, names in enumerate(pattern))
