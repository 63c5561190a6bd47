"""`lcx generate`: streams what a trained model writes after a prompt."""

import sys
from collections.abc import Sequence

from lcx.cli.flags import WORKDIR, Flag, parse
from lcx.errors import UserError

SUMMARY = "Continues a prompt with a trained model and prints the text as it comes."
FLAGS = [
    WORKDIR,
    Flag("prompt", "the text to continue; - reads standard input", default="import "),
    Flag("max_tokens", "how many tokens to generate", kind=int, default=256, limits={"lower_bound": 1}),
    Flag("temperature", "0 takes the likeliest token each time", kind=float, default=0.8, limits={"lower_bound": 0.0}),
    Flag("top_k", "sample among the k likeliest tokens; 0: all", kind=int, default=0, limits={"lower_bound": 0}),
    Flag(
        "top_p",
        "sample among the fewest tokens whose probabilities reach this sum",
        kind=float,
        default=1.0,
        limits={"lower_bound": 0.0, "upper_bound": 1.0},
    ),
    Flag("seed", "the same seed writes the same text", kind=int, default=0, limits={"lower_bound": 0}),
]


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("generate", SUMMARY, FLAGS, argv)
    from lcx.cli.load import load  # takes seconds: JAX, flax, orbax
    from lcx.models.generate import generate

    model, tokenizer = load(values.workdir)
    text = sys.stdin.read() if values.prompt == "-" else values.prompt
    prompt = tokenizer.encode(text)
    if not len(prompt):
        raise UserError("--prompt is empty: give at least one character to go on from.")
    tokens = generate(
        model,
        prompt[None],
        values.max_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
    )
    print(text, end="", flush=True)
    for piece in tokenizer.decode_stream(int(token[0]) for token in tokens):
        print(piece, end="", flush=True)
    print()
    return 0
