"""Layers taken by chunks of time: the same results and gradients, in memory that hardly grows with the sequence."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from lcx import laws
from lcx.benchmarks.memory import layer_temporaries
from lcx.config import MeshConfig, ModelConfig
from lcx.errors import UserError
from lcx.laws.measure import together
from lcx.mixers import Context, Mixer
from lcx.models import LanguageModel
from lcx.models.remat import check_time_remat, rematerialize
from lcx.parallel.mesh import make_mesh
from lcx.parallel.sharding import on_mesh
from lcx.params import split
from lcx_kernels.residuals import KERNEL

TIME = 16
HEADS = {"num_heads": 4, "num_kv_heads": 2}
MIXERS = {
    "infini": {"type": "infini", **HEADS, "segment_length": 4, "update": "segment_delta"},
    "mamba": {"type": "mamba", "state_size": 4, "chunk_size": 4},
    "mamba2": {"type": "mamba2", "state_size": 4, "chunk_size": 4, "head_dim": 16},
    "swa": {"type": "attention", **HEADS, "window": 7, "sink_tokens": 2, "sink": "logit"},
    "mlp": {"type": "mlp", "d_ff": 48},
    "full": {"type": "attention", **HEADS},
}


def model(pattern: str, dtype: str = "float64", **remat: str) -> ModelConfig:
    dtypes = dict(param_dtype=dtype, compute_dtype=dtype, residual_dtype=dtype)
    values = dict(pattern=pattern, mixers=MIXERS, d_model=32, vocab_size=32, remat=remat)
    return ModelConfig.from_dict(values | dtypes)


def compare(pattern: str, sizes: dict[str, int], mesh=None) -> float:
    """Outputs, states and all gradients beside those without remat, from a state that holds tokens and from none."""
    with jax.enable_x64(True):
        plain = laws.stack_subject("plain", model(pattern, **dict.fromkeys(sizes, "none")))
        remat = {name: f"time:{size}" for name, size in sizes.items()}
        subject = laws.stack_subject("by chunks", model(pattern, **remat))
        rows = [[TIME], [5, 1, 10], [3, 13], [12, 4]]
        chunk = laws.pack(subject, rows, [3, 0, 2, 0], [7, 0, 3, 5], [0, 1, 0, 0], seed=0)
        chunks = {"from a state": chunk, "from none": laws.from_nothing(subject, chunk)}
        return together({name: laws.backend(subject, plain, chunk) for name, chunk in chunks.items()})


def test_nothing_but_memory_changes():
    """Chunks of 5 of 16 tokens, and one that is left over."""
    found = compare("mamba", {"mamba": 5})
    assert found.value < 1e-9, found


def gradient(pattern: str, **remat: str):
    """The traced gradient of a model's logits."""
    graphdef, params = split(nnx.eval_shape(lambda: LanguageModel(model(pattern, "float32", **remat), nnx.Rngs(0))))
    loss = lambda params, tokens: jnp.sum(nnx.merge(graphdef, params)(tokens)[0])  # noqa: E731
    tokens = jax.ShapeDtypeStruct((1, TIME), jnp.int32)
    return jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr


def count(jaxpr, counted) -> int:
    """How many equations of a traced program and all that it calls are counted."""
    inner = (inside for equation in jaxpr.eqns for inside in jaxprs_in_params(equation.params))
    return sum(map(counted, jaxpr.eqns)) + sum(count(inside, counted) for inside in inner)


def is_named(equation) -> bool:
    return equation.primitive.name == "name" and equation.params["name"] == KERNEL


@pytest.mark.parametrize("pattern", ["infini", "mamba", "mamba2", "swa", "full"])
def test_kernels_run_again_under_full_alone(pattern):
    """Each run of a kernel's forward pass names those of its results that are used."""
    none, default, dots, full = (
        count(gradient(pattern, **remat), is_named)
        for remat in ({pattern: "none"}, {}, {pattern: "dots"}, {pattern: "full"})
    )
    assert 0 < none == default == dots < full


def test_what_is_kept_in_the_host_is_what_is_kept():
    """The same gradients to the bit. On CPU there is but one memory; what is traced says what goes to which."""
    tokens = jnp.arange(TIME, dtype=jnp.int32)[None]

    def gradients(policy: str):
        graphdef, params = split(LanguageModel(model("swa mlp", "float32", swa=policy, mlp=policy), nnx.Rngs(0)))
        loss = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(tokens)[0]))))
        return loss(params), str(jax.make_jaxpr(loss)(params))

    (kept, _), (moved, program) = gradients("dots"), gradients("offload")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), kept, moved)))
    assert "<host>" in program


@pytest.mark.parametrize("pattern", ["infini", "mamba", "mamba2", "swa", "full"])
def test_shards_send_again_under_full_alone(pattern):
    """Halos and states are kept with what kernels give. Of full attention the ring is not run again, but queries and
    keys are dealt out again: to keep both orders of them would take more memory than it saves time.
    """
    with on_mesh(make_mesh(MeshConfig(seq=4), jax.devices()[:4])):
        none, dots, full = (
            count(gradient(pattern, **{pattern: policy}), lambda equation: equation.primitive.name == "ppermute")
            for policy in ("none", "dots", "full")
        )
    assert 0 < none <= dots < full
    assert dots == none or pattern == "full"


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern, size",
    [
        ("infini", 1),
        ("infini", 4),
        ("infini", 7),
        ("infini", 16),
        ("mamba", 50),
        ("mamba", 1),
        ("mamba2", 7),
        ("swa", 7),
    ]
    + [("parallel(infini, mamba) mlp", 7)],
)
def test_each_mixer_by_chunks(pattern, size):
    found = compare(pattern, {name: size for name in re.findall(r"[a-z]+2?", pattern) if name in MIXERS})
    assert found.value < 1e-9, found


def test_temporaries_hardly_grow_with_the_sequence():
    """Infini's layer in small: chunks of two segments, of which a sequence has 2 or 8."""
    sizes = dict(heads=2, width=8, segment=64)
    short, long = (layer_temporaries("linear", time, "time:128", **sizes) for time in (256, 1024))
    assert long < 1.6 * short, (short, long)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["linear", "segment_delta"])
def test_temporaries_at_length(update):
    short, long = (layer_temporaries(update, time, "time:4096") for time in (8192, 32_768))
    assert long <= 1.5 * short, (short, long)


def test_a_growing_state_is_refused():
    with pytest.raises(UserError, match=r'model.remat.full="time:8": this mixer\'s state grows with the sequence'):
        nnx.eval_shape(lambda: LanguageModel(model("full mlp", "float32", full="time:8"), nnx.Rngs(0)))


def test_a_mixer_that_cannot_go_on_is_refused():
    class Whole(Mixer):
        lawful_except = ("continuation",)

        def __init__(self):
            pass

    with pytest.raises(UserError, match="declares that it cannot go on from a state"):
        check_time_remat("whole", "time:8", Whole())


def test_losses_of_a_mixer_are_refused():
    """Which mean of its chunks' losses is the sequence's, nobody has said."""
    x, ids = jnp.zeros((1, 8, 4)), jnp.ones((1, 8), jnp.int32)
    run = lambda params, x, state, context: (x, state, {"losses": {"balance": x.sum()}})  # noqa: E731
    with pytest.raises(UserError, match='is not for mixers with losses of their own; choose "full"'):
        rematerialize(run, "time:4", lambda batch, tokens: {})({}, x, None, Context(ids, ids, jnp.zeros(1, jnp.int32)))
