"""What mixers with query, key and value heads share: their options, projections and rotations."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.errors import UserError
from lcx.layers.norm import RMSNorm
from lcx.layers.rotary import rotate
from lcx.mixers.base import Mixer, ModelDims, check_backend
from lcx.schema import limited

QUERY = ("batch", "time", "heads", None)
KEY = ("batch", "time", "kv_heads", None)
TAIL = ("batch", None, "kv_heads", None)
TOKEN = ("batch", "time")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options of every mixer with heads."""

    num_heads: int = limited(minimum=1)
    num_kv_heads: int | None = limited(None, minimum=1)  # None: as many as query heads
    head_dim: int | None = limited(None, minimum=1)  # None: d_model / num_heads
    rope_base: float | None = limited(10_000.0, above=0)  # None: no positions
    qk_norm: bool = False  # RMSNorm over each query and key head before the rotation
    backend: str = "auto"


class GroupedHeads(Mixer):
    """A mixer whose query head h reads key and value head h // (num_heads / num_kv_heads)."""

    def __init__(self, options: HeadOptions, dims: ModelDims, rngs: nnx.Rngs, select_backend: Callable[[str], str]):
        heads = options.num_heads
        kv_heads = options.num_kv_heads or heads
        if options.head_dim is None and dims.d_model % heads:
            raise UserError(
                f"num_heads={heads} does not divide d_model={dims.d_model}; set head_dim or another num_heads."
            )
        if heads % kv_heads:
            raise UserError(f"num_kv_heads={kv_heads} does not divide num_heads={heads}.")
        width = options.head_dim or dims.d_model // heads
        if options.rope_base is not None and width % 2:
            raise UserError(
                f"head_dim={width} is odd, but rotary positions turn pairs; use an even one or rope_base=none."
            )
        check_backend(select_backend, options.backend)
        self.options, self.dims = options, dims
        self.kv_shape = (kv_heads, width)
        scale = self.query_scale(dims, width)
        on_matrix = 1.0 if options.qk_norm else scale
        self.query = dims.dense(dims.d_model, (heads, width), ("d_model", "heads", None), rngs, on_matrix)
        self.key = dims.dense(dims.d_model, (kv_heads, width), ("d_model", "kv_heads", None), rngs)
        self.value = dims.dense(dims.d_model, (kv_heads, width), ("d_model", "kv_heads", None), rngs)
        self.output = dims.output((heads, width), ("heads", None, "d_model"), rngs)
        if options.qk_norm:
            self.query_norm = RMSNorm(width, dims.norm_eps, rngs, dtype=dims.param_dtype, multiplier=scale)
            self.key_norm = RMSNorm(width, dims.norm_eps, rngs, dtype=dims.param_dtype)

    def query_scale(self, dims: ModelDims, width: int) -> float:
        """What queries start multiplied by, beside the kernels' 1 / sqrt(K)."""
        del dims, width
        return 1.0

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """From x [batch, time, d_model] to query [batch, time, heads, K], key and value [batch, time, kv_heads, K]."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.options.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def rotated(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys [batch, time, heads, K] turned to their positions [batch, time], where there are any."""
        return heads if self.options.rope_base is None else rotate(heads, positions, self.options.rope_base)

    def projection_flops(self, tokens: int) -> int:
        """FLOPs of the four projections of that many tokens."""
        kv_heads, width = self.kv_shape
        return tokens * 4 * self.dims.d_model * (self.options.num_heads + kv_heads) * width

    def pair_flops(self, pairs: int) -> int:
        """FLOPs of the scores and the weighted values of that many pairs of a query and a key, in all heads."""
        return pairs * 4 * self.options.num_heads * self.kv_shape[1]


def documents(lookback: jax.Array) -> jax.Array:
    """int32 [batch, time]: which document of its row a token is of; 1 goes on from before the chunk, 0 is none.

    Starts are counted along the whole row: whole arrays, not shards of their time.

    Args:
      lookback: int32 [batch, time], how many tokens before itself a token may see; 0 starts a document.
    """
    starts = (lookback == 0).at[:, 0].set(True)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def tail_documents(lookback: jax.Array, held: int) -> jax.Array:
    """int32 [batch, held]: the same of the `held` tokens before the chunk: 1 as far as its first token sees, else 0."""
    distance = jnp.arange(held, 0, -1, dtype=jnp.int32)
    return (distance <= lookback[:, :1]).astype(jnp.int32)


def visible_pairs(tokens: int, window: int | None) -> int:
    """How many pairs of a query and a key a causal window of this width has over a document; None: no window."""
    reach = tokens if window is None else min(window, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach
