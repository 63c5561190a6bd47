"""`triton` and `cudnn` attention on a GPU, and their refusals.

tests/parity has the arithmetic of `triton` on any machine, tests/aot has it compiled.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.attention import api, attention, cudnn, triton_plan
from lcx_kernels.attention.arguments import Arguments, Static
from lcx_kernels.attention.triton_plan import Tile
from lcx_kernels.backends import BackendUnavailable, compiling_for
from tests.kernels import test_attention as base
from tests.kernels.test_attention import AttentionTests


def need_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")


def documents(batch, length, count):
    return np.sort(np.random.default_rng(5).integers(0, count, (batch, length)), axis=1).astype(np.int32)


TOKENS, KEYS = 389, 517
PLACES = np.arange(KEYS, dtype=np.int32)[None] + np.array([[0], [40]], np.int32)
# (time, keys), options: ragged, and of several blocks.
LARGE = {
    "causal": ((TOKENS, TOKENS), {}),
    "window": ((TOKENS, TOKENS), {"window": 100}),
    "documents": ((TOKENS, TOKENS), {"segment_ids": documents(2, TOKENS, 5)}),
    "documents in a window": ((TOKENS, TOKENS), {"segment_ids": documents(2, TOKENS, 3), "window": 150}),
    "halo": ((TOKENS, KEYS), {"offset": KEYS - TOKENS, "window": KEYS - TOKENS + 1}),
    "positions": (
        (TOKENS, KEYS),
        {
            "positions": (PLACES[:, KEYS - TOKENS :], PLACES[:, ::-1].copy()),
            "segment_ids": (np.ones((2, TOKENS), np.int32), (PLACES > 60).astype(np.int32)),
            "window": 200,
        },
    ),
    "softcap": ((TOKENS, TOKENS), {"softcap": 5.0, "causal": False}),
}


def compare_large(case, backend, dtype, widths, tolerance, sinks=True):
    """A case of LARGE with the backend's own block sizes against the dense float64 reference."""
    (time, keys), options = LARGE[case]
    sees = base.pairs_seen(2, time, keys, options)
    softcap = options.get("softcap")
    *arrays, d_out, d_log_sum_exp = base.draw(1, 2, time, keys, 4, 2, *widths, dtype=dtype)
    dynamic = {"positions", "segment_ids"} & options.keys()
    options = options | {name: jax.tree.map(jnp.asarray, options[name]) for name in dynamic}

    def run(q, k, v, sinks_):
        return attention(q, k, v, sinks=sinks_ if sinks else None, backend=backend, **options)

    def exact(q, k, v, sinks_):
        return base.dense(q, k, v, sinks_ if sinks else None, sees, softcap=softcap)

    actual = base.results_and_gradients(run, arrays, (d_out, d_log_sum_exp))
    with jax.enable_x64(True):
        wide = [array.astype(jnp.float64) for array in (*arrays, d_out, d_log_sum_exp)]
        base.assert_close(actual, base.results_and_gradients(exact, wide[:4], wide[4:]), tolerance)


@pytest.mark.gpu
class TestTriton(AttentionTests):
    """In float32, products are exact; GPUs approximate exp2 to two units in the last place."""

    backend = "triton"
    exact = jnp.float32, 1e-5
    narrow = {"float32": 1e-5, "bfloat16": 1e-2}

    @pytest.fixture(autouse=True)
    def _environment(self):
        need_gpu()

    @pytest.mark.parametrize("widths", [(64, 64), (128, 128), (96, 40)])
    @pytest.mark.parametrize("case", LARGE)
    def test_large_in_bfloat16(self, case, widths):
        compare_large(case, "triton", jnp.bfloat16, widths, 1e-2)

    @pytest.mark.parametrize("widths", [(64, 64), (128, 128), (256, 192)])
    @pytest.mark.parametrize("case", ["causal", "documents in a window", "positions", "softcap"])
    def test_large_in_float32(self, case, widths):
        compare_large(case, "triton", jnp.float32, widths, 1e-5)

    def test_runs_are_equal_to_the_bit(self):
        *arrays, d_out, d_log_sum_exp = base.draw(1, 2, 700, 700, 8, 2, 64, 64, dtype=jnp.bfloat16)
        segments = jnp.asarray(documents(2, 700, 6))

        def run(q, k, v, sinks):
            return attention(q, k, v, sinks=sinks, segment_ids=segments, backend="triton")

        first, again = (base.results_and_gradients(run, arrays, (d_out, d_log_sum_exp)) for _ in range(2))
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))

    def test_inside_shard_map(self):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        spec = jax.sharding.PartitionSpec("data")
        q, k, v, *_ = base.draw(6, 2, 200, 200, 4, 2, 64, 64, np.float32)

        def loss(q, k, v):
            out, log_sum_exp = attention(q, k, v, window=90, backend="triton")
            return (out.sum(axis=(1, 2, 3)) + log_sum_exp.sum(axis=(1, 2))) ** 2

        sharded = jax.shard_map(loss, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
        gradients = [jax.jit(jax.grad(lambda *x, f=f: f(*x).sum(), (0, 1, 2)))(q, k, v) for f in (loss, sharded)]
        for one, other in zip(*gradients, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("case", ["causal", "window"])
def test_cudnn(case, width, sinks):
    need_gpu()
    compare_large(case, "cudnn", jnp.bfloat16, (width, width), 1e-2, sinks)


@pytest.mark.gpu
def test_cudnn_has_its_own_backward_where_only_out_is_used():
    need_gpu()
    q, k, v, _, d_out, _ = base.draw(1, 2, 300, 300, 4, 2, 64, 64, dtype=jnp.bfloat16)
    gradients = []
    for backend in ("cudnn", "triton"):
        out = jax.jit(lambda q, k, v, backend=backend: attention(q, k, v, backend=backend)[0])
        gradients.append(jax.vjp(out, q, k, v)[1](d_out))
    for one, other in zip(*gradients, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.linalg.norm(one - other) <= 1e-2 * np.linalg.norm(other)


# Without a GPU.


@pytest.mark.parametrize("missing", ["triton", "jax_triton"])
def test_what_is_missing_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    q, k, v, *_ = base.draw(0, 2, 6, 6, 4, 2, 4, 4, np.float32)
    message = 'backend "triton" needs triton, jax-triton and JAX\'s CUDA plugin; importing .*triton says: '
    with compiling_for("gpu"), pytest.raises(BackendUnavailable, match=message):
        attention(q, k, v, backend="triton")


def test_importing_the_kernels_imports_no_triton():
    code = (
        "import sys, lcx_kernels.attention\nassert not {'triton', 'jax_triton', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        ("triton", {"dtype": jnp.float64}, "it computes in float32"),
        ("triton", {"width": 264}, "heads of 264 numbers"),
        ("cudnn", {"dtype": jnp.float32}, "float32"),
        ("cudnn", {"segment_ids": np.zeros((2, 201), np.int32)}, "segment_ids"),
        ("cudnn", {"softcap": 2.0}, "softcap"),
        ("cudnn", {"causal": False, "window": 7}, "window"),
        ("cudnn", {"causal": False}, "even number"),
        ("pallas_tpu", {"positions": np.zeros((2, 201), np.int32)}, "positions"),
        ("pallas_tpu", {"dtype": jnp.float64}, "float64"),
    ],
)
def test_a_named_backend_says_what_it_cannot_do(backend, options, words, monkeypatch):
    monkeypatch.setattr(cudnn, "installed", lambda: True)
    options = {"dtype": jnp.bfloat16, "width": 64} | options
    platform = "tpu" if backend == "pallas_tpu" else "gpu"
    with jax.enable_x64(True), compiling_for(platform), pytest.raises(BackendUnavailable, match=words):
        q, k, v, *_ = base.draw(0, 2, 201, 201, 2, 2, *[options.pop("width")] * 2, dtype=options.pop("dtype"))
        attention(q, k, v, backend=backend, **options)


@pytest.mark.parametrize(
    ("platform", "time", "options", "chosen"),
    [
        ("gpu", 200, {}, "cudnn"),
        ("gpu", 200, {"window": 9}, "cudnn"),
        ("gpu", 200, {"softcap": 2.0}, "triton"),
        ("gpu", 2, {}, "xla"),
        ("tpu", 256, {"window": 9}, "pallas_tpu"),
        ("tpu", 2, {}, "xla"),
        ("cpu", 200, {}, "cpp"),
        ("cpu", 2, {}, "cpp"),
    ],
)
def test_auto_takes_the_first_that_can(platform, time, options, chosen, monkeypatch):
    q, k, v, *_ = base.draw(0, 1, time, time, 2, 2, 64, 64, dtype=jnp.bfloat16)

    def run(arguments, static):
        return arguments.v * 0 + 1, jnp.zeros(arguments.q.shape[:3])

    chosen_only = {name: b._replace(run=run if name == chosen else None) for name, b in api.BACKENDS.items()}
    monkeypatch.setattr(api, "BACKENDS", chosen_only)
    monkeypatch.setattr(cudnn, "installed", lambda: True)
    with compiling_for(platform):
        assert np.all(attention(q, k, v, **options)[0] == 1)


def sees_by_block(sees, tile):
    """(any pair, every pair) of each two blocks of bool [batch, time, keys]; pairs that do not exist see nothing."""
    batch, time, keys = sees.shape
    padded = np.zeros((batch, -(-time // tile.queries) * tile.queries, -(-keys // tile.keys) * tile.keys), bool)
    padded[:, :time, :keys] = sees
    blocks = padded.reshape(batch, -1, tile.queries, padded.shape[2] // tile.keys, tile.keys)
    return blocks.any((2, 4)), blocks.all((2, 4))


@pytest.mark.parametrize("case", LARGE)
def test_ranges_of_blocks_hold_all_that_is_seen(case):
    """No block that has a pair is left out, none goes unmasked that has a hidden one, and few are met for nothing."""
    (time, keys), options = LARGE[case]
    tile = Tile(32, 16, 4, 1)
    segments = options.get("segment_ids")
    segments = segments if isinstance(segments, tuple) else (segments, segments)
    arrays = [jax.ShapeDtypeStruct((2, length, 1, 16), jnp.float32) for length in (time, keys, keys)]
    arguments = Arguments(*arrays, *options.get("positions", (None, None)), *segments)
    offset = None if "positions" in options else options.get("offset", 0)
    static = Static(options.get("causal", True), options.get("window"), offset, 1.0, None, None)
    some, every = triton_plan._meetings(arguments, static, tile)
    any_pair, all_pairs = sees_by_block(base.pairs_seen(2, time, keys, options), tile)
    for by_keys in (False, True):
        turn = (lambda x: np.swapaxes(x, 1, 2)) if by_keys else (lambda x: x)
        ranges = np.asarray(triton_plan._ranges(jnp.asarray(turn(some)), jnp.asarray(turn(every))))
        low, low_full, high_full, high = np.moveaxis(ranges, -1, 0)[..., None]
        number = np.arange(turn(any_pair).shape[-1])
        met, whole = (low <= number) & (number < high), (low_full <= number) & (number < high_full)
        assert np.all(met | ~turn(any_pair))
        assert np.all(turn(all_pairs) | ~whole)
        assert np.all((low <= low_full) & (low_full <= high_full) & (high_full <= high))
        if case != "positions":
            assert np.array_equal(np.broadcast_to(met, turn(any_pair).shape), turn(any_pair))
            assert whole.sum() > 0 or case == "documents in a window"


def test_too_many_programs_are_refused():
    arrays = [jax.ShapeDtypeStruct((2**16, 2**22, 64, 64), jnp.bfloat16)] * 3
    static = Static(True, 64, 0, 1.0, None, None)
    run = functools.partial(triton_plan.forward, lambda launch: None)
    with pytest.raises(ValueError, match="too many"):
        jax.eval_shape(lambda *x: run(Arguments(*x, *[None] * 4), static), *arrays)
