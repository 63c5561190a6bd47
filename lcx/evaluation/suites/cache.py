"""Cache policies over trained attention: quality against the bytes that are kept."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lcx.evaluation.policies import POLICIES, apply_policy, kept_bytes, read_bytes
from lcx.evaluation.streaming import row_losses
from lcx.evaluation.suite import Curves, Finding, Material
from lcx.evaluation.suites import passkey
from lcx.evaluation.suites.perplexity import bits_of
from lcx.models import LanguageModel
from lcx.schema import limited


@dataclass(frozen=True)
class Options:
    """What is compared."""

    policies: tuple[str, ...] = tuple(POLICIES)  # names, or with options: "quest:dense_layers=0"
    budgets: tuple[int, ...] | None = None  # tokens; None: 1/16, 1/8, 1/4 and 1/2 of the length
    length: int | None = limited(None, minimum=16)  # tokens read; None: of training
    rows: int = limited(4, minimum=1)  # of text
    files: str = ""  # a file or folder of text; "": what the run holds out
    keys: int = limited(0, minimum=0)  # passkeys asked for with each policy; 0: none
    style: str = "landmark"  # of the passkeys' text


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields bits per token, bytes kept and bytes read of each policy and budget, and of full attention."""
    length = options.length or material.train_length
    budgets = options.budgets or tuple(max(2, length // share) for share in (16, 8, 4, 2))
    text = material.stretch(options.files, options.rows * length + 1)
    rows = np.stack([text[i * length : (i + 1) * length + 1] for i in range(options.rows)])
    questions = _questions(options, length, material)

    def measure(chosen: LanguageModel) -> tuple[float, float | None]:
        bits = bits_of(row_losses(chosen, rows, material.chunk_size))
        right = passkey.answer(chosen, questions, material) if questions else []
        return bits, float(np.mean(right)) if right else None

    everything, found = kept_bytes(model, length), {}
    found["full", length] = (*measure(model), everything, everything)
    for policy in options.policies:
        for budget in budgets:
            text = f"{policy}{',' if ':' in policy else ':'}budget={budget}"
            chosen = apply_policy(model, text)
            found[policy, budget] = (*measure(chosen), kept_bytes(chosen, length), read_bytes(chosen, length))
    for (policy, budget), values in found.items():
        for name, value in zip(("bits", "accuracy", "kept_bytes", "read_bytes"), values, strict=True):
            if value is not None:
                yield f"{policy}_{budget}_{name}", value
    read = sorted({values[3] for values in found.values()})
    for number, name in enumerate(("bits per token", "passkey accuracy")):
        lines = {
            policy: [_at(found, policy, place, number) for place in read]
            for policy in dict.fromkeys(policy for policy, _ in found)
        }
        if any(value is not None for line in lines.values() for value in line):
            yield f"{name} by bytes read", Curves(read, lines, "bytes that a token reads", name, log_x=True)


def _questions(options: Options, length: int, material: Material) -> list:
    asked = {"length": length, "style": options.style}
    return material.examples("passkey", asked, options.keys) if options.keys else []


def _at(found: dict, policy: str, place: int, number: int) -> float | None:
    """A policy's number `number` where it reads `place` bytes."""
    values = [values[number] for (name, _), values in found.items() if name == policy and values[3] == place]
    return values[0] if values else None
