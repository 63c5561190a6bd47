"""Mamba-2: a state-space mixer whose heads decay as a whole (Dao and Gu, arXiv 2405.21060)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.errors import UserError
from lcx.layers.initializers import Constant, InverseSoftplusLogUniform, LogOfUniform
from lcx.layers.norm import normalize
from lcx.mixers.base import Aux, Context, Mixer, ModelDims, State, check_backend
from lcx.mixers.convolution import TOKEN, ShortConvolution
from lcx.parallel.memory import pass_memory
from lcx.parallel.sequence import last
from lcx.params import param
from lcx.schema import limited
from lcx_kernels.chunked_memory import chunked_memory, select_backend

HEADS = ("batch", "time", "heads", None)
GROUPS = ("batch", "time", "groups", None)
STATE = ("batch", "heads", None, None)


@dataclass(frozen=True)
class Mamba2Options:
    """Options of `type: "mamba2"`; the defaults are the paper's."""

    expand: int = limited(2, minimum=1)  # inner width over d_model
    state_size: int = limited(128, minimum=1)
    head_dim: int = limited(64, minimum=1)  # channels that decay together
    num_groups: int = limited(1, minimum=1)  # of neighbouring heads, each with a B, a C and a norm of its own
    conv_width: int = limited(4, minimum=1)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] | None = limited(None, minimum=0)  # what dt is clipped to; None: nothing
    chunk_size: int = limited(256, minimum=1)
    backend: str = "auto"


class Mamba2(Mixer):
    """z, x, B, C, dt = in_proj(u); x, B, C = silu(conv(...)); y = SSD(x, dt, A, B, C) + D x; out_proj(norm(y silu(z))).

    Head h has a decay of its own, exp(dt[h] A[h]), and the B and C of group h // (heads / num_groups); the norm is an
    RMSNorm over all channels of a group. in_proj is three matrices, so that heads and groups are axes of their own. The
    state is the last conv_width - 1 inputs of the convolutions and the recurrent state [batch, heads, N, head_dim].
    """

    Options = Mamba2Options
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "grouped": {"head_dim": 16, "state_size": 4, "num_groups": 2, "conv_width": 2, "chunk_size": 4},
    }

    recurrent_state: ClassVar[frozenset[str]] = frozenset({"ssm"})

    def __init__(self, options: Mamba2Options, dims: ModelDims, rngs: nnx.Rngs):
        dims = dims.standard  # muP does not hold for selective scans (Vankadara et al., NeurIPS 2024)
        inner, width, groups = options.expand * dims.d_model, options.head_dim, options.num_groups
        heads, dtype = inner // width, dims.param_dtype
        if inner % width:
            raise UserError(f"head_dim={width} does not divide the inner width expand * d_model = {inner}.")
        if heads % groups:
            raise UserError(f"num_groups={groups} does not divide the {heads} heads of head_dim={width}.")
        if options.dt_limit is not None and options.dt_limit[0] > options.dt_limit[1]:
            raise UserError(f"dt_limit={options.dt_limit} must be the lower and the upper limit.")
        check_backend(select_backend, options.backend)
        self.options, self.dims, self.heads = options, dims, heads
        self.z_x_proj = dims.dense(dims.d_model, (2, heads, width), ("d_model", None, "heads", None), rngs)
        B_C = (2, groups, options.state_size)
        self.B_C_proj = dims.dense(dims.d_model, B_C, ("d_model", None, "groups", None), rngs)
        self.dt_proj = dims.dense(dims.d_model, heads, ("d_model", "heads"), rngs)
        self.x_conv = ShortConvolution((heads, width), ("heads", None), options.conv_width, dims, rngs)
        self.B_C_conv = ShortConvolution(B_C, (None, "groups", None), options.conv_width, dims, rngs)
        dt_init = InverseSoftplusLogUniform(options.dt_min, options.dt_max, options.dt_init_floor)
        self.dt_bias = param(rngs, (heads,), ("heads",), dt_init, dtype=dtype, decay=False)
        self.A_log = param(rngs, (heads,), ("heads",), LogOfUniform(1.0, 16.0), dtype=dtype, decay=False)
        self.D = param(rngs, (heads,), ("heads",), Constant(1.0), dtype=dtype, decay=False)
        self.norm_scale = param(rngs, (heads, width), ("heads", None), Constant(1.0), dtype=dtype, decay=False)
        self.out_proj = dims.output((heads, width), ("heads", None, "d_model"), rngs)

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        past = state or {"x_conv": None, "B_C_conv": None, "ssm": None}
        z_x, B_C, dt = self.z_x_proj(x), self.B_C_proj(x), self.dt_proj(x)
        x, x_tail = self.x_conv(z_x[:, :, 1], past["x_conv"], context)
        B_C, B_C_tail = self.B_C_conv(B_C, past["B_C_conv"], context)
        y, ssm = self._scan(x, dt, B_C[:, :, 0], B_C[:, :, 1], past["ssm"], context)
        y = self._norm(y, z_x[:, :, 0])
        return (
            self.out_proj(y),
            {"x_conv": x_tail, "B_C_conv": B_C_tail, "ssm": ssm},
            {"metrics": self.metrics(dt, ssm)},
        )

    def metrics(self, dt: jax.Array, ssm: jax.Array) -> dict[str, jax.Array]:
        """What is logged of a chunk, from dt before its softplus and the state after the chunk."""
        del dt
        return {"state_rms": jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(ssm))))}

    def _scan(
        self, x: jax.Array, dt: jax.Array, B: jax.Array, C: jax.Array, ssm: jax.Array | None, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """SSD and the skip, at least float32: S = exp(dt A) S + B (dt x)^T, y = C S + D x.

        x [batch, time, heads, head_dim], dt [batch, time, heads], B and C [batch, time, groups, N], S
        [batch, heads, N, head_dim].
        """
        options, wide = self.options, self.dims.state_dtype
        dt = jax.nn.softplus(dt.astype(wide) + self.dt_bias[...].astype(wide))
        if options.dt_limit is not None:
            dt = jnp.clip(dt, *options.dt_limit)

        def local(q, k, v, log_decay, initial_state, reset):
            how = dict(log_decay=log_decay, reset=reset, chunk_size=options.chunk_size, backend=options.backend)
            initial_state = pass_memory(k, v, initial_state, **how)
            y, state = chunked_memory(q, k, v, initial_state=initial_state, **how)
            return y, last(state)

        arrays = {
            "q": context.shard.groups_for(self.heads, C),
            "k": context.shard.groups_for(self.heads, B),
            "v": (x * dt[..., None]).astype(x.dtype),
            "log_decay": -dt * jnp.exp(self.A_log[...].astype(wide)),
            "initial_state": ssm,
            "reset": context.reset,
        }
        axes = dict(q=GROUPS, k=GROUPS, v=HEADS, log_decay=HEADS[:3], initial_state=STATE, reset=TOKEN)
        state_shape = (x.shape[0], self.heads, options.state_size, options.head_dim)
        y, ssm = context.shard.kernel(local, arrays, axes, ((x.shape, HEADS), (state_shape, STATE)))
        return y.astype(wide) + self.D[...].astype(wide)[:, None] * x, ssm

    def _norm(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """RMSNorm of y silu(z) over each group; y is at least float32, the result has z's dtype."""
        gated = y * jax.nn.silu(z.astype(y.dtype))
        grouped = gated.reshape(*z.shape[:2], self.options.num_groups, -1, z.shape[3])
        normed = normalize(grouped, self.dims.norm_eps, axis=(-2, -1)).reshape(z.shape)
        return normed.astype(z.dtype) * self.norm_scale[...].astype(z.dtype)

    def flops(self, tokens: int) -> int:
        """The matrices, the convolutions and the recurrence; softplus, the gate silu(z) and the norm are left out.

        The recurrence has, for each token and number of a head's state, the product of B and dt x, a multiply-add into
        S and one into y; for each channel dt x and the multiply-add of D x; and dt A for each head.
        """
        size, width = self.options.state_size, self.options.head_dim
        matrices = self.z_x_proj.flops() + self.B_C_proj.flops() + self.dt_proj.flops() + self.out_proj.flops()
        recurrence = self.heads * (5 * size * width + 3 * width + 1)
        return (matrices + recurrence) * tokens + self.vector_flops(tokens)

    def vector_flops(self, tokens: int) -> int:
        """The convolutions; the recurrence goes by chunks, in matrix products."""
        return (self.x_conv.flops() + self.B_C_conv.flops()) * tokens

    def init_state(self, batch_size: int, max_length: int) -> State:
        del max_length
        state = (batch_size, self.heads, self.options.state_size, self.options.head_dim)
        tails = {"x_conv": self.x_conv.init_tail(batch_size), "B_C_conv": self.B_C_conv.init_tail(batch_size)}
        return tails | {"ssm": jnp.zeros(state, self.dims.state_dtype)}
