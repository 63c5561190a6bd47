"""The FLOPs that mixers and models state, against XLA's own count of small programs.

XLA counts what a program does, a model's FLOPs are what it has to do. They are compared where these are the same:

* XLA counts a scan's body once, whatever its length: every scan is unrolled here.
* A dense backend computes pairs of tokens only to mask them. One token on a state that is exactly full (of full
  attention, of a window old enough, at the end of a segment) has none to mask, and flops(t + 1) - flops(t) is what it
  adds; mixers that mask nothing are counted over whole chunks.
* A compiler repeats cheap operations in several fusions: the count is of the program before XLA's optimisations.
* XLA counts selections and activations, which are no model FLOPs: widths and heads are such that products dominate.
  What is small beside them all the same (convolution, scan, memory) is also compared by itself.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lcx.config import load_config
from lcx.mixers import MIXERS, Context, Mixer, ModelDims, build_mixer, find_mixer
from lcx.mixers.mlp import MLP
from lcx.models import LanguageModel
from lcx.params import split

D_MODEL, INNER = 256, 512
HEADS = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "backend": "reference"}
FULL = {"type": "attention"} | HEADS
WINDOW = FULL | {"window": 256}
MAMBA = {"type": "mamba", "backend": "reference"}
MAMBA2 = {"type": "mamba2", "head_dim": 64, "state_size": 32, "num_groups": 2, "backend": "reference"}
AVERAGE = {"type": "examples.moving_average:MovingAverage"}
# The reference closes segments token by token, elementwise work on each memory: many query heads read one.
FEW_MEMORIES = HEADS | {"num_heads": 16, "num_kv_heads": 1}
INFINI = {"type": "infini", "segment_length": 64} | FEW_MEMORIES
DELTA = INFINI | {"update": "segment_delta"}

CHUNKS = [{"type": "mlp", "d_ff": 640}, MAMBA, MAMBA | {"dt_B_C_norm": True, "dt_rank": 128}, MAMBA2, AVERAGE]
STEPS = [  # and after how many tokens one more sees all that the state holds
    (FULL, (0, 100, 1023)),
    (FULL | {"num_kv_heads": 8, "sink": "logit"}, (0, 1023)),
    (WINDOW | {"qk_norm": True}, (255, 1000)),
    (WINDOW | {"sink": "zero", "sink_tokens": 64}, (320, 1000)),
    (INFINI, (127, 191)),
    (DELTA, (127, 191)),
    (MAMBA, (100,)),
    (MAMBA2, (100,)),
    (AVERAGE, (100,)),
]
FAMILIES = [
    "transformer.py",
    "mamba.py",
    "mamba2.py",
    "samba.py",
    "samba.py:full_attention=1",
    "infini.py:update=segment_delta",
    "sink.py:form=logit",
    "sink.py:form=token,window=60",
]


@pytest.fixture
def xla_flops(monkeypatch):
    """A function from a program and its arguments, or their shapes, to FLOPs by XLA's count, scans unrolled."""

    def scan(step, carry, xs=None, length=None, **_):
        outputs = []
        for index in range(jax.tree.leaves(xs)[0].shape[0] if length is None else length):
            carry, y = step(carry, jax.tree.map(lambda leaf: leaf[index], xs))  # noqa: B023
            outputs.append(y)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def count(program, *arguments):
        monkeypatch.setattr(jax.lax, "scan", scan)
        lowered = jax.jit(lambda *args: program(*args)).lower(*arguments)  # a function that was never traced before
        assert "stablehlo.while" not in lowered.as_text()
        return lowered.cost_analysis()["flops"]

    return count


def label(value):
    """A name for a test: what sets a mixer's record apart."""
    if not isinstance(value, dict):
        return str(value)
    options = [f"{name}={option}" for name, option in value.items() if HEADS.get(name) != option and name != "type"]
    return " ".join([value["type"].rpartition(":")[2], *options])


def assert_equal(ours, xla):
    """A model's FLOPs are at most a program's, and nearly all of them."""
    assert 0.96 < ours / xla <= 1, f"{ours:,} stated, {xla:,.0f} by XLA's count: {ours / xla:.3f}"


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mixer(record):
    return nnx.eval_shape(lambda: build_mixer("mine", record, ModelDims(D_MODEL, sublayers=2), nnx.Rngs(0)))


def program_of(record, time, held=0):
    """One row of `time` tokens through a mixer after `held` others: a function and its abstract arguments."""
    found = mixer(record)
    graphdef, params = split(found)
    state = jax.eval_shape(lambda: found.init_state(1, held + time)) if held else None

    def run(params, x, state, positions):
        context = Context(positions, jnp.ones_like(positions), jnp.full((1,), held, jnp.int32))
        return nnx.merge(graphdef, params)(x, state, context)[:2]

    return run, params, floats(1, time, D_MODEL), state, jax.ShapeDtypeStruct((1, time), jnp.int32)


@pytest.mark.parametrize("record", CHUNKS, ids=label)
def test_chunk(record, xla_flops):
    assert_equal(mixer(record).flops(8), xla_flops(*program_of(record, 8)))


@pytest.mark.parametrize("record, held", [(record, held) for record, depths in STEPS for held in depths], ids=label)
def test_one_token_more(record, held, xla_flops):
    flops = mixer(record).flops
    assert_equal(flops(held + 1) - flops(held), xla_flops(*program_of(record, 1, held)))


def test_every_mixer_of_the_table_is_counted():
    assert set(MIXERS) <= {record["type"] for record in (*CHUNKS, *(record for record, _ in STEPS))}


def difference(record, **more):
    """What a change of options adds to 64 tokens."""
    return mixer(record | more).flops(64) - mixer(record).flops(64)


def convolution(x, weight):
    return sum(x[:, j : j + 64] * weight[j] for j in range(32))


def scan_step(h, x, dt, A, B, C, D):
    h = jnp.exp(dt[:, :, None] * A) * h + (dt * x)[:, :, None] * B[:, None, :]
    return h, (h * C[:, None, :]).sum(axis=-1) + D * x


def ssd_step(S, log_decay, k, q, v):
    S = jnp.exp(log_decay)[..., None, None] * S + k[..., :, None] * v[..., None, :]
    return S, (S * q[..., :, None]).sum(axis=-2)


def read(q, memory, normalizer):
    return jnp.einsum("thk,kv->thv", q, memory), jnp.einsum("thk,k->th", q, normalizer)


def write(k, v):
    return jnp.einsum("tk,tv->kv", k, v), jnp.einsum("tk->k", k)


MEMORY = floats(64, 64), floats(64)
PIECES = {
    "convolution": (
        lambda: difference(MAMBA, conv_width=4 + 32),
        (convolution, floats(1, 95, INNER), floats(32, INNER)),
    ),
    "convolutions of Mamba-2": (
        lambda: difference(MAMBA2, conv_width=4 + 32),
        (convolution, floats(1, 95, INNER + 2 * 2 * 32), floats(32, INNER + 2 * 2 * 32)),
    ),
    "scan": (  # x_proj makes B and C
        lambda: difference(MAMBA, state_size=16 + 48) - 64 * 2 * INNER * 2 * 48,
        (
            scan_step,
            floats(64, INNER, 48),
            *(floats(64, INNER), floats(64, INNER)),
            floats(INNER, 48),
            *(floats(64, 48), floats(64, 48)),
            floats(INNER),
        ),
    ),
    "recurrence of Mamba-2": (  # besides, B and C are projected and convolved
        lambda: difference(MAMBA2, state_size=32 + 48) - 64 * 2 * (D_MODEL + 4) * 2 * 2 * 48,
        (ssd_step, floats(64, 8, 48, 64), floats(64, 8), *[floats(64, 8, 48)] * 2, floats(64, 8, 64)),
    ),
    "memory write": (
        lambda: mixer(INFINI).flops(64) - mixer({"type": "attention"} | FEW_MEMORIES).flops(64),
        (write, floats(64, 64), floats(64, 64)),
    ),
    "memory read": (
        lambda: mixer(INFINI).flops(128) - 2 * mixer(INFINI).flops(64),
        (read, floats(64, 16, 64), *MEMORY),
    ),
    "memory delta": (
        lambda: mixer(DELTA).flops(128) - mixer(INFINI).flops(128),
        (read, floats(64, 1, 64), *MEMORY),
    ),
}


@pytest.mark.parametrize("name", PIECES)
def test_piece(name, xla_flops):
    """Parts that are too small beside the projections for the tests above, against their equations without masks."""
    ours, program = PIECES[name]
    assert ours() == pytest.approx(xla_flops(*program), rel=0.02)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 10, 11, 12, 30])
def test_pairs_are_those_that_see_each_other(tokens):
    """Also early in a document, where a program would mask: counted one by one."""
    full = mixer(FULL).flops
    pair = full(2) - 2 * full(1)  # three pairs less two
    token = full(1) - pair
    distance = [(i, j) for i in range(tokens) for j in range(i + 1)]
    windowed = sum(i - j < 8 or j < 3 for i, j in distance)
    segmented = sum(i // 8 == j // 8 for i, j in distance)
    assert full(tokens) == tokens * token + len(distance) * pair
    assert mixer(FULL | {"window": 8, "sink_tokens": 3}).flops(tokens) == tokens * token + windowed * pair
    infini = mixer({"type": "infini", "segment_length": 8} | HEADS).flops
    access = infini(1) - full(1)  # of two memories; eight heads read, once a segment is complete
    memory = tokens * access + max(0, tokens - 8) * 4 * access
    assert infini(tokens) == tokens * token + segmented * pair + memory


def wide_model(argument, **fields):
    """A family's tiny size, abstract, wider until products dominate, with states that are full after 128 tokens."""
    config = load_config(f"configs/{argument}").model
    config.update(d_model=D_MODEL, periods=2, vocab_size=4096, **fields)
    options = HEADS | {"segment_length": 64, "d_ff": 640}
    with config.unlocked():
        for record in config.mixers.values():
            known = find_mixer(record["type"]).Options.__dataclass_fields__
            record.update({name: value for name, value in options.items() if name in known})
            if record.get("window"):
                record["window"] = 64
    return nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("argument", FAMILIES)
def test_language_model(argument, tied, xla_flops):
    model = wide_model(argument, tie_embeddings=tied)
    graphdef, params = split(model)
    state = jax.eval_shape(lambda: model.init_state(1, 128))
    run = lambda params, tokens, state: nnx.merge(graphdef, params)(tokens, state)[:2]  # noqa: E731
    counted = xla_flops(run, params, jax.ShapeDtypeStruct((1, 1), jnp.int32), state)
    assert_equal(model.flops(128) - model.flops(127), counted)


def test_a_mixer_that_does_not_know_makes_the_model_unknown(monkeypatch):
    model = wide_model("samba.py")
    assert model.flops(10) > 0
    monkeypatch.setattr(MLP, "flops", Mixer.flops)
    assert model.stack.flops(10) is None and model.flops(10) is None
