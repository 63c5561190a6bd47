"""What the laws are applied to: a sequence function with parameters, and its pullback."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lcx.config import ModelConfig
from lcx.mixers import Context, Mixer, ModelDims
from lcx.models import LanguageModel
from lcx.parallel.sharding import DEFAULT_RULES, Rules, divisible_spec, on_mesh, parameter_shardings
from lcx.params import create, declarations


@dataclass(frozen=True)
class Pull:
    """A chunk's results and what the cotangents of its results became, as NumPy arrays."""

    y: np.ndarray  # [batch, time, d_model]
    state: Any  # after the chunk
    params_gradient: dict
    x_gradient: np.ndarray  # [batch, time, d_model]
    state_gradient: Any  # of the state before the chunk; None where that was None


@dataclass(frozen=True)
class Subject:
    """A mixer as a pure function of its parameters.

    `batch_axis` is the batch's axis in the state's arrays: 0 in a mixer, 1 in a stack, whose states are stacked over
    the periods. It computes where its caller does, or on a mesh of its own (`on`).
    """

    name: str
    apply: Callable[[dict, jax.Array, Any, Context], tuple[jax.Array, Any]]
    params: dict
    init_state: Callable[[int, int], Any]
    d_model: int
    dtype: str
    batch_axis: int = 0
    positive: Callable[[tuple], bool] = lambda path: False  # of a leaf of the state: it holds no negative numbers
    declared: dict | None = None  # the parameters' `Declaration`s, from which their layout on a mesh follows
    mesh: Mesh | None = None
    rules: Rules = DEFAULT_RULES
    _compiled: dict = field(default_factory=dict, compare=False)

    def pull(self, x: np.ndarray, state: Any, context: Context, dy: np.ndarray, dstate: Any = None) -> Pull:
        """Runs a chunk and pulls cotangents back through it; compiled once for each length.

        Args:
          x, dy: [batch, time, d_model]; dy is the cotangent of y.
          state: the state before the chunk, or None.
          dstate: the cotangent of the state after it; None is zero.
        """
        rules = repr(self.rules)  # JAX compiles anew for another mesh, but knows nothing of rules
        pull = self._compiled.setdefault(rules, jax.jit(self._pull))
        if dstate is None:  # zeros rather than another program
            dstate = jax.tree.map(np.zeros_like, state)
        if self.mesh is None:
            return Pull(*jax.device_get(pull(self.params, x, state, context, dy, dstate)))
        tokens, states = ("batch", "time"), (None,) * self.batch_axis + ("batch",)
        places = zip((x, state, context, dy, dstate), (tokens, states, tokens, tokens, states), strict=True)
        with on_mesh(self.mesh, self.rules):
            arguments = [self._placed(tree, axes) for tree, axes in places]
            return Pull(*jax.device_get(pull(self.params, *arguments)))

    def on(self, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Self:
        """The same subject on a mesh, with parameters and inputs laid out as in a run."""
        shardings = parameter_shardings(self.params, self.declared, mesh, rules)
        return replace(self, mesh=mesh, rules=rules, params=jax.device_put(self.params, shardings))

    def _placed(self, tree: Any, axes: tuple[str | None, ...]) -> Any:
        """Arrays on the mesh, by the logical axes that they begin with."""

        def place(leaf: np.ndarray) -> jax.Array:
            known = (*axes, *[None] * leaf.ndim)[: leaf.ndim]
            return jax.device_put(leaf, NamedSharding(self.mesh, divisible_spec(leaf.shape, known, self.mesh)))

        return jax.tree.map(place, tree)

    def take_rows(self, state: Any, rows: Any) -> Any:
        """The given rows of a state, in the given order."""
        return jax.tree.map(lambda leaf: np.take(leaf, rows, axis=self.batch_axis), state)

    def draw_state(self, random: np.random.Generator, batch_size: int, max_length: int) -> Any:
        """A state filled with random numbers, also beyond the tokens that it is said to hold."""

        def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            values = random.normal(size=leaf.shape)
            return (np.abs(values) if self.positive(path) else values).astype(leaf.dtype)

        shapes = jax.eval_shape(lambda: self.init_state(batch_size, max_length))
        return jax.tree_util.tree_map_with_path(draw, shapes)

    def _pull(self, params: dict, x: jax.Array, state: Any, context: Context, dy: jax.Array, dstate: Any) -> tuple:
        function = lambda params, x, state: self.apply(params, x, state, context)  # noqa: E731
        results, pullback = jax.vjp(function, params, x, state)
        return (*results, *pullback((dy, dstate)))


def mixer_subject(name: str, mixer: type[Mixer], options: dict, dtype: str, d_model: int = 32) -> Subject:
    """A single mixer, made small, in float32 or float64 throughout."""
    dims = ModelDims(d_model, sublayers=2, param_dtype=jnp.dtype(dtype), compute_dtype=jnp.dtype(dtype))
    make = lambda: mixer(mixer.Options(**options), dims, nnx.Rngs(0))  # noqa: E731
    graphdef, params = create(make)

    def apply(params: dict, x: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
        return nnx.merge(graphdef, params)(x, state, context)[:2]

    init_state = nnx.merge(graphdef, params).init_state
    positive = lambda path: path[-1].key in mixer.positive_state  # noqa: E731
    declared = declarations(nnx.eval_shape(make))
    return Subject(name, apply, spread(params), init_state, d_model, dtype, positive=positive, declared=declared)


def stack_subject(name: str, config: ModelConfig) -> Subject:
    """The stack of a language model; parameters and activations have the config's dtypes."""
    make = lambda: LanguageModel(config, nnx.Rngs(0)).stack  # noqa: E731
    graphdef, params = create(make)

    def apply(params: dict, x: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
        return nnx.merge(graphdef, params)(x, state, context)[:2]

    stack = nnx.merge(graphdef, params)

    def positive(path: tuple) -> bool:
        layer, mixer, name, *_ = (entry.key for entry in path)
        return name in stack.layers[layer].mixers[mixer].positive_state

    return Subject(
        name,
        apply,
        spread(params),
        stack.init_state,
        config.d_model,
        config.param_dtype,
        batch_axis=1,
        positive=positive,
        declared=declarations(nnx.eval_shape(make)),
    )


def spread(params: dict) -> dict:
    """The parameters, each moved a little by a fixed pattern: constants (norms, D, A_log) would hide swapped axes."""

    def move(leaf: np.ndarray) -> np.ndarray:
        wave = np.sin(1.0 + 1.7 * np.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
        return leaf * (1 + 0.2 * wave).astype(leaf.dtype) + 0.02 * wave.astype(leaf.dtype)

    return jax.tree.map(move, jax.device_get(params))
