"""`lcx train --inspect_data=N`: the batches that a run would see, as text, before anything is compiled."""

import itertools

import numpy as np
from rich.console import Console
from rich.text import Text

from lcx import data
from lcx.config import Config
from lcx.stages import stage_at

COLOURS = ("cyan", "yellow", "green", "magenta", "blue")
MOST = 1024  # tokens of a row that are shown


def inspect_data(config: Config, count: int, console: Console | None = None) -> None:
    """Prints the first `count` batches: documents in turning colours, what is no target dim, other weights in figures.

    Raises UserError for data that cannot be read.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    data.check_data(config)
    tokenizer = data.load_tokenizer(config.data.tokenizer, config.data.start_token)
    for data_index in range(count):
        batch = data.batch(config, data_index)
        stage = stage_at(config, data_index)
        mixed = data.load_mixture(config, stage.number)
        dataset, numbers = mixed.assign(data_index - stage.first_index, np.arange(len(batch["tokens"])))
        rows, length = batch["tokens"].shape
        console.rule(f"batch {data_index}: {rows} rows of {length} tokens, stage {stage.number}")
        for row in range(rows):
            name = mixed.datasets[dataset[row]].name
            segments, weights = batch["segment_ids"][row], batch["loss_weights"][row]
            padding = int(np.sum(segments == 0))
            console.print(
                f"[bold]row {batch['row_index'][row]}[/bold]: {name}, its row {numbers[row]}; "
                f"{len(set(segments.tolist()) - {0})} documents, {int(np.sum(weights > 0))} targets, {padding} padding"
            )
            console.print(
                row_text({name: array[row, :MOST] for name, array in batch.items() if array.ndim == 2}, tokenizer)
            )
            if length > MOST:
                console.print(f"[dim]... {length - MOST} more tokens[/dim]")


def row_text(row: dict[str, np.ndarray], tokenizer: data.Tokenizer) -> Text:
    """A row as coloured text: a mark before each document, and (weight) before text of a loss weight other than 0 or 1.

    A token's weight is that of the target it is, which belongs to the place before it; the row's first token is none.
    """
    weights = np.concatenate([[0.0], row["loss_weights"][:-1]]).round(4).tolist()
    runs = itertools.groupby(
        zip(row["tokens"].tolist(), row["segment_ids"].tolist(), weights, row["positions"].tolist(), strict=True),
        key=lambda token: (token[1], token[2]),
    )
    text, shown = Text(), None
    for (segment, weight), run in runs:
        run = list(run)
        if segment == 0:
            text.append(f"[padding: {len(run)}]", "dim")
            continue
        if segment != shown:
            goes_on = "" if run[0][3] == 0 else f" from {run[0][3]}"
            text.append(f"[{segment}{goes_on}]", "bold reverse")
            shown = segment
        if weight not in (0, 1):
            text.append(f"({weight:g})", "bold")
        words = tokenizer.decode([token for token, *_ in run]).decode(errors="replace")
        visible = "".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in words)
        text.append(visible, f"{'dim ' if weight == 0 else ''}{COLOURS[segment % len(COLOURS)]}")
    return text
