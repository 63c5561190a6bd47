"""bfloat16 activations against float64: how far the hidden states of each family are off, and over what lengths."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.config import Config, load_config
from lcx.models import LanguageModel
from lcx.params import create

FAMILIES = [
    "transformer",
    "mamba",
    "mamba2",
    "samba",
    "infini",
    "infini:update=segment_delta",
    "sink",
    "sink:form=token,window=128",
]
pytestmark = pytest.mark.slow


def emphasise_recurrence(params: dict) -> None:
    """Mamba without the skip past its state, and with B, C and dt that vary more: its state is all that is measured."""
    mamba = params["stack"]["layers"]["0_mamba"]["mixers"]["mamba"]
    mamba["D"] *= 0
    mamba["x_proj"]["weight"] *= 8


def model_of(family: str, compute_dtype: str, change: Callable[[dict], None]) -> LanguageModel:
    """The tiny size; parameters are drawn in float32 whatever the dtype of the activations, and changed in place."""
    file, _, options = family.partition(":")
    config = load_config(f"configs/{file}.py:{options}").model
    config.compute_dtype = compute_dtype
    graphdef, params = create(lambda: LanguageModel(Config.from_dict({"model": config}).model, nnx.Rngs(0)))
    change(params)
    if compute_dtype == "float64":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    return nnx.merge(graphdef, params)


def hidden_of(family: str, compute_dtype: str, tokens: np.ndarray, change: Callable) -> np.ndarray:
    with jax.enable_x64(compute_dtype == "float64"):
        model = model_of(family, compute_dtype, change)
        return np.asarray(jax.jit(lambda tokens: model.hidden(tokens)[0])(tokens), np.float64)


def relative_errors(family: str, lengths: tuple[int, ...], change: Callable = lambda _: None) -> dict[int, float]:
    """||h - h64|| / ||h64|| over the first tokens of one document."""
    tokens = np.random.default_rng(0).integers(0, 256, (1, max(lengths)), np.int32)
    exact, half = (hidden_of(family, dtype, tokens, change) for dtype in ("float64", "bfloat16"))
    norm = np.linalg.norm
    return {length: norm((half - exact)[:, :length]) / norm(exact[:, :length]) for length in lengths}


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family):
    (error,) = relative_errors(family, (4096,)).values()
    print(f"\n{family}: relative error {error:.1e} at 4096 tokens")
    assert error < 2e-2


@pytest.mark.parametrize("change", [lambda _: None, emphasise_recurrence], ids=["as_it_starts", "recurrence_alone"])
def test_errors_of_a_recurrence_do_not_pile_up(change):
    errors = relative_errors("mamba", (1024, 32_768), change)
    print(f"\nmamba: relative error {errors[1024]:.2e} at 1,024 tokens, {errors[32_768]:.2e} at 32,768")
    assert errors[32_768] <= 1.2 * errors[1024]
