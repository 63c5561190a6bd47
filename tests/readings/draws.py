"""What the tests of the readings share: seeded draws, and attention written as one matrix."""

import numpy as np

D, H, n, K, F, VOCABULARY = 6, 4, 2, 4, 5, 11
LENGTHS = (7, 1, 10)  # documents of a row: none a whole number of segments, one of a single token


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape) / 2


def row(lengths):
    """positions [T] of documents of these lengths, and the slice of each."""
    ends = np.cumsum(lengths)
    return np.concatenate([np.arange(m) for m in lengths]), [
        slice(e - m, e) for e, m in zip(ends, lengths, strict=True)
    ]


def heads_weights(seed=0):
    shapes = dict(query=(D, H, K), key=(D, n, K), value=(D, n, K), output=(H, K, D))
    return {name: draw([seed, i], *shape) for i, (name, shape) in enumerate(shapes.items())}


def mamba_weights(seed=0, width=4, inner=2 * D, N=3, rank=2):
    shapes = dict(
        in_proj=(D, 2 * inner), conv_weight=(inner, width), conv_bias=(inner,), x_proj=(inner, rank + 2 * N),
        dt_proj=(rank, inner), dt_bias=(inner,), A_log=(inner, N), skip=(inner,), out_proj=(inner, D),
    )  # fmt: skip
    return {name: draw([seed, i], *shape) for i, (name, shape) in enumerate(shapes.items())}


def model_weights(mixers):
    """A model of two layers for each mixer's weights: the mixer and an MLP."""
    mlps = [
        dict(gate=draw([i, 90], D, F), up=draw([i, 91], D, F), down=draw([i, 92], F, D)) for i in range(len(mixers))
    ]
    layers = [each for pair in zip(mixers, mlps, strict=True) for each in pair]
    norms = [1 + draw([i, 93], D) for i in range(len(layers))]
    return dict(
        embedding=draw(94, VOCABULARY, D),
        final_norm=1 + draw(95, D),
        layers=[dict(norm=norm, weights=own) for norm, own in zip(norms, layers, strict=True)],
    )


def turned(x, positions, base=100.0):
    """RoPE by complex numbers: the halves of x [T, ..., K] are the real and the imaginary part."""
    half = x.shape[-1] // 2
    angles = np.multiply.outer(np.asarray(positions), base ** (-np.arange(half) / half))
    angles = angles.reshape(len(x), *[1] * (x.ndim - 2), half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


def dense(q, k, v, visible, extra=None):
    """Softmax attention by one [H, T, S] matrix; `visible` [T, S]; `extra` [H] joins the denominator."""
    k, v = (np.repeat(each, q.shape[1] // each.shape[1], axis=1) for each in (k, v))
    masses = np.exp(np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])) * visible
    total = masses.sum(-1) + (0 if extra is None else np.exp(extra)[:, None])
    return np.einsum("hts,shv->thv", masses / total[..., None], v)


def dense_heads(x, weights):
    return [np.einsum("td,dhk->thk", x, weights[name]) for name in ("query", "key", "value")]


def same_document(positions):
    document = np.cumsum(np.asarray(positions) == 0)
    index = np.arange(len(document))
    return (document[:, None] == document) & (index[:, None] >= index)
