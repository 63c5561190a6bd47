"""The residual stack: a period of layers, scanned over its repeats. It is itself a mixer."""

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.layers.norm import RMSNorm
from lcx.mixers import Context, Mixer, ModelDims, build_mixer
from lcx.models.pattern import Pattern, layer_names
from lcx.models.remat import Run, check_time_remat, rematerialize
from lcx.parallel.sharding import constrain
from lcx.params import split


def scope_of(mixer: str) -> str:
    """The name under which compiled programs and profiles show what a mixer of the pattern does."""
    return f"mixer_{mixer}"


class Layer(nnx.Module):
    """y = sum of the mixers of norm(x): one pre-norm residual branch, or several in parallel."""

    def __init__(self, names: tuple[str, ...], records: Mapping[str, Any], dims: ModelDims, rngs: nnx.Rngs):
        self.norm = RMSNorm(dims.d_model, dims.norm_eps, rngs, dtype=dims.param_dtype)
        self.mixers = nnx.Dict({name: build_mixer(name, records[name], dims, rngs) for name in names})

    def branch(self, name: str, x: jax.Array, state: dict | None, context: Context, dtype: Any) -> tuple:
        """One mixer of the normed stream: (y, state, aux)."""
        return self.mixers[name](self.norm(x).astype(dtype), state, context)


class Stack(nnx.Module):
    """`periods` repeats of a pattern of layers; parameters of the repeats are stacked on a first axis.

    Called like a mixer: x [batch, time, d_model] in the residual dtype, state by layer and mixer with a first axis of
    periods, and returns (x, state, aux), aux stacked likewise.
    """

    def __init__(
        self,
        pattern: Pattern,
        records: Mapping[str, Any],
        remat: Mapping[str, str],
        periods: int,
        dims: ModelDims,
        rngs: nnx.Rngs,
    ):
        self.periods, self.dims = periods, dims
        self.names = layer_names(pattern)  # in their order, which `layers` forgets: modules are sorted by name
        self.policies = tuple(sorted((name, remat[name]) for names in pattern for name in names))

        @nnx.split_rngs(splits=periods)
        @nnx.vmap(in_axes=0, out_axes=0)
        def repeated(rngs: nnx.Rngs) -> nnx.Dict:
            layers = zip(self.names, pattern, strict=True)
            return nnx.Dict({key: Layer(names, records, dims, rngs) for key, names in layers})

        self.layers = repeated(rngs)
        for layer in self.layers.values():
            for name, mixer in layer.mixers.items():
                check_time_remat(name, remat[name], mixer)

    def __call__(self, x: jax.Array, state: dict | None, context: Context) -> tuple[jax.Array, dict, dict]:
        graphdef, params = split(self.layers)
        policies = dict(self.policies)

        def branch(key: str, name: str) -> Run:
            def run(params: dict, x: jax.Array, state: dict | None, context: Context) -> tuple:
                layer = nnx.merge(graphdef, params)[key]
                with jax.named_scope(scope_of(name)):
                    return layer.branch(name, x, state, context, self.dims.compute_dtype)

            return rematerialize(run, policies[name], self.layers[key].mixers[name].init_state)

        def period(x: jax.Array, scanned: tuple) -> tuple:
            params, state = scanned
            states, aux = {}, {}
            for key in self.names:
                results = {}
                for name in self.layers[key].mixers:
                    results[name] = branch(key, name)(params, x, state and state[key][name], context)
                x = x + sum(y.astype(x.dtype) for y, _, _ in results.values())
                x = constrain(x, ("batch", "time", None))
                states[key] = {name: result[1] for name, result in results.items()}
                aux[key] = {name: result[2] for name, result in results.items()}
            return x, (states, aux)

        x, (states, aux) = jax.lax.scan(period, x, (params, state), length=self.periods, unroll=self.periods == 1)
        return x, states, aux

    def written_out(self) -> "Stack":
        """The same layers as one long period, so that each has arrays of its own; see `apart` for its state."""
        graphdef, params = split(self.layers)
        long = copy(self)
        long.periods, long.names = 1, tuple(f"{index}_{key}" for index in range(self.periods) for key in self.names)
        long.layers = nnx.Dict(_flat(nnx.merge(graphdef, own) for own in _apart(params, self.periods)))
        return long

    def apart(self, state: dict) -> dict:
        """The state of `written_out` of a state of this stack."""
        return _flat(_apart(state, self.periods))

    def init_state(self, batch_size: int, max_length: int) -> dict:
        """Empty states of all mixers, by layer and mixer, stacked over the periods."""

        def stacked(mixer: Mixer) -> dict:
            state = mixer.init_state(batch_size, max_length)
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.periods, *leaf.shape)), state)

        return {
            key: {name: stacked(mixer) for name, mixer in layer.mixers.items()} for key, layer in self.layers.items()
        }

    def capacity(self, state: dict | None) -> int | None:
        """The tokens that the smallest of the states can hold; None where no mixer's state grows."""
        if state is None:
            return None
        found = []
        for key, layer in self.layers.items():
            for name, mixer in layer.mixers.items():
                one_period = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state[key][name]
                )
                found.append(mixer.capacity(one_period))
        return min((capacity for capacity in found if capacity is not None), default=None)

    def flops(self, tokens: int) -> int | None:
        """Forward FLOPs of one document of `tokens` tokens from an empty state; None if a mixer does not know its own.

        What counts is said in `Mixer.flops`; here nothing is added, since norms and residual additions are left out.
        """
        counts = self.by_mixer(lambda mixer: mixer.flops(tokens)).values()
        return None if None in counts else sum(counts)

    def by_mixer(self, count: Callable[[Mixer], int | None]) -> dict[str, int | None]:
        """`count` of each mixer of the pattern, by name: of all its layers together; None where one is None."""
        graphdef, params = split(self.layers)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        layers = nnx.merge(graphdef, shapes)  # of one period: mixers may count by the shapes of their parameters
        counts: dict[str, int | None] = {}
        for layer in layers.values():
            for name, mixer in layer.mixers.items():
                one, others = count(mixer), counts.get(name, 0)
                counts[name] = None if one is None or others is None else others + self.periods * one
        return counts


def _apart(tree: Any, periods: int) -> list:
    """The periods of a tree whose leaves have a first axis of periods, each with a first axis of 1."""
    one = lambda index: jax.tree.map(lambda leaf: leaf[index : index + 1], tree)  # noqa: E731
    return [one(index) for index in range(periods)]


def _flat(periods: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The layers of all periods, by names of their own."""
    return {f"{index}_{key}": layer for index, layers in enumerate(periods) for key, layer in layers.items()}
