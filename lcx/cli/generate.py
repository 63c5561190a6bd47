"""`lcx generate`: streams what a trained model writes after a prompt, or after each line of a file."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lcx.cli.flags import WORKDIR, Flag, parse
from lcx.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from lcx.data import Tokenizer

SUMMARY = "Continues a prompt with a trained model and prints the text as it comes; or many prompts at once."
PROMPT = "import "  # what is continued where nothing is asked for
FLAGS = [
    WORKDIR,
    Flag("prompt", f'the text to continue; - reads standard input (default: "{PROMPT}")'),
    Flag("prompts_file", "a text file, a prompt a line: all are continued in one batch, then printed one by one"),
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
    Flag(
        "chunk_size",
        "tokens of a prompt that are read at once, which bounds memory, not the text; 0: the whole prompt",
        kind=int,
        default=1024,
        limits={"lower_bound": 0},
    ),
]


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("generate", SUMMARY, FLAGS, argv)
    texts = read_prompts(values)
    from lcx.cli.load import load  # takes seconds: JAX, flax, orbax
    from lcx.models.generate import generate

    model, tokenizer = load(values.workdir)
    prompts = [tokenizer.encode(text) for text in texts]
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            what = "--prompt" if values.prompts_file is None else f"{values.prompts_file}, line {number},"
            raise UserError(f"{what} is empty: give at least one character to go on from.")
    tokens = generate(
        model,
        prompts,
        values.max_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
        chunk_size=values.chunk_size or None,
    )
    if values.prompts_file is None:
        print_stream(texts[0], tokens, tokenizer)
    else:
        print_all(texts, tokens, tokenizer)
    return 0


def read_prompts(values: SimpleNamespace) -> list[bytes]:
    """The prompts that the flags give. Raises UserError for two sources, and for a file without a prompt a line."""
    if values.prompts_file is None:
        if values.prompt == "-":
            return [sys.stdin.buffer.read()]
        return [(PROMPT if values.prompt is None else values.prompt).encode(errors="surrogateescape")]
    if values.prompt is not None:
        raise UserError("--prompt and --prompts_file exclude each other: give one of them.")
    try:
        content = Path(values.prompts_file).read_bytes()
    except OSError as error:
        raise UserError(f"--prompts_file: cannot read {values.prompts_file}: {error.strerror}.") from None
    lines = [line.removesuffix(b"\r") for line in content.removesuffix(b"\n").split(b"\n")]
    if lines == [b""]:
        raise UserError(f"--prompts_file: {values.prompts_file} is empty: write a prompt in each line.")
    if b"" in lines:
        number = lines.index(b"") + 1
        raise UserError(f"--prompts_file: line {number} of {values.prompts_file} is empty: each line is a prompt.")
    return lines


def print_stream(text: bytes, tokens: Iterator["np.ndarray"], tokenizer: "Tokenizer") -> None:
    """The prompt, and what follows it as it comes."""
    print(text.decode(errors="replace"), end="", flush=True)
    for piece in tokenizer.decode_stream(int(token[0]) for token in tokens):
        print(piece, end="", flush=True)
    print()


def print_all(texts: Sequence[bytes], tokens: Iterator["np.ndarray"], tokenizer: "Tokenizer") -> None:
    """Each prompt with what follows it, under a line that numbers it."""
    rows = zip(*(token.tolist() for token in tokens), strict=True)
    for number, (text, row) in enumerate(zip(texts, rows, strict=True), start=1):
        print(f"=== {number} of {len(texts)} ===")
        print(text.decode(errors="replace") + "".join(tokenizer.decode_stream(row)), flush=True)
