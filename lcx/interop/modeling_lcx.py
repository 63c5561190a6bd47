"""An lcx model in PyTorch: any pattern of attention, Infini-attention, Mamba, Mamba-2 and MLP layers.

This file travels with the weights and needs torch and transformers alone:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A layer is x + mixer(norm(x)), or the sum of several mixers of one norm. Every mixer is a function of a chunk of tokens
and of the state that the tokens before left behind, `y, state = mixer(x, state, chunk)`: training, prefill and decoding
are the same code. But for full attention, the state's size does not depend on how much was read.

Letters in shapes: B batch, T time, D model width, H heads, K head width, N state size, S tokens of a state and a chunk.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

QUERIES = 512  # whose scores exist at one time
SCAN = 32  # tokens whose recurrent states exist at one time
MEMORY_EPS = 1e-6  # added to what a read of the compressive memory is divided by


class LcxConfig(PretrainedConfig):
    """`pattern` has the names of the mixers of each layer and is repeated; `mixers` has the options of each name."""

    model_type = "lcx"

    def __init__(
        self,
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=2,
        pattern=(("attention",), ("mlp",)),
        mixers=None,
        norm_eps=1e-5,
        residual_dtype="float32",
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.pattern = [list(names) for names in pattern]
        self.mixers = mixers or {}
        self.norm_eps = norm_eps
        self.residual_dtype = residual_dtype
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class LcxCache:
    """What the tokens before left behind: a state for each mixer of each layer, and how far each row has come."""

    is_compileable = False

    def __init__(self, layers, batch_size, device):
        self.states = [{} for _ in range(layers)]
        self.position = torch.zeros(batch_size, dtype=torch.long, device=device)  # of each row's next token
        self.length = 0  # tokens read, padding included

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reorder_cache(self, beam_idx):
        """Takes over the rows of the beams that go on."""
        self.position = self.position[beam_idx.to(self.position.device)]
        for layer in self.states:
            for state in layer.values():
                state.update({name: value[beam_idx.to(value.device)] for name, value in state.items()})


@dataclass
class Chunk:
    """What mixers are told of the tokens."""

    positions: torch.Tensor  # [B, T], in the row's document; of no meaning where padding is
    valid: torch.Tensor  # bool [B, T]; False is padding, which nothing sees and which changes no state


def wide(x):
    """The dtype of sums, norms and states: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def normalize(x, eps, dim=-1):
    x = x.to(wide(x))
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return normalize(x, self.eps).to(x.dtype) * self.weight.to(x.dtype)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x, positions, base):
    """Half-split rotary positions; x [B, T, H, K], positions [B, T]. Angles are at least float32."""
    if base is None:
        return x
    width, dtype = x.shape[-1], wide(x)
    frequencies = base ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)
    angles = positions[..., None, None].to(dtype) * frequencies
    first, second = x.to(dtype).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def scores_of(query, key):
    """Scores [B, H, T, S] of query [B, T, H, K] and key [B, S, n, K]; neighbouring query heads share a key head."""
    batch, time, heads, width = query.shape
    query = query.to(wide(query)).reshape(batch, time, key.shape[2], -1, width) * width**-0.5
    scores = torch.einsum("btngk,bsnk->bngts", query, key.to(query.dtype))
    return scores.reshape(batch, heads, time, key.shape[1])


def mix(weights, value):
    """Weighted values [B, T, H, K] of weights [B, H, T, S] and value [B, S, n, K]."""
    batch, heads, time, keys = weights.shape
    grouped = weights.reshape(batch, value.shape[2], -1, time, keys)
    return torch.einsum("bngts,bsnv->btngv", grouped, value.to(weights.dtype)).reshape(batch, time, heads, -1)


def attend(query, key, value, sees, reach=None, sink_logit=None, sinks=None):
    """Softmax attention [B, T, H, K], some queries at a time.

    The keys are those before the chunk and the chunk's. `sees(rows, columns)` is a bool mask [B, rows, columns] of
    index ranges of queries and keys; `reach` bounds how many keys a query sees, itself included; `sink_logit` [H] joins
    the denominator; `sinks` is (query there, key, value, bool [B, T, count]), keys of their own in the same softmax.
    """
    time, before = query.shape[1], key.shape[1] - query.shape[1]
    outs = []
    for start in range(0, time, QUERIES):
        stop = min(start + QUERIES, time)
        first = 0 if reach is None else max(0, before + start - reach + 1)
        rows, columns = slice(start, stop), slice(first, before + stop)
        scores = scores_of(query[:, rows], key[:, columns])
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~sees(rows, columns)[:, None], lowest)
        extra = []
        if sinks is not None:
            far, sink_key, sink_value, seen = sinks
            far_scores = scores_of(far[:, rows], sink_key).masked_fill(~seen[:, None, rows], lowest)
            extra.append(far_scores)
        if sink_logit is not None:
            extra.append(sink_logit.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1))
        weights = torch.cat([scores, *extra], dim=-1).softmax(dim=-1)
        out = mix(weights[..., : scores.shape[-1]], value[:, columns])
        if sinks is not None:
            out = out + mix(weights[..., scores.shape[-1] :][..., : sink_key.shape[1]], sink_value)
        outs.append(out)
    return torch.cat(outs, dim=1).to(query.dtype)


class Heads(nn.Module):
    """Query, key and value heads."""

    def __init__(self, config, options):
        super().__init__()
        self.options, width = options, options["head_dim"]
        self.shape, self.kv_shape = (options["num_heads"], width), (options["num_kv_heads"], width)
        self.q_proj = linear(config.hidden_size, math.prod(self.shape))
        self.k_proj = linear(config.hidden_size, math.prod(self.kv_shape))
        self.v_proj = linear(config.hidden_size, math.prod(self.kv_shape))
        self.o_proj = linear(math.prod(self.shape), config.hidden_size)
        if options["qk_norm"]:
            self.q_norm, self.k_norm = RMSNorm(width, config.norm_eps), RMSNorm(width, config.norm_eps)

    def project(self, x):
        batch_time = x.shape[:2]
        query = self.q_proj(x).reshape(*batch_time, *self.shape)
        key = self.k_proj(x).reshape(*batch_time, *self.kv_shape)
        value = self.v_proj(x).reshape(*batch_time, *self.kv_shape)
        if self.options["qk_norm"]:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def rotated(self, heads, positions):
        return rotate(heads, positions, self.options["rope_base"])

    def joined(self, out):
        return self.o_proj(out.flatten(2))


class Attention(Heads):
    """Over all tokens before, or the last `window`; `sink_tokens` first tokens are never out of sight of a window.

    The state is the keys, the values and whether they are of tokens, and those of the sink tokens.
    """

    def __init__(self, config, options):
        super().__init__(config, options)
        if options["sink"] == "logit":
            self.sinks = nn.Parameter(torch.zeros(options["num_heads"]))

    def forward(self, x, state, chunk):
        window, count = self.options["window"], self.options["sink_tokens"] if self.options["window"] else 0
        query, key, value = self.project(x)
        key = self.rotated(key, chunk.positions)
        own_key, own_value, valid = key, value, chunk.valid
        if state:
            key, value = torch.cat([state["key"], key], dim=1), torch.cat([state["value"], value], dim=1)
            valid = torch.cat([state["valid"], valid], dim=1)
        before = key.shape[1] - x.shape[1]

        def sees(rows, columns):
            i = torch.arange(before + rows.start, before + rows.stop, device=x.device)[:, None]
            j = torch.arange(columns.start, columns.stop, device=x.device)
            causal = (j <= i) if window is None else (j <= i) & (i - j < window)
            return causal & valid[:, None, columns]

        sinks, held = None, {}
        if count:
            held = self._held(own_key, own_value, state, chunk, count)
            distance = chunk.positions[..., None] - torch.arange(count, device=x.device)
            nearest = chunk.positions.clamp(max=count + window - 1)
            far = self.rotated(query, nearest)
            sinks = (far, held["sink_key"], held["sink_value"], (distance >= window) & chunk.valid[..., None])
        logit = {None: None, "zero": query.new_zeros(self.shape[0])}.get(
            self.options["sink"], getattr(self, "sinks", None)
        )
        query = self.rotated(query, chunk.positions)
        out = attend(query, key, value, sees, window, logit, sinks)
        keep = key.shape[1] if window is None else window - 1
        kept = {name: array[:, array.shape[1] - min(keep, array.shape[1]) :] for name, array in
                (("key", key), ("value", value), ("valid", valid))}  # fmt: skip
        return self.joined(out), kept | held

    @staticmethod
    def _held(key, value, state, chunk, count):
        """The keys and values of the first `count` tokens, zeros for those that have not come."""
        place = torch.arange(count, device=key.device)
        hit = ((chunk.positions[..., None] == place) & chunk.valid[..., None]).to(key.dtype)
        held = {f"sink_{name}": torch.einsum("btc,btnk->bcnk", hit, array) for name, array in
                (("key", key), ("value", value))}  # fmt: skip
        return {name: array + state[name] for name, array in held.items()} if state else held


class Infini(Heads):
    """Attention within a segment, and a memory of all segments before it (arXiv 2404.07143).

    A row's tokens are cut into segments by their positions. The state is the memory and its normalizer, what the open
    segment has written, and the last segment_length - 1 keys and values with their positions (-1: padding).
    """

    def __init__(self, config, options):
        super().__init__(config, options)
        self.gate = nn.Parameter(torch.zeros(options["num_heads"]))

    def forward(self, x, state, chunk):
        length = self.options["segment_length"]
        query, key, value = self.project(x)
        near, kept = self._near(query, key, value, state, chunk, length)
        far, memory = self._far(query, key, value, state, chunk, length)
        opened = self.gate.to(far.dtype).sigmoid()[:, None]
        out = opened * far + (1 - opened) * near.to(far.dtype)
        return self.joined(out.to(x.dtype)), kept | memory

    def _near(self, query, key, value, state, chunk, length):
        query, key = self.rotated(query, chunk.positions), self.rotated(key, chunk.positions)
        positions = torch.where(chunk.valid, chunk.positions, -1)
        if state:
            key, value = torch.cat([state["key"], key], dim=1), torch.cat([state["value"], value], dim=1)
            positions = torch.cat([state["positions"], positions], dim=1)
        segments = torch.where(positions < 0, -1, positions // length)
        before = key.shape[1] - query.shape[1]

        def sees(rows, columns):
            of_query = positions[:, before + rows.start : before + rows.stop, None]
            same = segments[:, before + rows.start : before + rows.stop, None] == segments[:, None, columns]
            return same & (positions[:, None, columns] <= of_query) & (positions[:, None, columns] >= 0)

        out = attend(query, key, value, sees, length)
        first = key.shape[1] - min(length - 1, key.shape[1])
        return out, {"key": key[:, first:], "value": value[:, first:], "positions": positions[:, first:]}

    def _far(self, query, key, value, state, chunk, length):
        """Segment after segment: read the memory, then write; a segment joins the memory when it is complete."""
        dtype, (kv_heads, width) = wide(query), self.kv_shape
        query, key = F.elu(query.to(dtype)) + 1, F.elu(key.to(dtype)) + 1
        value, groups = value.to(dtype), self.shape[0] // kv_heads
        if state:
            memory, z, open_memory, open_z = (state[name] for name in ("memory", "z", "open_memory", "open_z"))
        else:
            memory = query.new_zeros(query.shape[0], kv_heads, width, width)
            z = query.new_zeros(query.shape[0], kv_heads, width)
            open_memory, open_z = memory, z
        segments = torch.where(chunk.valid, chunk.positions // length, -1)
        ends = chunk.valid & (chunk.positions % length == length - 1)
        out = query.new_zeros(query.shape)

        def read(heads, each):  # heads [B, T, n * each, K]
            grouped = heads.unflatten(2, (kv_heads, each))
            found = torch.einsum("btngk,bnkv->btngv", grouped, memory)
            return (found / (torch.einsum("btngk,bnk->btng", grouped, z) + MEMORY_EPS)[..., None]).flatten(2, 3)

        present = segments[segments >= 0].unique().tolist()
        for segment in present:
            mine = segments == segment
            times = mine.any(dim=0).nonzero().flatten()
            span = slice(int(times[0]), int(times[-1]) + 1)
            mask = mine[:, span, None, None].to(dtype)
            found = read(query[:, span], groups) * mask
            out = torch.cat([out[:, : span.start], out[:, span] + found, out[:, span.stop :]], dim=1)
            keys, news = key[:, span] * mask, value[:, span]
            if self.options["update"] == "segment_delta":
                news = news - read(key[:, span], 1)
            open_memory = open_memory + torch.einsum("btnk,btnv->bnkv", keys, news)
            open_z = open_z + keys.sum(dim=1)
            done = (ends & mine).any(dim=1)[:, None, None].to(dtype)
            memory, z = memory + done[..., None] * open_memory, z + done * open_z
            open_memory, open_z = (1 - done[..., None]) * open_memory, (1 - done) * open_z
        return out, {"memory": memory, "z": z, "open_memory": open_memory, "open_z": open_z}


class MLP(nn.Module):
    def __init__(self, config, options):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, options["d_ff"])
        self.up_proj = linear(config.hidden_size, options["d_ff"])
        self.down_proj = linear(options["d_ff"], config.hidden_size)

    def forward(self, x, state, chunk):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), {}


class ShortConvolution(nn.Conv1d):
    """silu of a causal depthwise convolution of x [B, T, C]; tail is the width - 1 inputs before, zeros for None."""

    def __init__(self, channels, width):
        super().__init__(channels, channels, width, groups=channels)

    def forward(self, x, tail):
        tail = x.new_zeros(x.shape[0], self.kernel_size[0] - 1, x.shape[2]) if tail is None else tail
        x = torch.cat([tail, x], dim=1)
        y = F.silu(super().forward(x.transpose(1, 2))).transpose(1, 2)
        return y, x[:, x.shape[1] - (self.kernel_size[0] - 1) :]


def scan(decay, update, state):
    """All states of s[t] = decay[t] s[t-1] + update[t], time second: by doubling, log2(SCAN) steps for SCAN tokens."""
    shift = 1
    while shift < decay.shape[1]:
        head_decay, head = decay[:, :shift], update[:, :shift]
        update = torch.cat([head, update[:, shift:] + decay[:, shift:] * update[:, :-shift]], dim=1)
        decay = torch.cat([head_decay, decay[:, shift:] * decay[:, :-shift]], dim=1)
        shift *= 2
    return update + decay * state[:, None]


class Mamba(nn.Module):
    """A selective state-space layer (arXiv 2312.00752); the state is the convolution's tail and h [B, inner, N]."""

    def __init__(self, config, options):
        super().__init__()
        inner, size, rank = options["expand"] * config.hidden_size, options["state_size"], options["dt_rank"]
        self.splits = (rank, size, size)
        self.in_proj = linear(config.hidden_size, 2 * inner)
        self.conv1d = ShortConvolution(inner, options["conv_width"])
        self.x_proj = linear(inner, rank + 2 * size)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = linear(inner, config.hidden_size)
        self.normed = options["dt_B_C_norm"]
        if self.normed:
            self.dt_layernorm = RMSNorm(rank, config.norm_eps)
            self.b_layernorm, self.c_layernorm = RMSNorm(size, config.norm_eps), RMSNorm(size, config.norm_eps)

    def forward(self, x, state, chunk):
        dtype, valid = wide(x), chunk.valid[..., None]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, tail = self.conv1d(x * valid, state.get("conv"))
        dt, B, C = self.x_proj(x).split(self.splits, dim=-1)
        if self.normed:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        dt = F.linear(dt, self.dt_proj.weight).to(dtype) + self.dt_proj.bias.to(dtype)
        dt = F.softplus(dt) * valid  # without time, nothing decays and nothing enters
        A = -self.A_log.to(dtype).exp()
        h = state.get("ssm", dt.new_zeros(x.shape[0], *A.shape))
        u, B, C, outs = x.to(dtype), B.to(dtype), C.to(dtype), []
        for start in range(0, x.shape[1], SCAN):
            part = slice(start, start + SCAN)
            states = scan((dt[:, part, :, None] * A).exp(), (dt * u)[:, part, :, None] * B[:, part, None], h)
            outs.append(torch.einsum("btdn,btn->btd", states, C[:, part]))
            h = states[:, -1]
        y = torch.cat(outs, dim=1) + self.D.to(dtype) * u
        return self.out_proj((y * F.silu(z.to(dtype))).to(x.dtype)), {"conv": tail, "ssm": h}


class Mamba2(nn.Module):
    """State-space duality (arXiv 2405.21060); the state is the convolution's tail and S [B, H, N, P]."""

    def __init__(self, config, options):
        super().__init__()
        self.options, self.eps = options, config.norm_eps
        inner, size = options["expand"] * config.hidden_size, options["num_groups"] * options["state_size"]
        self.heads = inner // options["head_dim"]
        self.splits = (inner, inner + 2 * size, self.heads)
        self.in_proj = linear(config.hidden_size, sum(self.splits))
        self.conv1d = ShortConvolution(inner + 2 * size, options["conv_width"])
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(inner, config.norm_eps)
        self.out_proj = linear(inner, config.hidden_size)

    def forward(self, x, state, chunk):
        dtype, valid, groups = wide(x), chunk.valid[..., None], self.options["num_groups"]
        size = self.options["state_size"]
        z, x, dt = self.in_proj(x).split(self.splits, dim=-1)
        x, tail = self.conv1d(x * valid, state.get("conv"))
        x, B, C = x.split((self.splits[0], groups * size, groups * size), dim=-1)
        x = x.unflatten(2, (self.heads, -1))
        spread = lambda array: array.to(dtype).unflatten(2, (groups, size)).repeat_interleave(self.heads // groups, 2)  # noqa: E731
        B, C = spread(B), spread(C)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        if self.options["dt_limit"] is not None:
            dt = dt.clamp(*self.options["dt_limit"])
        dt = dt * valid
        decay = -dt * self.A_log.to(dtype).exp()
        written = (x * dt[..., None]).to(x.dtype).to(dtype)
        S, outs = state.get("ssm", dt.new_zeros(x.shape[0], self.heads, size, x.shape[3])), []
        for start in range(0, x.shape[1], SCAN):
            part = slice(start, start + SCAN)
            out, S = self._chunk(C[:, part], B[:, part], written[:, part], decay[:, part], S)
            outs.append(out)
        y = torch.cat(outs, dim=1) + self.D.to(dtype)[:, None] * x.to(dtype)
        gated = y.flatten(2) * F.silu(z.to(dtype))
        normed = normalize(gated.unflatten(2, (groups, -1)), self.eps).flatten(2).to(z.dtype)
        return self.out_proj(normed * self.norm.weight.to(z.dtype)), {"conv": tail, "ssm": S}

    @staticmethod
    def _chunk(C, B, x, decay, S):
        """Some tokens: C, B [B, T, H, N], x [B, T, H, P], decay (logarithms) [B, T, H], S before -> (y, S after)."""
        decay = decay.transpose(1, 2)  # [B, H, T]
        time = decay.shape[2]
        later = torch.ones(time, time, dtype=torch.bool, device=x.device).tril(-1)
        between = decay[..., None].expand(*decay.shape, time).masked_fill(~later, 0).cumsum(dim=2)
        between = between.masked_fill(~later.logical_or(torch.eye(time, dtype=torch.bool, device=x.device)), -torch.inf)
        weights = torch.einsum("bthn,bshn->bhts", C, B) * between.exp()
        since = decay.cumsum(dim=2)
        y = torch.einsum("bhts,bshp->bthp", weights, x)
        y = y + torch.einsum("bthn,bhnp,bht->bthp", C, S, since.exp())
        left = between[:, :, -1].exp()  # of what each token wrote, at the end
        S = since[:, :, -1].exp()[..., None, None] * S + torch.einsum("bshn,bshp,bhs->bhnp", B, x, left)
        return y, S


MIXERS = {"attention": Attention, "infini": Infini, "mlp": MLP, "mamba": Mamba, "mamba2": Mamba2}


class Layer(nn.Module):
    def __init__(self, config, names):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        records = {name: config.mixers[name] for name in names}
        self.mixers = nn.ModuleDict({name: MIXERS[record["type"]](config, record) for name, record in records.items()})

    def forward(self, x, states, chunk):
        normed = self.norm(x).to(self.norm.weight.dtype)
        after = {}
        total = 0
        for name, mixer in self.mixers.items():
            y, after[name] = mixer(normed, states.get(name, {}), chunk)
            total = total + y.to(x.dtype)
        return x + total, after


class LcxPreTrainedModel(PreTrainedModel):
    config_class = LcxConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _is_stateful = True  # a state cannot go back to an earlier token
    _supports_sdpa = False

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # forward makes its own

    def _init_weights(self, module):
        loaded = getattr(getattr(module, "weight", None), "_is_hf_initialized", False)
        if isinstance(module, nn.Linear | nn.Embedding) and not loaded:
            module.weight.data.normal_(0.0, self.config.initializer_range)


class LcxModel(LcxPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        names = [config.pattern[index % len(config.pattern)] for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([Layer(config, each) for each in names])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, keep_hidden=False):
        """(hidden [B, T, D], the cache after, the stream before and after each layer if keep_hidden)."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, time = x.shape[:2]
        cache = past_key_values
        if cache is None:
            cache = LcxCache(len(self.layers), batch, x.device)
        valid = torch.ones(batch, time, dtype=torch.bool, device=x.device)
        if attention_mask is not None:
            valid = attention_mask[:, -time:].to(x.device, torch.bool)
        positions = cache.position[:, None] + valid.long().cumsum(dim=1) - 1
        chunk = Chunk(positions, valid)
        compute = self.norm.weight.dtype
        x = x.to(torch.promote_types(getattr(torch, self.config.residual_dtype), compute))
        streams = [x] if keep_hidden else None
        after = LcxCache(len(self.layers), batch, x.device)
        for index, layer in enumerate(self.layers):
            x, after.states[index] = layer(x, cache.states[index], chunk)
            if keep_hidden:
                streams.append(x)
        after.position, after.length = cache.position + valid.sum(dim=1), cache.length + time
        return self.norm(x).to(compute), after, streams


class LcxForCausalLM(LcxPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = LcxModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """The logits, at least float32, of the next tokens; with labels also the mean loss of labels[1:].

        attention_mask [B, T], or with the tokens before, is 0 for padding, which may stand before a row's tokens or
        after them. The cache that comes back is a new one: that which was given is not changed.
        """
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        keep = bool(output_hidden_states)
        hidden, cache, streams = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, keep)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.lm_head(hidden[:, kept])
        logits = logits.to(wide(logits))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(streams) if keep else None,
        )
        return out if return_dict in (None, True) else out.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, use_cache=True, **kwargs
    ):
        inputs = {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": use_cache}
        inputs["logits_to_keep"] = kwargs.get("logits_to_keep", 0)
        if past_key_values is None:
            first = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
            return inputs | first
        seen, given = past_key_values.get_seq_length(), input_ids.shape[1]
        if given > seen:  # all tokens; only the new ones are read
            input_ids = input_ids[:, seen:]
        elif inputs_embeds is not None:
            input_ids = input_ids[:, -1:]
        return inputs | {"input_ids": input_ids}
