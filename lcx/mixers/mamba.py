"""Mamba: a selective state-space mixer (Gu and Dao, arXiv 2312.00752)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.layers.dense import contract
from lcx.layers.initializers import Constant, InverseSoftplusLogUniform, LogArange, Uniform
from lcx.layers.norm import RMSNorm
from lcx.mixers.base import Aux, Context, Mixer, ModelDims, State, check_backend
from lcx.mixers.convolution import TOKEN, ShortConvolution
from lcx.parallel.sequence import last, pass_state
from lcx.params import param
from lcx.schema import limited
from lcx_kernels.selective_scan import select_backend, selective_scan, selective_scan_summary

CHANNELS = ("batch", "time", "inner")


@dataclass(frozen=True)
class MambaOptions:
    """Options of `type: "mamba"`; the defaults are the paper's."""

    expand: int = limited(2, minimum=1)  # inner width over d_model
    state_size: int = limited(16, minimum=1)
    conv_width: int = limited(4, minimum=1)
    dt_rank: int | None = limited(None, minimum=1)  # None: ceil(d_model / 16)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_B_C_norm: bool = False  # RMSNorm of dt, B and C as x_proj gives them (Jamba, arXiv 2403.19887)
    chunk_size: int | None = limited(None, minimum=1)  # None: the backend's choice
    backend: str = "auto"


class Mamba(Mixer):
    """x, z = in_proj(u); x = silu(conv(x)); dt, B, C = x_proj(x); y = scan(x, dt, A, B, C) + D x; out_proj(y silu(z)).

    x_proj gives a dt of dt_rank channels, which dt_proj and a softplus turn into one for each inner channel. The state
    is the last conv_width - 1 inputs of the convolution and the recurrent state [batch, inner, N].
    """

    Options = MambaOptions
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "normed": {"state_size": 4, "chunk_size": 4, "dt_B_C_norm": True},
    }

    recurrent_state: ClassVar[frozenset[str]] = frozenset({"ssm"})

    def __init__(self, options: MambaOptions, dims: ModelDims, rngs: nnx.Rngs):
        dims = dims.standard  # muP does not hold for selective scans (Vankadara et al., NeurIPS 2024)
        inner = options.expand * dims.d_model
        rank = options.dt_rank or math.ceil(dims.d_model / 16)
        size, dtype = options.state_size, dims.param_dtype
        check_backend(partial(select_backend, state=size, dtype=dims.state_dtype), options.backend)
        self.options, self.dims = options, dims
        self.inner, self.splits = inner, (rank, rank + size)
        self.in_proj = dims.dense(dims.d_model, (2, inner), ("d_model", None, "inner"), rngs)
        self.conv = ShortConvolution((inner,), ("inner",), options.conv_width, dims, rngs)
        self.x_proj = dims.dense(inner, rank + 2 * size, ("inner", None), rngs)
        self.dt_proj = param(rngs, (rank, inner), (None, "inner"), Uniform(1 / math.sqrt(rank)), dtype=dtype)
        dt_init = InverseSoftplusLogUniform(options.dt_min, options.dt_max, options.dt_init_floor)
        self.dt_bias = param(rngs, (inner,), ("inner",), dt_init, dtype=dtype, decay=False)
        self.A_log = param(rngs, (inner, size), ("inner", None), LogArange(), dtype=dtype, decay=False)
        self.D = param(rngs, (inner,), ("inner",), Constant(1.0), dtype=dtype, decay=False)
        self.out_proj = dims.output(inner, ("inner", "d_model"), rngs)
        if options.dt_B_C_norm:
            self.dt_norm = RMSNorm(rank, dims.norm_eps, rngs, dtype=dtype)
            self.B_norm = RMSNorm(size, dims.norm_eps, rngs, dtype=dtype)
            self.C_norm = RMSNorm(size, dims.norm_eps, rngs, dtype=dtype)

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        past = state or {"conv": None, "ssm": None}
        x, z = self.in_proj.apart(x)
        x, tail = self.conv(x, past["conv"], context)
        dt, B, C = jnp.split(self.x_proj(x), self.splits, axis=-1)
        if self.options.dt_B_C_norm:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = contract(dt, self.dt_proj[...])
        y, ssm = self._scan(x, dt, B, C, z, past["ssm"], context)
        return self.out_proj(y), {"conv": tail, "ssm": ssm}, {"metrics": self.metrics(dt, ssm)}

    def metrics(self, dt: jax.Array, ssm: jax.Array) -> dict[str, jax.Array]:
        """What is logged of a chunk, from dt before its softplus and the state after the chunk."""
        del dt
        return {"state_rms": jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(ssm))))}

    def _scan(
        self,
        x: jax.Array,
        dt: jax.Array,
        B: jax.Array,
        C: jax.Array,
        z: jax.Array,
        ssm: jax.Array | None,
        context: Context,
    ) -> tuple[jax.Array, jax.Array]:
        options, wide = self.options, self.dims.state_dtype

        def local(x, dt, A, B, C, D, z, dt_bias, initial_state, reset):
            steps = dict(dt_bias=dt_bias, dt_softplus=True, reset=reset)
            settings = dict(backend=options.backend, chunk_size=options.chunk_size)
            initial_state = pass_state(
                lambda: selective_scan_summary(x, dt, A, B, **steps, **settings),
                initial_state,
                then=lambda early, late: early.then(late, A),
                apply=lambda summary, state: summary.apply(state, A),
            )
            y, state = selective_scan(x, dt, A, B, C, D, z=z, initial_state=initial_state, **steps, **settings)
            return y, last(state)

        state_shape, state_axes = (x.shape[0], self.inner, options.state_size), ("batch", "inner", None)
        shared = ("batch", "time", None)
        arrays = dict(x=x, dt=dt, B=B, C=C, z=z, initial_state=ssm, reset=context.reset)
        arrays["A"] = -jnp.exp(self.A_log[...].astype(wide))
        arrays["D"] = self.D[...].astype(wide)
        arrays["dt_bias"] = self.dt_bias[...].astype(wide)
        axes = dict(x=CHANNELS, dt=CHANNELS, z=CHANNELS, B=shared, C=shared, reset=TOKEN, initial_state=state_axes)
        axes |= dict(A=("inner", None), D=("inner",), dt_bias=("inner",))
        return context.shard.kernel(local, arrays, axes, ((x.shape, CHANNELS), (state_shape, state_axes)))

    def flops(self, tokens: int) -> int:
        """The four matrices, the convolution and the scan; softplus, norms and the gate silu(z) are left out.

        The scan has, for each token, channel and state, dt A and (dt x) B, a multiply-add into h and one into y; and
        for each token and channel dt x and the multiply-add of D x.
        """
        rank = self.splits[0]
        matrices = self.in_proj.flops() + self.x_proj.flops() + 2 * rank * self.inner + self.out_proj.flops()
        return matrices * tokens + self.vector_flops(tokens)

    def vector_flops(self, tokens: int) -> int:
        scan = self.inner * (6 * self.options.state_size + 3)
        return (self.conv.flops() + scan) * tokens

    def init_state(self, batch_size: int, max_length: int) -> State:
        del max_length
        state = (batch_size, self.inner, self.options.state_size)
        return {"conv": self.conv.init_tail(batch_size), "ssm": jnp.zeros(state, self.dims.state_dtype)}
