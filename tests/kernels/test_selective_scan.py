"""The selective scan: every backend against a float64 sum over pairs of tokens, values and all gradients.

`ScanTests` holds what is asked of a backend; each backend is a subclass, here or in a file of its own.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from lcx_kernels.backends import interpreted
from lcx_kernels.selective_scan import selective_scan, selective_scan_summary

# What is differentiated, in the order of the signature.
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def draw(batch, time, channels, state, *, seed=0, names=NAMES):
    """Arguments in float64 by name; step sizes between 0.02 and 2 so that memory spans from one token to all."""
    rng = np.random.default_rng(seed)
    arguments = {
        "x": rng.normal(size=(batch, time, channels)),
        "dt": np.exp(rng.uniform(np.log(0.02), np.log(2.0), size=(batch, time, channels))),
        "A": -np.exp(rng.normal(size=(channels, state))),
        "B": rng.normal(size=(batch, time, state)),
        "C": rng.normal(size=(batch, time, state)),
        "D": rng.normal(size=(channels,)),
        "z": rng.normal(size=(batch, time, channels)),
        "dt_bias": rng.normal(size=(channels,)),
        "initial_state": rng.normal(size=(batch, channels, state)),
    }
    return {name: arguments[name] for name in names}


def mark_resets(batch, time, *positions):
    reset = np.zeros((batch, time), bool)
    for position in positions:
        reset[:, position] = True
    return reset


def sum_over_pairs(x, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=False, initial_state=None, reset=None):
    """The scan's definition without a scan: h[t] is a sum over s <= t, where no reset lies in s+1 .. t."""
    batch, time, channels = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = jnp.log1p(jnp.exp(dt))
    if initial_state is None:
        initial_state = jnp.zeros((batch, channels, A.shape[1]), x.dtype)
    documents = jnp.zeros((batch, time), int) if reset is None else jnp.cumsum(reset, axis=1)
    after = jnp.tril(jnp.ones((time, time), x.dtype), -1)  # [r, s]: token r comes after token s
    upto = jnp.tril(jnp.ones((time, time), x.dtype))  # [t, r]: token r is not later than t
    elapsed = jnp.einsum("rs,tr,brd->btsd", after, upto, dt)
    reached = (documents[:, :, None] == documents[:, None, :]) & (upto > 0)
    decay = jnp.exp(elapsed[..., None] * A) * reached[..., None, None]
    h = jnp.einsum("btsdn,bsd,bsn->btdn", decay, dt * x, B)
    since_start = jnp.exp(jnp.cumsum(dt, axis=1)[..., None] * A) * (documents == 0)[..., None, None]
    h = h + since_start * initial_state[:, None]
    y = jnp.einsum("btdn,btn->btd", h, C)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * z / (1 + jnp.exp(-z))
    return y, h[:, -1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(function, dt_softplus, arguments, cotangents, reset):
    options = ({"dt_softplus": True} if dt_softplus else {}) | ({} if reset is None else {"reset": reset})
    outputs, transpose = jax.vjp(lambda arguments: function(**arguments, **options), arguments)
    return outputs, transpose(cotangents)[0]


def values_and_gradients(function, arguments, cotangents, dt_softplus=False, reset=None):
    """y, final state, and the gradients by name, from under one jit."""
    (y, final_state), gradients = outputs_and_gradients(function, dt_softplus, arguments, cotangents, reset)
    return {"y": y, "final_state": final_state} | {f"d{name}": gradient for name, gradient in gradients.items()}


def cotangents_of(arguments, dtype, seed=1):
    rng = np.random.default_rng(seed)
    batch, _, channels = arguments["x"].shape
    state = arguments["A"].shape[1]
    dy, d_state = rng.normal(size=arguments["x"].shape), rng.normal(size=(batch, channels, state))
    return jnp.asarray(dy, dtype), jnp.asarray(d_state, jnp.promote_types(dtype, jnp.float32))


def assert_close(actual, expected, tolerance):
    """The difference's norm over the norm, for each name; float64 differences of whatever dtypes."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        value, wanted = np.asarray(value, np.float64), np.asarray(expected[name], np.float64)
        assert value.shape == wanted.shape, name
        assert np.isfinite(value).all(), name
        error = np.linalg.norm(value - wanted) / max(np.linalg.norm(wanted), 1e-6)
        assert error <= tolerance, f"{name}: {error:.1e}"


def extreme_steps():
    """Step sizes from zero to where decays underflow, rates from slow to fast."""
    arguments = draw(2, 18, 4, 3, names=("x", "dt", "A", "B", "C", "initial_state"))
    steps = np.array([0.0, 1e-30, 1e-4, 1.0, 300.0, 1e4])
    arguments["dt"] = np.random.default_rng(3).choice(steps, size=arguments["dt"].shape)
    arguments["A"] = -np.array([[1e-3, 1.0, 1e3]] * 4)
    return arguments


CASES = {
    # Time over several chunks, the last one ragged; everything on.
    "everything": (draw(2, 37, 6, 3), {"dt_softplus": True, "reset": mark_resets(2, 37, 5, 20)}),
    "plain": (draw(3, 18, 5, 2, names=NAMES[:5]), {}),
    "one token": (draw(2, 1, 5, 2), {"dt_softplus": True}),
    # A batch of one with even and odd channels, with resets at both ends.
    "one row": (draw(1, 19, 6, 2), {"dt_softplus": True, "reset": mark_resets(1, 19, 0, 18)}),
    "one odd row": (draw(1, 19, 5, 2), {"dt_softplus": True, "reset": mark_resets(1, 19, 7)}),
    "one channel, resets everywhere": (draw(1, 18, 1, 1), {"reset": np.ones((1, 18), bool)}),
    "extreme steps": (extreme_steps(), {}),
    # Channels over several blocks of a kernel, the last one ragged.
    "many channels": (draw(1, 9, 130, 2), {"dt_softplus": True, "reset": mark_resets(1, 9, 4)}),
}


@functools.cache
def rounded(case, dtype):
    """The case's arguments and cotangents in ``dtype``, and what the sum over pairs makes of them in float64."""
    arguments, static = CASES[case]
    arguments = {name: jnp.asarray(value, dtype) for name, value in arguments.items()}
    cotangents = cotangents_of(arguments, dtype)
    exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
    return arguments, cotangents, values_and_gradients(sum_over_pairs, *exact, **static)


@functools.cache
def jitted(function, **static):
    return jax.jit(functools.partial(function, **static))


@functools.cache
def gradients_of_packed(batch, backend):
    """Jitted: values and gradients per token, of tokens in documents of 7, 12 and 6."""
    reset = mark_resets(batch, 25, 0, 7, 19)

    def run(tokens, A, initial_state, cotangents):
        def scan(tokens):
            return selective_scan(
                A=A, **tokens, initial_state=initial_state, reset=reset, chunk_size=8, backend=backend
            )

        outputs, transpose = jax.vjp(scan, tokens)
        return {"y": outputs[0]} | transpose(cotangents)[0]

    return jax.jit(run)


def in_float32(arguments):
    return {name: jnp.asarray(value, jnp.float32) for name, value in arguments.items()}


def slow(*values):
    """A case for `make drills`, not for `make test`."""
    return pytest.param(*values, marks=pytest.mark.slow)


class ScanTests:
    """The laws and cases of a backend; subclasses say which.

    Attributes:
      backend: its name.
      chunk_size: with which the cases run, short enough for several chunks; None for the backend's own.
      check_vma: whether the axes of a shard_map around the backend are checked.
      environment: makes the context in which it can run here.
    """

    backend: str
    chunk_size: int | None = None
    check_vma = True
    environment = contextlib.nullcontext

    @pytest.fixture(autouse=True)
    def _environment(self):
        with type(self).environment():
            yield

    def compare(self, case, *, dtype=np.float64, tolerance=1e-10, chunk_size=None):
        with jax.enable_x64(True):
            arguments, cotangents, expected = rounded(case, dtype)
            options = {"backend": self.backend, "chunk_size": chunk_size or self.chunk_size}
            scan = functools.partial(selective_scan, **options)
            actual = values_and_gradients(scan, arguments, cotangents, **CASES[case][1])
            for name, value in actual.items():
                assert value.dtype == (jnp.promote_types(dtype, jnp.float32) if name == "final_state" else dtype), name
            assert_close(actual, expected, tolerance)

    @pytest.mark.parametrize("case", CASES)
    def test_float64(self, case):
        self.compare(case)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 8e-3)])
    def test_lower_precisions(self, dtype, tolerance):
        self.compare("everything", dtype=dtype, tolerance=tolerance)

    def test_decays_of_zero_and_of_large_steps(self):
        """A step of 0 leaves the state as it is, to the bit; a large one leaves exactly nothing of it."""
        arguments = in_float32(CASES["extreme steps"][0])
        scan = jitted(selective_scan, backend=self.backend)
        _, lasting = scan(**arguments | {"dt": jnp.zeros((2, 18, 4))})
        np.testing.assert_array_equal(lasting, arguments["initial_state"])
        _, gone = scan(**arguments | {"dt": jnp.full((2, 18, 4), 1e30), "x": jnp.zeros((2, 18, 4))})
        np.testing.assert_array_equal(gone, np.zeros_like(gone))

    def test_softplus_is_stable(self):
        arguments = in_float32(draw(1, 6, 2, 2))
        arguments["dt"] = jnp.asarray([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])[None, :, None] * jnp.ones((1, 6, 2))
        scan = functools.partial(selective_scan, backend=self.backend)
        results = values_and_gradients(scan, arguments, cotangents_of(arguments, jnp.float32), dt_softplus=True)
        for name, value in results.items():
            assert np.isfinite(value).all(), name

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("noise", ["numbers", "nan"])
    def test_documents_are_isolated_to_the_bit(self, noise, batch):
        """Another document's tokens, cotangents or the initial state change nothing between two resets."""
        arguments = in_float32(draw(batch, 25, 4, 3))
        tokens = {name: arguments[name] for name in ("x", "dt", "B", "C", "z")}
        dy, d_state = cotangents_of(arguments, jnp.float32)
        outside = np.ones((1, 25, 1), bool)
        outside[:, 7:19] = False

        def disturb(array):
            return jnp.where(outside, 3 * array + 1 if noise == "numbers" else jnp.nan, array)

        run = gradients_of_packed(batch, self.backend)
        before = run(tokens, arguments["A"], arguments["initial_state"], (dy, d_state))
        disturbed = jax.tree.map(disturb, tokens)
        after = run(disturbed, arguments["A"], arguments["initial_state"] + 1, (disturb(dy), d_state + 1))
        for name, value in before.items():
            np.testing.assert_array_equal(value[:, 7:19], after[name][:, 7:19], err_msg=name)
            assert not np.array_equal(value[:, 19:], after[name][:, 19:]), name

    def test_the_future_is_unseen_to_the_bit(self):
        arguments = in_float32(draw(2, 20, 4, 3, names=NAMES[:5]))
        scan = jitted(selective_scan, backend=self.backend, chunk_size=8)
        y, _ = scan(**arguments)
        changed = {name: arguments[name].at[:, 11:].mul(2.0) for name in ("x", "dt", "B", "C")}
        later, _ = scan(**arguments | changed)
        np.testing.assert_array_equal(y[:, :11], later[:, :11])
        assert not np.array_equal(y[:, 11], later[:, 11])

    # The classes run it as the same test: differing executors.
    @settings(max_examples=20, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow])
    @given(data=st.data())
    def test_stretches_compose(self, data):
        """Scanning stretch by stretch, and composing the stretches' summaries, give the state of one scan."""
        positions = data.draw(st.lists(st.integers(0, 23), max_size=4))
        reset = mark_resets(2, 24, *positions) & np.array([[True], [data.draw(st.booleans())]])
        arguments = in_float32(draw(2, 24, 4, 3))
        A, initial = arguments["A"], arguments["initial_state"]
        per_token = {"x", "dt", "B", "C", "z"}
        scan = jitted(selective_scan, dt_softplus=True, backend=self.backend, chunk_size=4)
        summarise = jitted(selective_scan_summary, dt_softplus=True, backend=self.backend, chunk_size=4)
        y, final = scan(**arguments, reset=reset)

        state, summary, pieces = initial, None, []
        for start in (0, 8, 16):
            now = slice(start, start + 8)
            part = {name: value[:, now] if name in per_token else value for name, value in arguments.items()}
            piece, state = scan(**part | {"initial_state": state}, reset=reset[:, now])
            pieces.append(piece)
            of_map = {name: part[name] for name in ("x", "dt", "A", "B", "dt_bias")}
            piece_summary = summarise(**of_map, reset=reset[:, now])
            summary = piece_summary if summary is None else summary.then(piece_summary, A)
            np.testing.assert_allclose(summary.decay(A) * initial + summary.state, state, rtol=1e-5, atol=1e-5)

        np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-5)
        restarted = reset.any(axis=1)
        np.testing.assert_array_equal(np.asarray(summary.decay(A) == 0).all(axis=(1, 2)), restarted)

    def test_summary_gradients(self):
        """The final state through the summary and straight from the scan have the same gradients."""
        names = ("x", "dt", "A", "B", "dt_bias", "initial_state")
        reset = mark_resets(2, 10, 3) & np.array([[True], [False]])

        def through_summary(initial_state, **arguments):
            summary = selective_scan_summary(**arguments, dt_softplus=True, reset=reset, backend=self.backend)
            return None, summary.decay(arguments["A"]) * initial_state + summary.state

        def straight(**arguments):
            C = jnp.zeros_like(arguments["B"])
            return None, sum_over_pairs(**arguments, C=C, dt_softplus=True, reset=reset)[1]

        with jax.enable_x64(True):
            arguments = {name: jnp.asarray(value) for name, value in draw(2, 10, 4, 3, names=names).items()}
            cotangents = None, cotangents_of(arguments, jnp.float64)[1]
            results = [
                values_and_gradients(function, arguments, cotangents) for function in (through_summary, straight)
            ]
            for result in results:
                del result["y"]
            assert_close(*results, 1e-10)

    def test_inside_shard_map(self):
        """Over batch and channels; also what is made inside, such as an absent initial state."""
        arguments = in_float32(draw(2, 9, 4, 3, names=NAMES[:5]))
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        channels, shared = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
        specs = {"x": channels, "dt": channels, "A": PartitionSpec("tensor"), "B": shared, "C": shared}
        reset = mark_resets(2, 9, 4)

        def sharded(arguments, reset):
            missing = {"A": "data", "B": "tensor", "C": "tensor"}
            arguments = {
                name: jax.lax.pcast(value, missing[name], to="varying") if name in missing else value
                for name, value in arguments.items()
            }
            reset = jax.lax.pcast(reset, "tensor", to="varying")
            return selective_scan(**arguments, reset=reset, backend=self.backend, chunk_size=4)[0]

        def loss(scan, arguments):
            return (scan(arguments, reset) ** 2).sum()

        mapped = jax.shard_map(
            sharded, mesh=mesh, in_specs=(specs, shared), out_specs=channels, check_vma=self.check_vma
        )
        whole = lambda arguments, reset: selective_scan(**arguments, reset=reset, backend="xla")[0]  # noqa: E731
        actual, expected = (jax.jit(jax.grad(functools.partial(loss, scan)))(arguments) for scan in (mapped, whole))
        assert_close(actual, expected, 1e-6)


class TestReference(ScanTests):
    backend = "reference"


class TestXla(ScanTests):
    backend = "xla"

    @pytest.mark.parametrize("chunk_size", [1, 5])
    def test_chunk_size_changes_nothing(self, chunk_size):
        self.compare("everything", chunk_size=chunk_size)

    @pytest.mark.parametrize("channels", [6, 7])
    def test_a_lone_row_is_two_rows_of_half_its_channels(self, channels):
        """XLA's code for a single row is several times slower."""
        arguments = in_float32(draw(1, 20, channels, 3))
        text = str(jax.make_jaxpr(lambda arguments: selective_scan(**arguments, backend="xla"))(arguments))
        assert f"f32[2,3,{-(-channels // 2)}]" in text
        assert f"f32[1,3,{channels}]" not in text

    def test_memory_holds_no_state_per_token(self):
        """Temporaries of the gradient are a small part of [batch, time, channels, state], in proportion to time."""

        def temporaries(time):
            arguments = in_float32(draw(2, time, 64, 16))
            loss = lambda arguments: selective_scan(**arguments, backend="xla")[0].sum()  # noqa: E731
            analysis = jax.jit(jax.grad(loss)).lower(arguments).compile().memory_analysis()
            return analysis.temp_size_in_bytes

        short, long = temporaries(256), temporaries(1024)
        assert long < 2 * 1024 * 64 * 16 * 4 / 2
        assert long < 4.2 * short


class TestCpp(ScanTests):
    """Compiled by the C++ compiler at hand when the first test of it runs."""

    backend = "cpp"

    @pytest.mark.parametrize("chunk_size", [1, 5])
    def test_chunk_size_changes_nothing(self, chunk_size):
        self.compare("everything", chunk_size=chunk_size)

    def test_sixteen_states_and_several_tasks(self):
        """What is unrolled for 16 states; groups of vectors of channels, the last one ragged; several chunks."""
        with jax.enable_x64(True):
            arguments = {name: jnp.asarray(value) for name, value in draw(2, 70, 85, 16).items()}
            static = {"dt_softplus": True, "reset": mark_resets(2, 70, 7, 40) & np.array([[True], [False]])}
            cotangents = cotangents_of(arguments, jnp.float64)
            scans = [functools.partial(selective_scan, backend=backend) for backend in ("cpp", "xla")]
            assert_close(*(values_and_gradients(scan, arguments, cotangents, **static) for scan in scans), 1e-10)


class TestPallasTpu(ScanTests):
    """The kernels' arithmetic, interpreted on CPU; tests/aot has them compiled for TPU."""

    backend = "pallas_tpu"
    chunk_size = 16
    check_vma = False  # JAX's interpreter of kernels does not track axes
    environment = interpreted

    # Kernels take long to interpret: what is special to a single row is XLA's, float32 is simulated below, and
    # bfloat16 is held to less among mixed dtypes.
    @pytest.mark.parametrize("case", [slow(case) if case in ("one row", "one odd row") else case for case in CASES])
    def test_float64(self, case):
        super().test_float64(case)

    @pytest.mark.parametrize(("dtype", "tolerance"), [slow(jnp.float32, 2e-6), slow(jnp.bfloat16, 8e-3)])
    def test_lower_precisions(self, dtype, tolerance):
        super().test_lower_precisions(dtype, tolerance)

    @pytest.mark.parametrize("batch", [slow(1), 2])
    @pytest.mark.parametrize("noise", ["numbers", "nan"])
    def test_documents_are_isolated_to_the_bit(self, noise, batch):
        super().test_documents_are_isolated_to_the_bit(noise, batch)

    @pytest.mark.parametrize("chunk_size", [32])
    def test_chunk_size_changes_nothing(self, chunk_size):
        self.compare("everything", chunk_size=chunk_size)

    def test_blocks_as_on_tpu(self):
        """Three chunks of 128 tokens and two blocks of 256 channels, the last ones ragged, against the XLA backend."""
        with jax.enable_x64(True):
            arguments = {name: jnp.asarray(value) for name, value in draw(2, 300, 300, 2).items()}
            reset = mark_resets(2, 300, 7, 200) & np.array([[True], [False]])
            scans = [functools.partial(selective_scan, backend=backend) for backend in ("pallas_tpu", "xla")]
            static = {"dt_softplus": True, "reset": reset}
            cotangents = cotangents_of(arguments, jnp.float64)
            assert_close(*(values_and_gradients(scan, arguments, cotangents, **static) for scan in scans), 1e-10)

    def test_simulated(self, monkeypatch):
        """In JAX's simulator of a TPU's memories: nothing is read before it is written or outside of a buffer."""
        strict = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
        pallas_call, simulated = pl.pallas_call, []

        def simulate(*args, interpret, **options):
            simulated.append(options["name"])
            return pallas_call(*args, interpret=strict, **options)

        monkeypatch.setattr(pl, "pallas_call", simulate)
        self.compare("everything", dtype=np.float32, tolerance=2e-6)
        assert simulated == ["selective_scan_forward", "selective_scan_backward"]

    def test_mixed_dtypes(self):
        """Every array is read in its own dtype, and its gradient has it."""
        bfloat16 = {"x", "z", "B"}
        arguments = {
            name: jnp.asarray(value, jnp.bfloat16 if name in bfloat16 else jnp.float32)
            for name, value in CASES["everything"][0].items()
        }
        cotangents = cotangents_of(arguments, jnp.bfloat16)
        static = CASES["everything"][1]
        actual = values_and_gradients(
            functools.partial(selective_scan, backend="pallas_tpu", chunk_size=16), arguments, cotangents, **static
        )
        for name, value in actual.items():
            narrow = name == "y" or name[1:] in bfloat16
            assert value.dtype == (jnp.bfloat16 if narrow else jnp.float32), name
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
            assert_close(actual, values_and_gradients(sum_over_pairs, *exact, **static), 4e-3)
