"""`lcx coordinates`: does a model's parametrisation keep the size of activations over widths?

The coordinate check of muP (Yang et al. 2022, arXiv 2203.03466, appendix D.1): models of several widths make the same
few steps; the scale of each kind of activation over the width, in logarithms, has a slope near 0 where learning rates
carry over from one width to another.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from etils import epath

from lcx.cli.flags import CONFIG, Flag, parse, read_config
from lcx.config import Config
from lcx.errors import UserError
from lcx.files import write_bytes, write_json

if TYPE_CHECKING:
    import jax

    from lcx.models import LanguageModel

SUMMARY = """\
The coordinate check of muP: trains the config for a few steps at several widths, and writes the scale of its
activations over the width, coordinates.json and coordinates.png. Exit code 0: no slope is farther from 0 than 0.1."""
FLAGS = [
    CONFIG,
    Flag("workdir", "the folder for coordinates.json and coordinates.png", required=True),
    Flag("widths", "values of model.d_model", default="64,128,256,512,1024"),
    Flag("steps", "steps after each of which activations are measured", int, 4, limits={"lower_bound": 1}),
    Flag("seeds", "models of each width, whose scales are averaged", int, 1, limits={"lower_bound": 1}),
]
FLAT = 0.1  # the largest slope of what is called flat


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("coordinates", SUMMARY, FLAGS, argv)
    config = Config.from_dict(read_config(values))
    widths = parse_widths(values.widths)
    folder = epath.Path(values.workdir)
    scales: dict[str, dict[int, list[float]]] = {}
    for width in widths:
        for step, found in measure(config, width, values.steps, values.seeds):
            for name, scale in found.items():
                scales.setdefault(name, {}).setdefault(width, []).append(scale)
            print(f"width {width}, step {step}: " + ", ".join(f"{n} {s:.3g}" for n, s in found.items()), flush=True)
    slopes = {name: slope(by_width) for name, by_width in scales.items()}
    result = {
        "mup_base_width": config.model.mup_base_width,
        "widths": widths,
        "steps": values.steps,
        "scales": {name: [by_width[width] for width in widths] for name, by_width in scales.items()},
        "slopes": slopes,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "coordinates.json", result)
        write_bytes(folder / "coordinates.png", picture(result))
    except OSError as error:
        raise UserError(f"the workdir {values.workdir} cannot be written: {error.strerror}.") from None
    for name, found in slopes.items():
        print(f"{name:>24}: slope {found:+.3f}")
    flat = all(abs(found) <= FLAT for found in slopes.values())
    print(f"{'flat' if flat else 'NOT flat'} over widths {values.widths}; picture: {folder / 'coordinates.png'}")
    return 0 if flat else 1


def parse_widths(text: str) -> list[int]:
    """Whole numbers with commas between them. Raises UserError for anything else, or fewer than two."""
    words = text.split(",")
    if len(set(words)) < 2 or not all(word.strip().isdigit() and int(word) for word in words):
        raise UserError(f'--widths: cannot read "{text}": write two widths or more, like 64,128,256.')
    return sorted({int(word) for word in words})


def measure(config: Config, width: int, steps: int, seeds: int = 1) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, the scale of each kind of activation) of the config at a width, after each of the first steps.

    Every step sees the same batch, at the peak learning rate. A scale is the mean absolute value over the batch, all
    layers of a kind and the seeds; of the logits, of what the steps have changed in them: at the start they are near 0
    by design, the nearer the wider.
    """
    import jax
    import jax.numpy as jnp

    from lcx import data
    from lcx.sweeps.solve import at_width
    from lcx.training.trainer import lower_step, make_program

    config = Config.from_dict(at_width(config.to_dict(), width))
    optimizer = replace(config.optimizer, schedule="constant", warmup_steps=0)
    config = replace(config, optimizer=optimizer, train=replace(config.train, steps=steps))
    batch, totals = data.batch(config, 0), [{} for _ in range(steps)]
    for seed in range(config.train.seed, config.train.seed + seeds):
        program = make_program(replace(config, train=replace(config.train, seed=seed)))
        placed, state = program.put(batch), program.create()
        train_step = lower_step(program).compile()

        @jax.jit
        def activate(params: dict, program=program, placed=placed) -> dict[str, jax.Array]:
            return activations(program.blueprint.model(params), placed)

        with program.on_mesh():
            before = activate(state.params)["logits"]
            for step in range(steps):
                state, _ = train_step(state, placed)
                found = activate(state.params)
                found["logits"] = found["logits"] - before
                for name, value in found.items():
                    scale = float(jnp.mean(jnp.abs(value))) / seeds
                    totals[step][name] = totals[step].get(name, 0.0) + scale
    yield from enumerate(totals, start=1)


def activations(model: "LanguageModel", batch: Mapping[str, "jax.Array"]) -> dict[str, "jax.Array"]:
    """What the mixers of each name write into the stream, [layers, batch, time, d_model], and the logits.

    The stack's own forward keeps none of it; this one goes through the layers one by one.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lcx.models.language_model import make_context
    from lcx.params import split

    tokens = batch["tokens"]
    context = make_context(tokens.shape, None, batch["positions"], batch["segment_ids"])
    x = model.embedding(tokens, model.residual_dtype)
    graphdef, params = split(model.stack.layers)
    found: dict[str, list[jax.Array]] = {}
    for period in range(model.stack.periods):
        layers = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[period], params))  # noqa: B023
        for layer in layers.values():
            branches = {name: layer.branch(name, x, None, context, model.compute_dtype)[0] for name in layer.mixers}
            for name, y in branches.items():
                found.setdefault(name, []).append(y)
            x = x + sum(y.astype(x.dtype) for y in branches.values())
    kinds = {name: jnp.stack(values) for name, values in found.items()}
    return kinds | {"logits": model.logits(model.norm(x).astype(model.compute_dtype))}


def slope(by_width: Mapping[int, Sequence[float]]) -> float:
    """The slope of ln(scale) over ln(width), by least squares; a width's scale is the mean of those after each step."""
    import numpy as np

    scales = [np.mean(scales) for scales in by_width.values()]
    return float(np.polyfit(np.log(list(by_width)), np.log(scales), 1)[0])


def picture(result: Mapping[str, Any]) -> bytes:
    """A PNG: a panel for each kind of activation, a line for each step."""
    from matplotlib.figure import Figure

    names = list(result["scales"])
    figure = Figure(figsize=(4.0 * len(names), 3.8), dpi=100, layout="constrained")
    base = result["mup_base_width"]
    figure.suptitle(f"muP, base width {base}" if base else "standard parametrisation")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for step, scales in enumerate(zip(*result["scales"][name], strict=True), start=1):
            shade = 0.3 + 0.7 * step / result["steps"]
            axes.loglog(result["widths"], scales, marker="o", color="tab:blue", alpha=shade, label=f"step {step}")
        axes.set(xlabel="d_model", title=f"{name}: slope {result['slopes'][name]:+.2f}")
        axes.set_xticks(result["widths"], map(str, result["widths"]), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean absolute value")
    figure.axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
