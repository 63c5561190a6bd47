"""The chunked memory: every backend against float64 sums over all pairs of tokens, values and all gradients.

`MemoryTests` holds what is asked of a backend; each backend is a subclass, here or in a file of its own.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lcx_kernels.backends import BackendUnavailable
from lcx_kernels.chunked_memory import SegmentState, chunked_memory, xla

EPSILON = 1e-6  # of normalised reads (arXiv 2404.07143)
FLOATS = ("q", "k", "v", "log_decay", "beta", "initial_state")


class Case(NamedTuple):
    """Shapes and options of a call; log-uniform log-decays between the two ``rates``, a head or a key channel."""

    heads: tuple[int, int, int] = (2, 2, 2)  # of q, k and v
    time: int = 33
    batch: int = 2
    widths: tuple[int, int] = (4, 6)
    rates: tuple[float, float] | None = None
    channels: bool = False
    resets: tuple[tuple[int, ...], ...] = ((), ())  # of each row
    first_positions: tuple[int, ...] | None = None  # of each row; None: positions are not given
    state: bool = True  # whether an initial state is given
    static: tuple = (("chunk_size", 8),)

    def options(self) -> dict:
        return dict(self.static)

    @property
    def normalize(self) -> bool:
        return bool(self.options().get("normalize"))

    @property
    def segmented(self) -> bool:
        return self.options().get("update") == "segment_delta" or self.options().get("read") == "exclusive"

    def positions(self) -> np.ndarray | None:
        """int32 [batch, time]."""
        if self.first_positions is None:
            return None
        return count_positions(self.reset(), self.first_positions)

    def marks(self) -> dict:
        """Borders of documents, as arguments."""
        positions = self.positions()
        return {"reset": self.reset()} | ({} if positions is None else {"positions": positions})

    def reset(self) -> np.ndarray:
        """bool [batch, time]."""
        reset = np.zeros((self.batch, self.time), bool)
        for row, places in enumerate(self.resets[: self.batch]):
            reset[row, list(places)] = True
        return reset


def count_positions(reset: np.ndarray, first: tuple[int, ...]) -> np.ndarray:
    positions = np.zeros(reset.shape, np.int32)
    positions[:, 0] = first[: len(reset)]
    for t in range(1, reset.shape[1]):
        positions[:, t] = np.where(reset[:, t], 0, positions[:, t - 1] + 1)
    return positions


def case(chunk_size: int = 8, *, static: dict | None = None, **fields) -> Case:
    return Case(**fields, static=tuple(sorted({"chunk_size": chunk_size, **(static or {})}.items())))


SCATTERED = ((5, 20), (0, 1, 32))  # resets inside of chunks; at the first token, the second and the last
RATES = (1e-4, 20.0)
INFINI = {"read": "exclusive", "normalize": True}
INFINI_DELTA = INFINI | {"update": "segment_delta"}
DELTA_RULE = {"update": "delta_rule"}

# What a kernel may or may not be able to do, one of each, on which the laws are tested ...
KINDS = {
    "linear": case(heads=(4, 2, 2), resets=SCATTERED),
    "ssd": case(heads=(2, 2, 4), rates=RATES, resets=SCATTERED),
    "gated": case(rates=RATES, channels=True, resets=SCATTERED),
    "delta_rule": case(static=DELTA_RULE, resets=SCATTERED),
    "gated_delta_rule": case(static=DELTA_RULE, heads=(2, 2, 4), rates=RATES, resets=SCATTERED),
    "infini": case(static=INFINI, heads=(4, 2, 2), first_positions=(3, 9), resets=SCATTERED),
    "infini_delta": case(static=INFINI_DELTA, heads=(4, 2, 2), first_positions=(3, 9), resets=SCATTERED),
}
# ... and more of the same kinds, by "kind, variant".
CASES = KINDS | {
    "ssd, one token": case(heads=(1, 1, 2), rates=RATES, time=1),
    "ssd, resets everywhere": case(32, heads=(1, 1, 3), rates=RATES, resets=(tuple(range(33)), (0, 32)), state=False),
    "gated, one row, normalized": case(
        16, heads=(4, 1, 2), rates=RATES, channels=True, batch=1, static={"normalize": True}
    ),
    "gated_delta_rule, channels": case(
        static=DELTA_RULE, heads=(2, 2, 4), rates=RATES, channels=True, resets=SCATTERED
    ),
    "infini, one token": case(static=INFINI, heads=(4, 2, 2), time=1, first_positions=(7, 8)),
    "infini, no positions": case(4, static=INFINI, heads=(4, 2, 2), batch=1, resets=((7,),)),
    "infini, bare": case(64, static={"read": "exclusive"}, first_positions=(63, 8), resets=SCATTERED),
    "infini, decay": case(static=INFINI, rates=RATES, first_positions=(3, 9), resets=SCATTERED),
    "infini_delta, one row": case(
        4, static=INFINI_DELTA, heads=(2, 1, 1), batch=1, first_positions=(4,), resets=((11,),), state=False
    ),
    "infini_delta, inclusive": case(
        static=INFINI_DELTA | {"read": "inclusive"}, first_positions=(3, 9), resets=SCATTERED
    ),
}


def draw(case: Case, seed: int = 0) -> dict:
    """Arguments in float64 by name. Keys of the delta rule have unit length and its beta is up to 2; what is divided
    by is positive, as feature maps make it."""
    rng = np.random.default_rng(seed)
    of_q, of_k, of_v = case.heads
    states, (K, V), shape = max(of_k, of_v), case.widths, (case.batch, case.time)
    positive = lambda *shape: rng.uniform(0.2, 2.0, shape)  # noqa: E731
    keys = positive if case.normalize else lambda *shape: rng.normal(size=shape)
    arguments = {"q": keys(*shape, of_q, K), "k": keys(*shape, of_k, K), "v": rng.normal(size=(*shape, of_v, V))}
    if case.rates:
        logs = rng.uniform(*np.log(case.rates), size=(*shape, states, *[K] * case.channels))
        arguments["log_decay"] = -np.exp(logs)
    if case.options().get("update") == "delta_rule":
        arguments["k"] /= np.linalg.norm(arguments["k"], axis=-1, keepdims=True)
        arguments["beta"] = rng.uniform(0.0, 2.0, (*shape, states))
    if case.state:
        arguments["initial_state"] = draw_state(case, rng)
    return arguments


def draw_state(case: Case, rng):
    matrix = (case.batch, max(case.heads[1:]), *case.widths)
    memory, normalizer = rng.normal(size=matrix), rng.uniform(0.2, 2.0, matrix[:3])
    if case.segmented and case.first_positions is not None:
        opened = rng.normal(size=matrix), rng.uniform(0.2, 2.0, matrix[:3])
        return SegmentState(
            memory, normalizer if case.normalize else None, opened[0], opened[1] if case.normalize else None
        )
    return (memory, normalizer) if case.normalize else memory


def sum_over_pairs(
    q, k, v, *, log_decay=None, beta=None, normalize=False, update="linear", read="inclusive", chunk_size,
    positions=None, initial_state=None, reset,
):  # fmt: skip
    """The definition without a recurrence: every token is a sum over the pairs that it forms with those before it.

    Values that depend on what was written before are the solution of one system of all tokens.
    """
    (batch, time), states = q.shape[:2], max(k.shape[2], v.shape[2])
    many = lambda array, heads: jnp.repeat(array, heads // array.shape[2], axis=2)  # noqa: E731
    k, v, group = many(k, states), many(v, states), max(1, q.shape[2] // states)
    q = many(q, states * group).reshape(batch, time, states, group, -1)
    K, V = k.shape[-1], v.shape[-1]
    if log_decay is None:
        log_decay = jnp.zeros((batch, time, states))
    rates = jnp.broadcast_to(log_decay if log_decay.ndim == 4 else log_decay[..., None], (batch, time, states, K))

    # Decays from s to t, and from the start to t; documents; segments.
    upto, after = jnp.tril(jnp.ones((time, time))), jnp.tril(jnp.ones((time, time)), -1)  # [t, r], [r, s]
    decay = jnp.exp(jnp.einsum("tr,rs,brnk->btsnk", upto, after, rates))
    document = jnp.cumsum(reset, axis=1)
    from_start = jnp.exp(jnp.cumsum(rates, axis=1)) * (document == 0)[..., None, None]
    met = (document[:, :, None] == document[:, None, :]) & (upto > 0)
    place = count_positions(np.asarray(reset), (0,) * batch) if positions is None else positions
    segment = place // chunk_size
    earlier = met & (segment[:, :, None] > segment[:, None, :])  # s is in a segment before t's
    later = (segment > segment[:, :1]) & (document == 0)  # t is in a segment after that of the initial open state
    complete = place[:, -1:] % chunk_size == chunk_size - 1
    complete = complete | (segment < segment[:, -1:]) | (positions is None)  # of the tokens of the last document

    memory, normalizer, opened, opened_normalizer = as_parts(initial_state, (batch, states, K, V))
    inclusive = read == "inclusive"

    def meet(x, pairs):  # [b, t, n, ...i, K] with all keys: [b, t, s, n, i]
        return jnp.einsum("btnik,bsnk,btsnk,bts->btsni", x, k, decay, pairs.astype(k.dtype))

    def from_state(x, part, mask=None):
        x = x * from_start[:, :, :, None]
        return jnp.einsum("btnik,bnk...->btni...", x if mask is None else x * mask[..., None, None, None], part)

    def found(x, pairs, values, with_open, mask):
        """Numerator and denominator of what x finds."""
        scores = meet(x, pairs)
        above = jnp.einsum("btsni,bsnv->btniv", scores, values) + from_state(x, memory)
        below = scores.sum(axis=2) + from_state(x, normalizer)
        if with_open:
            above, below = above + from_state(x, opened, mask), below + from_state(x, opened_normalizer, mask)
        return above, below

    x, zeros = k[:, :, :, None], jnp.zeros_like(v)
    if update != "linear":  # values = right - coefficient * (pairs of keys) values
        delta_rule = update == "delta_rule"
        pairs = met & (after > 0) if delta_rule else earlier
        above, below = found(x, pairs, zeros, not delta_rule, None if delta_rule else later)
        factor = beta if delta_rule else 1 / (below[..., 0] + EPSILON)
        system = jnp.moveaxis(factor[:, :, None] * meet(x, pairs)[..., 0], 3, 1) + jnp.eye(time)
        right = (beta[..., None] * v if delta_rule else v) - factor[..., None] * above[:, :, :, 0]
        v = jnp.moveaxis(jnp.linalg.solve(system, jnp.moveaxis(right, 2, 1)), 1, 2)

    segmented = update == "segment_delta" or not inclusive
    above, below = found(q, met if inclusive else earlier, v, segmented, None if inclusive else later)
    out = (above / (below + EPSILON)[..., None] if normalize else above).reshape(batch, time, -1, V)

    def left(mask, *initial):  # what the masked tokens of the last document wrote, as it is at the end
        mask = (mask & met[:, -1]).astype(k.dtype)
        written = jnp.einsum("bsnk,bsnv,bsnk,bs->bnkv", k, v, decay[:, -1], mask)
        keys = jnp.einsum("bsnk,bsnk,bs->bnk", k, decay[:, -1], mask)
        stays = from_start[:, -1]
        return written + stays[..., None] * initial[0], keys + stays * initial[1]

    if not segmented:
        memory, normalizer = left(met[:, -1], memory, normalizer)
        return out, (memory, normalizer) if normalize else memory
    # Is the initial open segment complete at the end?
    done = (complete & (segment == segment[:, :1]))[:, :1, None, None] | later[:, -1:, None, None]
    whole = left(complete, memory + done * opened, normalizer + done[..., 0] * opened_normalizer)
    if positions is None:
        return out, whole if normalize else whole[0]
    part = left(~complete, (~done) * opened, (~done[..., 0]) * opened_normalizer)
    return out, SegmentState(whole[0], whole[1] if normalize else None, part[0], part[1] if normalize else None)


def as_parts(state, shape):
    """Memory, normaliser, and those of the open segment, zeros where there are none."""
    matrix, vector = jnp.zeros(shape), jnp.zeros(shape[:3])
    parts = state if isinstance(state, tuple) else (state,)
    parts = tuple(parts) + (None,) * (4 - len(parts))
    return [zeros if part is None else part for part, zeros in zip(parts, (matrix, vector) * 2, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(function, case, arguments, cotangents):
    call = functools.partial(function, **case.options(), **case.marks())
    outputs, transpose = jax.vjp(lambda arguments: call(**arguments), arguments)
    return outputs, transpose(cotangents)[0]


def by_name(results) -> dict:
    outputs, gradients = results
    flat = jax.tree_util.tree_leaves_with_path({"out": outputs[0], "state": outputs[1], "d": gradients})
    return {jax.tree_util.keystr(path): value for path, value in flat}


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """The difference's norm over the norm, for each name; float64 differences of whatever dtypes."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        value, wanted = np.asarray(value, np.float64), np.asarray(expected[name], np.float64)
        assert value.shape == wanted.shape, name
        assert np.isfinite(value).all(), name
        error = np.linalg.norm(value - wanted) / max(np.linalg.norm(wanted), 1e-6)
        assert error <= tolerance, f"{name}: {error:.1e}"


def cotangents_of(case: Case, dtype, seed: int = 1):
    rng = np.random.default_rng(seed)
    heads = max(case.heads)
    out = jnp.asarray(rng.normal(size=(case.batch, case.time, heads, case.widths[1])), dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return out, jax.tree.map(lambda array: jnp.asarray(array, wide), draw_state(case, rng))


@functools.cache
def rounded(name: str, dtype):
    """The case's arguments and cotangents in ``dtype``, and what the sum over pairs makes of them in float64."""
    case = CASES[name]
    arguments = {key: value for key, value in draw(case).items()}
    state = arguments.pop("initial_state", None)
    arguments = jax.tree.map(lambda array: jnp.asarray(array, dtype), arguments)
    if state is not None:
        wide = jnp.promote_types(dtype, jnp.float32)
        arguments["initial_state"] = jax.tree.map(lambda array: jnp.asarray(array, wide), state)
    cotangents = cotangents_of(case, dtype)
    exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
    return arguments, cotangents, by_name(outputs_and_gradients(sum_over_pairs, case, *exact))


def cast(arguments, dtype):
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), arguments)


@functools.cache
def pulled(static: tuple, backend: str):
    """Jitted: (out, state) and gradients; marks of documents are arguments."""
    call = functools.partial(chunked_memory, **dict(static), backend=backend)

    @jax.jit
    def run(arguments, marks, cotangents):
        outputs, transpose = jax.vjp(lambda arguments: call(**arguments, **marks), arguments)
        return outputs, transpose(cotangents)[0]

    return run


def split_state(arguments: dict) -> tuple[dict, dict]:
    """What is per token, and the rest."""
    return (
        {key: value for key, value in arguments.items() if key != "initial_state"},
        {key: value for key, value in arguments.items() if key == "initial_state"},
    )


def long(name: str, *resets: int) -> Case:
    """The kind over 33 tokens, so that many tests share a compiled function."""
    return KINDS[name]._replace(time=33, resets=(resets,) * 2)


class MemoryTests:
    """The laws and cases of a backend; subclasses say which.

    Attributes:
      backend: its name.
      refused: names of `CASES`, or of `KINDS` for all cases of a kind, that it cannot do; it has to say so.
      check_vma: whether the axes of a shard_map around the backend are checked.
      environment: makes the context in which it can run here.
      tolerances: of float64, float32 and bfloat16.
    """

    backend: str
    refused: frozenset[str] = frozenset()
    check_vma = True
    environment = contextlib.nullcontext
    tolerances = {jnp.float64: 1e-9, jnp.float32: 1e-5, jnp.bfloat16: 1e-2}

    @pytest.fixture(autouse=True)
    def _environment(self):
        with jax.enable_x64(True), type(self).environment():
            yield

    def can(self, name: str) -> bool:
        """Whether the backend can do the case; where it cannot, that it says so."""
        if name not in self.refused and name.split(",")[0] not in self.refused:
            return True
        case = CASES[name]
        call = functools.partial(chunked_memory, **case.options(), **case.marks())
        with pytest.raises(BackendUnavailable, match=self.backend):
            jax.eval_shape(lambda arguments: call(**arguments, backend=self.backend), cast(draw(case), jnp.float32))
        return False

    def compare(self, name: str, dtype=jnp.float64) -> None:
        if not self.can(name):
            return
        arguments, cotangents, expected = rounded(name, dtype)
        actual = by_name(self.pull(CASES[name], arguments, cotangents))
        wide = jnp.promote_types(dtype, jnp.float32)
        for key, value in actual.items():
            assert value.dtype == (wide if "state" in key else dtype), key
        assert_close(actual, expected, self.tolerances[dtype])

    @pytest.mark.parametrize("name", CASES)
    def test_float64(self, name):
        self.compare(name)

    @pytest.mark.parametrize("name", ["ssd", "gated", "gated_delta_rule", "infini_delta"])
    def test_float32(self, name):
        self.compare(name, jnp.float32)

    @pytest.mark.parametrize("name", ["ssd", "gated", "infini"])
    def test_bfloat16(self, name):
        self.compare(name, jnp.bfloat16)

    def pull(self, case: Case, arguments, cotangents, marks=None):
        marks = case.marks() if marks is None else marks
        return pulled(case.static, self.backend)(arguments, marks, cotangents)

    @pytest.mark.parametrize("noise", [2.0, np.nan])
    @pytest.mark.parametrize("name", KINDS)
    def test_documents_are_isolated_to_the_bit(self, name, noise):
        """Other numbers, or NaN, in other documents and in the initial state change nothing between two resets."""
        if not self.can(name):
            return
        case, inside = long(name, 7, 19), slice(7, 19)
        arguments, (d_out, d_state) = cast(draw(case), jnp.float64), cotangents_of(case, jnp.float64)

        def changed(array):
            return (array * noise).at[:, inside].set(array[:, inside])

        def changed_state(state):
            return jax.tree.map(lambda part: part * noise, state)

        tokens, rest = split_state(arguments)
        (out, _), gradients = self.pull(case, arguments, (d_out, d_state))
        others = {key: changed(value) for key, value in tokens.items()} | changed_state(rest)
        (other, _), other_gradients = self.pull(case, others, (changed(d_out), changed_state(d_state)))
        np.testing.assert_array_equal(out[:, inside], other[:, inside])
        assert not np.array_equal(out[:, 19:], other[:, 19:])
        for key in tokens:
            np.testing.assert_array_equal(gradients[key][:, inside], other_gradients[key][:, inside], err_msg=key)

    @pytest.mark.parametrize("name", KINDS)
    def test_the_future_is_unseen_to_the_bit(self, name):
        """Of what comes later not even a NaN is seen, and what reads it is NaN."""
        if not self.can(name):
            return
        case = long(name)
        arguments, cotangents = cast(draw(case), jnp.float64), cotangents_of(case, jnp.float64)
        tokens, rest = split_state(arguments)
        (out, _), _ = self.pull(case, arguments, cotangents)
        later = {key: value.at[:, 11].set(jnp.nan) for key, value in tokens.items()}
        (other, state), _ = self.pull(case, later | rest, cotangents)
        np.testing.assert_array_equal(out[:, :11], other[:, :11])
        assert np.isnan(np.asarray(other)[:, 20:]).any(axis=-1).all()
        assert np.isnan(np.asarray(jax.tree.leaves(state)[0])).any()

    @pytest.mark.parametrize("name", KINDS)
    def test_a_row_may_be_cut_anywhere(self, name):
        """Stretch by stretch, each from the state that the one before left: outputs, states and gradients of one call.

        Gradients of the later stretches go back through the states.
        """
        if not self.can(name):
            return
        case, size = long(name), 11
        arguments, (d_out, d_state) = cast(draw(case), jnp.float64), cotangents_of(case, jnp.float64)
        tokens, rest = split_state(arguments)
        rng = np.random.default_rng(0)
        for resets in ((), (11,), (3, 4, 21, 22), tuple(rng.choice(case.time, 5, replace=False))):
            marks = case._replace(resets=(resets, resets[1:])).marks()
            whole = self.pull(case, arguments, (d_out, d_state), marks)
            parts = [jax.tree.map(lambda a: a[:, i : i + size], (tokens, marks, d_out)) for i in range(0, 33, size)]  # noqa: B023, E501
            state, states, outs, found = rest["initial_state"], [], [], []
            for part, part_marks, d_part in parts:
                states.append(state)
                zeros = jax.tree.map(jnp.zeros_like, state)
                (out, state), _ = self.pull(case, part | {"initial_state": state}, (d_part, zeros), part_marks)
                outs.append(out)
            back = d_state
            for (part, part_marks, d_part), before in zip(reversed(parts), reversed(states), strict=True):
                _, gradients = self.pull(case, part | {"initial_state": before}, (d_part, back), part_marks)
                back = gradients.pop("initial_state")
                found.insert(0, gradients)
            found = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *found) | {"initial_state": back}
            outputs = jnp.concatenate(outs, axis=1), state
            assert_close(by_name((outputs, found)), by_name(whole), 1e-10)

    @pytest.mark.parametrize("name", ["ssd", "gated", "gated_delta_rule"])
    def test_decays_from_nothing_to_everything(self, name):
        """No log-decay overflows; with those of minus infinity the memory holds the last token alone."""
        if not self.can(name):
            return
        case = long(name)
        arguments, cotangents = cast(draw(case), jnp.float32), cotangents_of(case, jnp.float32)
        shape = arguments["log_decay"].shape
        rates = np.array([0.0, 1e-30, 1e-3, 20.0, 1e4, 1e30, 1e38, np.inf])
        mixed = -jnp.asarray(np.random.default_rng(2).choice(rates, shape), jnp.float32)
        for key, value in by_name(self.pull(case, arguments | {"log_decay": mixed}, cotangents)).items():
            assert np.isfinite(value).all(), key
        all_of_it = arguments | {"log_decay": jnp.full(shape, -jnp.inf)}
        (_, state), _ = self.pull(case, all_of_it, cotangents)
        k, v = (np.repeat(arguments[key][:, -1], shape[2] // arguments[key].shape[2], axis=1) for key in "kv")
        v = v * arguments["beta"][:, -1, :, None] if "beta" in arguments else v
        np.testing.assert_allclose(state, k[..., None] * v[..., None, :], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", ["ssd", "gated", "gated_delta_rule"])
    def test_small_decays_after_a_large_one_keep_their_digits(self, name):
        """Differences of sums from the head of a chunk would have lost them."""
        if not self.can(name):
            return
        case = long(name)._replace(rates=(1e-3, 1e-1))
        arguments, cotangents = draw(case), cotangents_of(case, jnp.float32)
        arguments["log_decay"][:, ::8] = -9000.0
        arguments = cast(arguments, jnp.float32)
        actual = self.pull(case, arguments, cotangents)
        exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
        expected = pulled(case.static, "reference")(exact[0], case.marks(), exact[1])
        for results in (actual, expected):  # next to 0, or of what underflows
            del results[1]["initial_state"]
        assert_close(by_name(actual), by_name(expected), self.tolerances[jnp.float32])

    @pytest.mark.parametrize("name", ["ssd", "infini_delta"])
    def test_inside_shard_map(self, name):
        """Over batch and heads; also what is made inside, such as an absent initial state."""
        if not self.can(name):
            return
        case = long(name, 4)
        arguments, (d_out, d_state) = cast(draw(case), jnp.float64), cotangents_of(case, jnp.float64)
        zeros = jax.tree.map(jnp.zeros_like, (arguments["initial_state"], d_state))
        _, expected = self.pull(case, arguments | {"initial_state": zeros[0]}, (d_out, zeros[1]))
        tokens, marks = split_state(arguments)[0], case.marks()
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
        heads, row = PartitionSpec("data", None, "tensor"), PartitionSpec("data")

        def sharded(tokens, marks):
            return chunked_memory(**tokens, **marks, **case.options(), backend=self.backend)[0]

        specs = {key: heads for key in tokens}, {key: row for key in marks}
        mapped = jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=self.check_vma)
        found = jax.jit(jax.grad(lambda tokens: jnp.sum(mapped(tokens, marks) * d_out)))(tokens)
        assert_close(found, split_state(expected)[0], 1e-10)


class TestReference(MemoryTests):
    backend = "reference"
    # What JAX does for it.
    test_float32 = test_bfloat16 = test_decays_from_nothing_to_everything = test_inside_shard_map = None
    test_small_decays_after_a_large_one_keep_their_digits = None


class TestXla(MemoryTests):
    backend = "xla"

    @pytest.mark.parametrize("name", ["ssd", "infini_delta"])
    def test_blocks(self, name, monkeypatch):
        """Several blocks, of which each is computed again in the backward pass."""
        monkeypatch.setitem(xla.NUMBERS_AT_ONCE, "cpu", 1)
        pulled.cache_clear()
        self.compare(name)
        pulled.cache_clear()

    def test_temporaries_are_states_between_chunks(self):
        """What the gradient's temporaries grow by: the states between blocks, here of 1024 tokens, and little else."""

        def temporaries(time):
            kind = case(16, heads=(1, 1, 4), widths=(32, 32), batch=1, rates=RATES, time=time)
            arguments = cast(split_state(draw(kind))[0], jnp.float32)
            loss = lambda arguments: jnp.sin(chunked_memory(**arguments, chunk_size=16, backend="xla")[0]).sum()  # noqa: E731
            compiled = jax.jit(jax.grad(loss)).lower(arguments).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        short, long = temporaries(4096), temporaries(16384)
        d_out, states = 12288 * 4 * 32 * 4, 12 * 4 * 32 * 32 * 4
        assert long - short < 2 * d_out + 1.5 * states


BACKENDS = ["reference", "xla"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update, factors", [("linear", [0, 1, 1, 1, 1]), ("segment_delta", [0, 1, 0.5, 0.5, 0.5])])
def test_the_same_pair_in_every_segment(update, factors, backend):
    """One key and value stored n times: linear reads v whatever n; segment_delta v once, v/2 ever after, since its
    second segment adds nothing along the key while the normaliser grows."""
    length, K, V = 3, 3, 5
    time = length * len(factors)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        key, value = rng.uniform(0.5, 1.5, (K,)), rng.normal(size=(V,))
        first = np.arange(time) % length == 0  # the other tokens write nothing
        q, v = np.broadcast_to(key, (1, time, 1, K)), np.broadcast_to(value, (1, time, 1, V))
        k = np.where(first[None, :, None, None], key, 0)
        options = dict(chunk_size=length, normalize=True, update=update, read="exclusive", backend=backend)
        out, (_, normalizer) = chunked_memory(q, k, v, **options)
    np.testing.assert_allclose(out[0, :, 0], np.repeat(factors, length)[:, None] * value, atol=3e-6)
    np.testing.assert_allclose(normalizer[0, 0], len(factors) * key)  # the last segment too is complete


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_delta_rule_overwrites(backend):
    """A key of unit length and beta 1: the memory holds the last value alone; beta 2 mirrors what it held."""
    key, (old, new) = jnp.asarray([0.6, 0.8]), jnp.asarray([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0]])
    k, v = jnp.broadcast_to(key, (1, 2, 1, 2)), jnp.stack([old, new])[None, :, None]
    for beta, expected in ((1.0, new), (2.0, 2 * new - old)):
        options = dict(update="delta_rule", chunk_size=2, backend=backend)
        out, state = chunked_memory(k, k, v, beta=jnp.asarray([[[1.0], [beta]]]), **options)
        np.testing.assert_allclose(out[0, 1, 0], expected, rtol=1e-6)
        np.testing.assert_allclose(state[0, 0], key[:, None] * expected, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_memory_reads_zero_exactly_and_has_finite_gradients(backend):
    arguments = cast(split_state(draw(KINDS["infini"]))[0], jnp.float32)
    tiny = arguments | {"q": jnp.full_like(arguments["q"], 1e-30)}
    options = {**INFINI, "chunk_size": 64, "backend": backend}

    def total(q):
        return chunked_memory(**(tiny | {"q": q}), **options)[0].sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(tiny["q"])
    assert value == 0 and np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_too_long_for_the_delta_rule_spoil_their_document_alone(backend):
    """What overflows stays in its document."""
    case = KINDS["delta_rule"]._replace(time=16, resets=((6,), (6,)), state=False)
    arguments = cast(draw(case), jnp.float32)
    call = functools.partial(chunked_memory, **case.options(), reset=case.reset(), backend=backend)
    good, bad = (call(**arguments | {"k": arguments["k"].at[:, 2:6].mul(factor)}) for factor in (1, 1e15))
    np.testing.assert_array_equal(good[0][:, 6:], bad[0][:, 6:])
    np.testing.assert_array_equal(good[1], bad[1])
    assert np.isnan(np.asarray(bad[0][:, 5])).all()


def test_mistakes_are_named():
    case = KINDS["infini"]
    good = draw(case) | case.options() | case.marks()
    state, places = good["initial_state"], case.positions()
    bad = {
        "k: shape": {"k": good["k"][:, :3]},
        "v: shape": {"v": good["v"][:, :3]},
        "k: 2 heads": {"q": good["q"][:, :, :3], "v": np.concatenate([good["v"]] * 2, axis=2)[:, :, :3]},
        "q: 3 heads": {"q": good["q"][:, :, :3]},
        "q: shape": {"q": good["q"][0]},
        "log_decay: shape": {"log_decay": good["k"][..., :2]},
        "log_decay: int": {"log_decay": np.zeros(good["k"].shape[:3], np.int32)},
        "positions: float": {"positions": places.astype(np.float32)},
        "reset: int": {"reset": places},
        "chunk_size: 0": {"chunk_size": 0},
        "update: unknown name 'delta'": {"update": "delta"},
        "read: unknown name": {"read": "all"},
        "beta: given": {"beta": good["k"][..., 0]},
        "beta: missing": {"update": "delta_rule"},
        "normalize=True": {"update": "delta_rule", "beta": good["k"][..., 0]},
        "log_decay given, expected": {"update": "segment_delta", "log_decay": -good["k"]},
        "normalize=False": {"update": "segment_delta", "normalize": False},
        "initial_state.normalizer: shape": {"initial_state": state._replace(normalizer=good["v"])},
        "normalizer missing": {"initial_state": state.memory},
        "normalizer given": {"normalize": False},
        "a tuple of 3": {"initial_state": tuple(state)[:3]},
        "at least one token": {name: good[name][:, :0] for name in ("q", "k", "v", "positions", "reset")},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            chunked_memory(**(good | change))
    with pytest.raises(BackendUnavailable, match="triton"):
        chunked_memory(**good, backend="triton")
