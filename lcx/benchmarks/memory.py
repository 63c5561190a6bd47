"""The chunked memory beside its definition: digits, speed, and memory at length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.benchmarks.harness import Result, ratio, take_turns, temporaries
from lcx.mixers import MIXERS, Context, ModelDims
from lcx.models.remat import rematerialize
from lcx.params import create
from lcx_kernels.chunked_memory import chunked_memory

RATES = np.log([1e-4, 20.0])  # of decays a step
SEGMENT, SHORT, LONG = 2048, 8192, 32_768
HEADS, WIDTH = 8, 64  # of Infini's memory
REMAT = "time:4096"  # of Infini's layer: two segments at a time
TILE = 256  # tokens between the states that its backward pass keeps, on CPUs


def arguments(update: str, batch: int, time: int, heads: int, width: int) -> dict[str, np.ndarray]:
    """Of SSD ("linear", one head of keys and queries) or of the delta rule with decay, float64."""
    random = np.random.default_rng(0)
    shape = batch, time, heads
    found = {"v": random.normal(size=(*shape, width)), "log_decay": -np.exp(random.uniform(*RATES, shape))}
    keys = (batch, time, heads if update == "delta_rule" else 1, width)
    found |= {"q": random.normal(size=keys), "k": random.normal(size=keys)}
    if update == "delta_rule":
        found["k"] /= np.linalg.norm(found["k"], axis=-1, keepdims=True)
        found["beta"] = random.uniform(0.0, 2.0, shape)
    return found


def _pull(update: str, backend: str):
    """Outputs and gradients of everything."""

    @jax.jit
    def pull(given, d_out):
        call = lambda given: chunked_memory(**given, update=update, chunk_size=64, backend=backend)[0]  # noqa: E731
        out, transpose = jax.vjp(call, given)
        return {"out": out} | transpose(d_out)[0]

    return pull


def digits(update: str, dtype: str) -> float:
    """The largest of ||g - g0|| / ||g0|| over outputs and gradients; g0 is token by token in float64."""
    with jax.enable_x64(True):
        exact = arguments(update, batch=2, time=512, heads=4, width=32)
        given, d_out = jax.tree.map(lambda array: jnp.asarray(array, dtype), (exact, exact["v"]))
        rounded = jax.tree.map(lambda array: array.astype("float64"), (given, d_out))
        found, expected = _pull(update, "xla")(given, d_out), _pull(update, "reference")(*rounded)
        distance = lambda a, b: float(jnp.linalg.norm(a.astype(b.dtype) - b) / jnp.linalg.norm(b))  # noqa: E731
        return max(distance(found[name], expected[name]) for name in expected)


def _memory_temporaries(update: str, time: int) -> int:
    """Bytes of Infini's memory call, forward and backward, beside what it is given and returns."""

    def pull(q, k, v, positions, d_out):
        options = dict(chunk_size=SEGMENT, normalize=True, update=update, read="exclusive", positions=positions)
        return jax.vjp(lambda *qkv: chunked_memory(*qkv, **options)[0], q, k, v)[1](d_out)

    tokens = jax.ShapeDtypeStruct((1, time, HEADS, WIDTH), jnp.float32)
    return temporaries(pull, tokens, tokens, tokens, jax.ShapeDtypeStruct((1, time), jnp.int32), tokens)


def layer_temporaries(
    update: str, time: int, remat: str, heads: int = HEADS, width: int = WIDTH, segment: int = SEGMENT
) -> int:
    """Bytes of temporaries of Infini's whole layer, forward and backward, under a policy of `model.remat`."""
    dims, mixer = ModelDims(heads * width, sublayers=2), MIXERS["infini"]
    options = mixer.Options(num_heads=heads, segment_length=segment, update=update)
    graph, params = create(lambda: mixer(options, dims, nnx.Rngs(0)))
    layer = lambda params, x, state, context: nnx.merge(graph, params)(x, state, context)  # noqa: E731
    run = rematerialize(layer, remat, nnx.merge(graph, params).init_state)

    def pull(params, x, dy):
        positions = jnp.arange(time, dtype=jnp.int32)[None]
        context = Context(positions, jnp.ones_like(positions), jnp.zeros((1,), jnp.int32))
        return jax.vjp(lambda params, x: run(params, x, None, context)[0], params, x)[1](dy)

    x = jax.ShapeDtypeStruct((1, time, dims.d_model), jnp.float32)
    return temporaries(pull, params, x, x)


def memory_results(rounds: int) -> list[Result]:
    """The chunked memory."""
    results = []
    for name, update in (("SSD", "linear"), ("delta rule with decay", "delta_rule")):
        for dtype, limit in (("float64", 1e-9), ("float32", 1e-5)):
            error = digits(update, dtype)
            what = f"{name} by chunks, {dtype}, from token by token in float64: outputs and gradients"
            results.append(Result(what, error, "", f"below {limit}", error < limit))
    for name, update in (("SSD", "linear"), ("delta rule with decay", "delta_rule")):
        given = jax.tree.map(partial(jnp.asarray, dtype="float32"), arguments(update, 2, 1024, HEADS, WIDTH))
        calls = {backend: partial(_pull(update, backend), given, given["v"]) for backend in ("xla", "reference")}
        timings = take_turns(calls, max(3, rounds // 3))
        details = {f"{backend}_seconds": timing.median for backend, timing in timings.items()}
        what = f"{name}, B=2 T=1024 H={HEADS} K=V={WIDTH}, over token by token: throughput"
        results.append(Result(what, ratio(timings["reference"], timings["xla"]), "x", details=details))
    for update in ("linear", "segment_delta"):
        kept = [2 * HEADS * WIDTH * (WIDTH + 1) * 4 * (time // TILE) for time in (SHORT, LONG)]  # complete and open
        sizes = [_memory_temporaries(update, time) for time in (SHORT, LONG)]
        growth = (sizes[1] - kept[1]) / (sizes[0] - kept[0])
        what = f"Infini's memory, {update}, segment {SEGMENT}: temporaries but for states, T={LONG:,} over T={SHORT:,}"
        details = {"bytes": sizes, "states": kept}
        results.append(Result(what, growth, "x", "at most 1.5", growth <= 1.5, details))
        short, long = (layer_temporaries(update, time, REMAT) for time in (SHORT, LONG))
        kept = [layer_temporaries(update, time, "none") for time in (SHORT, LONG)]
        what = f"Infini's layer, {update}, segment {SEGMENT}, remat {REMAT}: temporaries, T={LONG:,} over T={SHORT:,}"
        details = {"bytes": [short, long], "without_remat": kept}
        results.append(Result(what, long / short, "x", "at most 1.5", long <= 1.5 * short, details))
    return results
