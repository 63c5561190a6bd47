"""Attention of every backend against a dense float64 reference written from the definition, and its exact promises."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.attention import NO_KEY_LOG_SUM_EXP, attention, attention_gradients, fold_sinks, xla
from lcx_kernels.attention.visibility import Band
from lcx_kernels.backends import BackendUnavailable


def dense(q, k, v, sinks, sees, scale=None, softcap=None):
    """The definition: one softmax per query over the keys it sees and the sink. ``sees`` is an array of numpy."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    sees = np.broadcast_to(sees[:, None], scores.shape)
    exponentials = jnp.where(sees, jnp.exp(jnp.where(sees, scores, 0.0)), 0.0)
    total = exponentials.sum(-1, keepdims=True)
    denominator = total + (0.0 if sinks is None else jnp.exp(sinks)[None, :, None, None])
    blind = ~sees.any(-1, keepdims=True)
    out = jnp.einsum("bhts,bshv->bthv", exponentials / jnp.where(blind, 1.0, denominator), v)
    log_sum_exp = jnp.where(blind, NO_KEY_LOG_SUM_EXP, jnp.log(jnp.where(blind, 1.0, total)))
    return out, log_sum_exp[..., 0].transpose(0, 2, 1)


def pairs_seen(batch, time, keys, options):
    """Who sees whom, pair by pair from the definition: bool [batch, time, keys]."""
    offset = options.get("offset", 0)
    query_index = np.broadcast_to(np.arange(time), (batch, time))
    key_index = np.broadcast_to(np.arange(keys) - offset, (batch, keys))
    if "positions" in options:
        positions = options["positions"]
        query_index, key_index = positions if isinstance(positions, tuple) else (positions, positions)
    distance = query_index[:, :, None] - key_index[:, None, :]
    sees = np.ones((batch, time, keys), bool)
    if options.get("causal", True):
        sees &= distance >= 0
    if "window" in options:
        sees &= distance < options["window"]
    if "segment_ids" in options:
        segments = options["segment_ids"]
        query_segment, key_segment = segments if isinstance(segments, tuple) else (segments, segments)
        sees &= query_segment[:, :, None] == key_segment[:, None, :]
    return sees


def draw(seed, batch, time, keys, heads, kv_heads, width, value_width, dtype=np.float64):
    """Return q, k, v, sinks and the cotangents of out and log_sum_exp."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, time, heads, width),
        (batch, keys, kv_heads, width),
        (batch, keys, kv_heads, value_width),
        (heads,),
        (batch, time, heads, value_width),
        (batch, time, heads),
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def results_and_gradients(function, arrays, cotangents):
    """Return [out, log_sum_exp, dq, dk, dv, dsinks]."""
    results, pull = jax.vjp(function, *arrays)
    return [*results, *pull(tuple(x.astype(y.dtype) for x, y in zip(cotangents, results, strict=True)))]


def assert_close(actual, expected, tolerance):
    for name, a, b in zip(("out", "log_sum_exp", "dq", "dk", "dv", "dsinks"), actual, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        blind = b == NO_KEY_LOG_SUM_EXP
        assert np.all(a[blind].astype(np.float32) == np.float32(NO_KEY_LOG_SUM_EXP)), name
        a, b = a[~blind], b[~blind]
        assert np.isfinite(a).all(), name
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-6), name


def documents(rng, batch, length):
    return np.sort(rng.integers(0, 4, (batch, length)), axis=1).astype(np.int32)


def make_case(name):
    """Return the sizes (batch, time, keys, heads, kv_heads, K, V) and the options of a case."""
    rng = np.random.default_rng(7)
    integers = functools.partial(rng.integers, dtype=np.int32)
    halo = documents(rng, 2, 40)
    cache_index = np.where(np.arange(24) < 17, np.arange(24), 10**6).astype(np.int32)
    return {
        "causal": ((2, 33, 33, 4, 2, 6, 5), {"chunk_size": 3}),
        "one_token": ((2, 1, 1, 4, 1, 4, 3), {}),
        "seven_tokens": ((2, 7, 7, 2, 2, 4, 3), {"chunk_size": 5, "softcap": 2.0}),
        "not_causal": ((2, 9, 14, 2, 1, 4, 4), {"causal": False, "chunk_size": 4, "offset": 2, "window": 5}),
        "window": ((2, 33, 33, 4, 2, 4, 6), {"window": 6, "chunk_size": 4}),
        "documents": ((2, 33, 33, 2, 1, 4, 4), {"segment_ids": documents(rng, 2, 33), "chunk_size": 17}),
        "any_segments": ((2, 33, 33, 4, 4, 4, 4), {"segment_ids": integers(0, 3, (2, 33)), "chunk_size": 11}),
        "halo": (
            (2, 33, 40, 4, 2, 4, 4),
            {
                "window": 8,
                "offset": 7,
                "segment_ids": (np.where(np.arange(33) % 16 == 5, -1, halo[:, 7:]), halo),
                "softcap": 1.5,
                "chunk_size": 8,
            },
        ),
        "long_cache": ((2, 9, 20, 2, 1, 4, 4), {"offset": 6, "chunk_size": 3, "scale": 0.3}),
        "decoding": (
            (2, 2, 24, 4, 2, 4, 4),
            {
                "positions": (np.array([[15, 16], [3, 4]], np.int32), np.stack([cache_index, cache_index - 3])),
                "segment_ids": (np.ones((2, 2), np.int32), (np.arange(24) > np.array([[-1], [2]])).astype(np.int32)),
            },
        ),
        "last_tokens": (
            (2, 2, 20, 4, 2, 4, 3),
            {
                "offset": 18,
                "window": 7,
                "softcap": 1.5,
                "scale": 0.4,
                "segment_ids": (halo[:, 18:20], halo[:, :20]),
            },
        ),
        "shuffled": ((1, 12, 12, 2, 2, 4, 4), {"positions": integers(-9, 9, (1, 12)), "window": 7, "chunk_size": 5}),
        "no_key_at_all": (
            (1, 6, 6, 2, 1, 4, 4),
            {"segment_ids": (np.zeros((1, 6), np.int32), np.ones((1, 6), np.int32))},
        ),
    }[name]


CASES = (
    "causal one_token seven_tokens not_causal window documents any_segments halo long_cache decoding last_tokens"
    " shuffled no_key_at_all"
).split()


@functools.cache
def expect(name, dtype):
    """Return what the dense reference gives in float64 for a case whose inputs are drawn in ``dtype``."""
    sizes, options = make_case(name)
    sees = pairs_seen(*sizes[:3], options)
    softmax_options = {key: options[key] for key in ("scale", "softcap") if key in options}
    with jax.enable_x64(True):
        arrays = [x.astype(jnp.float64) for x in draw(3, *sizes, dtype=dtype)]
        return results_and_gradients(lambda *x: dense(*x, sees, **softmax_options), arrays[:4], arrays[4:])


def run_case(name, backend, dtype):
    """Return what a backend gives for a case."""
    sizes, options = make_case(name)
    *arrays, d_out, d_log_sum_exp = draw(3, *sizes, dtype=dtype)
    dynamic = ("positions", "segment_ids")
    options = {key: jax.tree.map(jnp.asarray, value) if key in dynamic else value for key, value in options.items()}

    def run(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, backend=backend, **options)

    return results_and_gradients(run, arrays, (d_out, d_log_sum_exp))


def compare_parts(sizes, cut, options, backend, dtype, tolerance):
    """Gradients of two parts of the keys, from the whole's log-sum-exp, against those of the whole in float64."""
    sees = pairs_seen(*sizes[:3], options)
    softmax_options = {key: options[key] for key in ("scale", "softcap") if key in options}
    q, k, v, _, *cotangents = draw(3, *sizes, dtype=dtype)
    with jax.enable_x64(True):
        exact, pulled = jax.tree.map(lambda x: x.astype(jnp.float64), ((q, k, v), cotangents))
        whole = lambda *x: dense(*x, None, sees, **softmax_options)  # noqa: E731
        out, log_sum_exp, *expected = results_and_gradients(whole, exact, pulled)
        delta = jnp.sum(out * pulled[0], axis=-1) - pulled[1]
        wide = jnp.promote_types(dtype, jnp.float32)
        rows = log_sum_exp.astype(wide), cotangents[0], delta.astype(wide)

    def part(keys, q, k, v, *rows):
        of_part = {
            name: (value[0], value[1][:, keys]) if name in ("positions", "segment_ids") else value
            for name, value in options.items()
        }
        return attention_gradients(q, k[:, keys], v[:, keys], *rows, backend=backend, **of_part)

    halves = slice(0, cut), slice(cut, k.shape[1])
    parts = jax.jit(lambda *arrays: [part(keys, *arrays) for keys in halves])(q, k, v, *rows)
    assert all(gradient.dtype == dtype for gradients in parts for gradient in gradients)
    (dq, *dkv), (late_dq, *late_dkv) = jax.tree.map(lambda x: np.asarray(x, np.float64), parts)
    found = [dq + late_dq, *(np.concatenate(pair, axis=1) for pair in zip(dkv, late_dkv, strict=True))]
    assert_close([out, log_sum_exp, *found, 0.0], [out, log_sum_exp, *expected, 0.0], tolerance)


# Exact promises: what is not seen has no influence, to the bit.


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(np.asarray(x).view(np.int32), np.asarray(y).view(np.int32))


class AttentionTests:
    """What every backend must give; subclasses say which.

    Attributes:
      backend: its name.
      exact: the widest dtype that it takes, and the relative error there.
      narrow: the errors of other dtypes.
      environment: makes the context in which it can run here.
    """

    backend: str
    exact = jnp.float64, 1e-12
    narrow = {"float32": 2e-6, "bfloat16": 6e-3}
    environment = contextlib.nullcontext

    @pytest.fixture(autouse=True)
    def _environment(self):
        with type(self).environment():
            yield

    @pytest.mark.parametrize("name", CASES)
    def test_results_and_gradients(self, name):
        dtype, tolerance = self.exact
        with jax.enable_x64(dtype == jnp.float64):
            actual = run_case(name, self.backend, dtype)
        assert all(x.dtype == dtype for x in actual)
        assert_close(actual, expect(name, dtype), tolerance)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_results_and_gradients_in_lower_precision(self, dtype):
        actual = run_case("halo", self.backend, jnp.dtype(dtype))
        assert [x.dtype for x in actual] == [dtype, jnp.float32, dtype, dtype, dtype, dtype]
        assert_close(actual, expect("halo", jnp.dtype(dtype)), self.narrow[dtype])

    def test_large_scores_do_not_overflow(self):
        q, k, v, *_ = draw(0, 1, 8, 8, 2, 2, 4, 4, np.float32)
        run = jax.jit(functools.partial(attention, backend=self.backend, chunk_size=4))
        out, log_sum_exp = run(100 * q, 100 * k, v)
        exact = [np.asarray(x, np.float64) for x in (100 * q, 100 * k, v)]
        scores = np.einsum("bthk,bshk->bths", *exact[:2]) / 2
        scores = np.where(np.tril(np.ones((8, 8), bool))[None, :, None], scores, -np.inf)
        maximum = scores.max(-1, keepdims=True)
        weights = np.exp(scores - maximum)
        np.testing.assert_allclose(log_sum_exp, (maximum + np.log(weights.sum(-1, keepdims=True)))[..., 0], rtol=1e-5)
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(out, np.einsum("bths,bshv->bthv", weights, exact[2]), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("window", [None, 6])
    def test_a_document_is_isolated_to_the_bit(self, window):
        """Other documents change, their cotangents too, up to values whose products overflow; a document does not."""
        time, begin, end = 26, 9, 18
        q, k, v, sinks, d_out, d_log_sum_exp = draw(1, 2, time, time, 4, 2, 4, 4, np.float32)
        numbers = np.repeat([0, 1, 2], [begin, end - begin, time - end])
        segments = jnp.asarray(np.tile(numbers, (2, 1)), jnp.int32)
        options = {"segment_ids": segments, "window": window}
        function = functools.partial(attention, sinks=sinks, backend=self.backend, chunk_size=4, **options)

        def run(*arrays):
            return [x[:, begin:end] for x in results_and_gradients(function, arrays[:3], arrays[3:])]

        own = np.zeros((1, time, 1, 1), bool)
        own[:, begin:end] = True

        def change(x, factor):
            mask = own if x.ndim == 4 else own[..., 0]
            return jnp.where(mask, x, jnp.sign(x + 0.3) * factor)

        arrays = (q, k, v, d_out, d_log_sum_exp)
        for factors in ((1.0, 1.0, 1.0, 1.0, 1.0), (1.0, 1e30, 3e38, 1.0, 1.0)):
            changed = [change(x, factor) for x, factor in zip(arrays, factors, strict=True)]
            assert_same_bits(run(*arrays), run(*changed))

    @pytest.mark.parametrize("options", [{}, {"positions": True}])
    def test_causality_is_exact(self, options):
        time, cut = 22, 13
        q, k, v, sinks, d_out, d_log_sum_exp = draw(2, 1, time, time, 2, 1, 4, 4, np.float32)
        if "positions" in options:
            options = {"positions": jnp.arange(time, dtype=jnp.int32)[None]}
        past = (np.arange(time) < cut)[None, :, None]
        d_out, d_log_sum_exp = d_out * past[..., None], d_log_sum_exp * past  # a loss of the past alone

        function = functools.partial(attention, sinks=sinks, backend=self.backend, chunk_size=4, **options)

        def run(*arrays):
            return results_and_gradients(function, arrays, (d_out, d_log_sum_exp))

        before = run(q, k, v)
        after = run(*(jnp.where(past[..., None], x, -2 * x + 1) for x in (q, k, v)))
        assert_same_bits([x[:, :cut] for x in before], [x[:, :cut] for x in after])
        for gradient in before[2:]:
            assert np.all(np.asarray(gradient[:, cut:]) == 0)

    def test_a_query_without_keys_is_inert(self):
        q, k, v, sinks, d_out, d_log_sum_exp = draw(4, 1, 9, 9, 2, 1, 4, 4, np.float32)
        blind = np.array([0, 0, 1, 0, 1, 0, 0, 0, 1], bool)
        segment_ids = jnp.asarray(np.where(blind, 7, 3)[None], jnp.int32), jnp.full((1, 9), 3, jnp.int32)
        function = functools.partial(
            attention, sinks=sinks, segment_ids=segment_ids, backend=self.backend, chunk_size=4
        )
        out, log_sum_exp, dq, dk, dv = results_and_gradients(
            function, (q, -k, -v), (1e30 * d_out, 1e30 * d_log_sum_exp)
        )
        assert np.all(np.asarray(out)[:, blind].view(np.int32) == 0)
        assert np.all(np.asarray(log_sum_exp)[:, blind] == np.float32(NO_KEY_LOG_SUM_EXP))
        assert np.all(np.asarray(dq)[:, blind] == 0)
        assert all(np.isfinite(x).all() for x in (dq, dk, dv))
        # Its cotangents reach nobody.
        quiet = np.where(blind, 0.0, 1e30).astype(np.float32)[None, :, None]
        others = results_and_gradients(function, (q, -k, -v), (quiet[..., None] * d_out, quiet * d_log_sum_exp))
        assert_same_bits(others[2:], (dq, dk, dv))

    def test_what_is_not_a_number_is_not_hidden(self):
        q, k, v, *_ = draw(4, 2, 6, 6, 2, 1, 4, 4, np.float32)
        run = jax.jit(functools.partial(attention, backend=self.backend))
        out, log_sum_exp = run(q.at[0, 3, 1].set(jnp.nan), k, v)
        expected = np.zeros((2, 6, 2), bool)
        expected[0, 3, 1] = True
        assert np.array_equal(np.isnan(out), np.broadcast_to(expected[..., None], out.shape))
        assert np.array_equal(np.isnan(log_sum_exp), expected)

    def test_partial_results_merge_by_log_sum_exp(self):
        """Over two halves of the keys, merged as a ring does, the sink folded in once: attention over the whole."""
        q, k, v, sinks, *_ = draw(5, 2, 8, 8, 4, 2, 4, 4, np.float32)
        index = jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1))
        run = jax.jit(functools.partial(attention, backend=self.backend))
        parts = [run(q, k[:, part], v[:, part], positions=(index, index[:, part])) for part in (slice(4), slice(4, 8))]
        log_sum_exp = jnp.logaddexp(parts[0][1], parts[1][1])
        out = sum(o * jnp.exp(lse - log_sum_exp)[..., None] for o, lse in parts)
        whole, whole_log_sum_exp = run(q, k, v, sinks=sinks)
        np.testing.assert_allclose(log_sum_exp, whole_log_sum_exp, rtol=1e-5)
        np.testing.assert_allclose(out * jax.nn.sigmoid(log_sum_exp - sinks)[..., None], whole, atol=1e-6)

    @pytest.mark.parametrize("causal", [True, False])
    def test_gradients_of_parts(self, causal):
        """Of windows, documents and a softcap; some queries see keys of one part only, or none."""
        dtype, tolerance = self.exact
        rng = np.random.default_rng(8)
        time, keys = 21, 26
        indices = [np.broadcast_to(np.arange(n, dtype=np.int32), (2, n)) for n in (time, keys)]
        segments = documents(rng, 2, time), documents(rng, 2, keys)
        segments[0][:, 4] = 9
        positions = {"positions": (indices[0] + 5, indices[1]), "window": 11, "softcap": 3.0} if causal else {}
        options = {"causal": causal, "segment_ids": segments, "chunk_size": 8, **positions}
        with jax.enable_x64(dtype == jnp.float64):
            compare_parts((2, time, keys, 4, 2, 5, 3), 11, options, self.backend, dtype, tolerance)


class TestReference(AttentionTests):
    backend = "reference"


class TestXla(AttentionTests):
    backend = "xla"


class TestCpp(AttentionTests):
    backend = "cpp"

    @pytest.mark.parametrize("heads", [1, 6])
    @pytest.mark.parametrize("options", ["causal", "window", "documents"])
    def test_several_blocks(self, options, heads):
        """Blocks of 64 rows and 128 keys: some hidden, some seen by all, the last ones ragged."""
        time, before = 290, 33
        numbers = np.repeat([1, 2, 3], [100, 15, time + before - 115]).astype(np.int32)[None].repeat(2, axis=0)
        documents = {"segment_ids": (jnp.asarray(numbers[:, before:]), jnp.asarray(numbers)), "softcap": 3.0}
        chosen = {"causal": {}, "window": {"window": 140}, "documents": documents}[options]
        with jax.enable_x64(True):
            *arrays, d_out, d_log_sum_exp = draw(5, 2, time, time + before, heads, max(1, heads // 3), 24, 16)
            found = [
                results_and_gradients(
                    functools.partial(self.run, backend=backend, offset=before, **chosen),
                    arrays,
                    (d_out, d_log_sum_exp),
                )
                for backend in ("cpp", "xla")
            ]
        assert_close(*found, 1e-11)

    @staticmethod
    def run(q, k, v, sinks, **options):
        return attention(q, k, v, sinks=sinks, **options)

    def test_one_token_over_several_blocks(self):
        """As in decoding: each row by itself, over a cache of which a part is held."""
        with jax.enable_x64(True):
            *arrays, d_out, d_log_sum_exp = draw(6, 2, 1, 300, 4, 2, 16, 8)
            index = jnp.tile(jnp.arange(300, dtype=jnp.int32), (2, 1))
            options = {"positions": (jnp.asarray([[257], [31]], jnp.int32), index)}
            found = [
                results_and_gradients(
                    functools.partial(self.run, backend=backend, **options), arrays, (d_out, d_log_sum_exp)
                )
                for backend in ("cpp", "reference")
            ]
        assert_close(*found, 1e-12)


def test_sinks_have_the_right_gradient_where_they_weigh_little():
    """Over many keys a sink's share is small; its derivative is as exact as any."""
    out, log_sum_exp, sinks = jnp.ones((1, 1, 3, 2)), jnp.asarray([[[3.0, 12.0, 30.0]]]), jnp.asarray([0.5, -1.0, 0.0])
    value, gradient = jax.value_and_grad(lambda x: fold_sinks(out, log_sum_exp, x).sum())(sinks)
    odds = np.exp(np.asarray(sinks, np.float64) - np.asarray(log_sum_exp, np.float64)[0, 0])
    np.testing.assert_allclose(value, 2 * (1 / (1 + odds)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, -2 * odds / (1 + odds) ** 2, rtol=1e-5)


def test_runs_meet_every_key_seen_and_few_others():
    for time, offset, reach, chunk_size in itertools.product(
        (1, 7, 33, 160), (0, 5), (None, 0, 3, 30, 200), (1, 4, 40, 500)
    ):
        keys = time + offset
        met = np.zeros((time, keys), int)
        for run in xla._runs(xla.Plan(Band(offset, reach), 1.0, None, chunk_size), time, keys):
            for block in range(run.begin, run.end):
                start = min(max(run.start + (block - run.begin) * run.step, 0), keys - run.extent)
                met[block * chunk_size : (block + 1) * chunk_size, start : start + run.extent] += 1
        query, key = np.arange(time)[:, None] + offset, np.arange(keys)[None]
        sees = (key <= query) & (key >= query - (keys if reach is None else reach))
        assert met.max() == 1 and np.all(met[sees] == 1)
        if reach is None:
            assert met.sum() <= sees.sum() * (1 + 1 / xla.MAX_TRIANGLE_RUNS) + time * (2 * chunk_size + offset)
        else:
            assert met.sum() <= time * (reach + 2 * chunk_size)


def count_equations(jaxpr):
    parameters = jax.tree.leaves([list(equation.params.values()) for equation in jaxpr.eqns])
    return len(jaxpr.eqns) + sum(count_equations(x.jaxpr) for x in parameters if hasattr(x, "jaxpr"))


@pytest.mark.parametrize("window", [None, 100])
def test_program_and_temporaries_at_length(window, monkeypatch):
    """The program does not grow with T, and temporaries grow linearly."""
    monkeypatch.setattr(xla, "MAX_TRIANGLE_RUNS", 2)  # quicker to compile

    def gradient(q, k, v):
        loss = lambda *x: attention(*x, window=window, backend="xla", chunk_size=32)[0].sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    equations, temporaries = [], []
    for time in (512, 2048):
        arrays = [jax.ShapeDtypeStruct((1, time, 2, 16), jnp.float32)] * 3
        equations.append(count_equations(jax.make_jaxpr(gradient)(*arrays).jaxpr))
        temporaries.append(jax.jit(gradient).lower(*arrays).compile().memory_analysis().temp_size_in_bytes)
    assert equations[1] <= equations[0] < 700
    assert temporaries[1] <= 4.2 * temporaries[0]


def test_types_vary_over_a_mesh_inside_shard_map():
    """The carries of the loops must vary over the mesh as the inputs do, or shard_map refuses the program."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    q, k, v, *_ = draw(6, 2, 33, 33, 2, 1, 4, 4, np.float32)
    segment_ids = jnp.tile(jnp.arange(33, dtype=jnp.int32) // 7, (2, 1))

    def loss(q, k, v, segment_ids):
        out, log_sum_exp = attention(q, k, v, window=9, segment_ids=segment_ids, chunk_size=4)
        return (out.sum(axis=(1, 2, 3)) + log_sum_exp.sum(axis=(1, 2))) ** 2

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    gradients = [
        jax.jit(jax.grad(lambda *x, f=f: f(*x).sum(), (0, 1, 2)))(q, k, v, segment_ids) for f in (loss, sharded)
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


# Refusals.

INDEX = np.zeros((2, 6), np.int32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"chunk_size": 0}, "chunk_size must be positive"),
        ({"offset": 0, "positions": INDEX}, "not both"),
        ({"offset": 1}, "outside 0 to keys - time = 0"),
        ({"offset": -1}, "outside 0"),
        ({"positions": INDEX[:, :5]}, "positions of the queries must be integers"),
        ({"segment_ids": (INDEX, INDEX[:1])}, "segment_ids of the keys must be integers"),
        ({"segment_ids": INDEX.astype(np.float32)}, "segment_ids of the queries must be integers"),
        ({"sinks": jnp.zeros(3)}, r"sinks must be \[heads\]"),
        ({"backend": "fast"}, "unknown name"),
    ],
)
def test_refuses_options(options, words):
    q, k, v, *_ = draw(0, 2, 6, 6, 4, 2, 4, 4, np.float32)
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("q", "k", "v", "words"),
    [
        ((2, 6, 4), (2, 6, 2, 4), (2, 6, 2, 4), "q must be floating with 4 axes"),
        ((2, 6, 4, 4), (2, 6, 2, 5), (2, 6, 2, 4), "expected q"),
        ((2, 6, 4, 4), (2, 6, 2, 4), (2, 5, 2, 4), "expected q"),
        ((2, 6, 4, 4), (2, 6, 3, 4), (2, 6, 3, 4), "must divide the 4 query heads"),
        ((2, 6, 4, 4), (2, 9, 2, 4), (2, 9, 2, 4), "say how they align"),
    ],
)
def test_refuses_shapes(q, k, v, words):
    with pytest.raises(ValueError, match=words):
        attention(*(jnp.zeros(shape) for shape in (q, k, v)))


def test_refuses_mixed_dtypes():
    q, k, v, *_ = draw(0, 2, 6, 6, 4, 2, 4, 4, np.float32)
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k.astype(jnp.bfloat16), v)


def test_refuses_gradients_of_other_shapes():
    q, k, v, _, d_out, row = draw(0, 2, 6, 6, 4, 2, 4, 4, np.float32)
    with pytest.raises(ValueError, match=r"delta must be floating \[2, 6, 4\]"):
        attention_gradients(q, k, v, row, d_out, row[:, :5])


def test_refuses_a_backend_that_is_missing():
    q, k, v, *_ = draw(0, 2, 6, 6, 4, 2, 4, 4, np.float32)
    with pytest.raises(BackendUnavailable, match="triton"):
        attention(q, k, v, backend="triton")
