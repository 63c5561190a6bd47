"""The yardstick of the quickstart: a byte-bigram model interpolated with unigram and uniform.

    p(next | previous) = w2 * bigram(next | previous) + w1 * unigram(next) + w0 / 256

The weights come from documents that the counts have not seen (Jelinek and Mercer, 1980): counts on 95% of the
training documents, weights by expectation maximisation on the other 5%, then counts on all of them.

A start token, where documents have one, is one more thing that can be previous, and never what is next.
"""

import numpy as np

VOCABULARY = 256
TUNING_SHARE = 20
"""One training document in this many fits the weights."""
CHUNK = 1 << 22
"""Pairs counted at a time, so that the 64-bit copy np.bincount makes stays small."""


def bigram_bits_per_byte(
    train_tokens: np.ndarray,
    train_offsets: np.ndarray,
    heldout_tokens: np.ndarray,
    heldout_offsets: np.ndarray,
    start_token: int | None = None,
) -> float:
    """Bits per byte of the held-out documents: each token once but a document's first, which has no previous one.

    Args: tokens, uint8 [tokens], or integers where there is a start token, documents end to end; offsets, integers
    [documents + 1], document d being tokens[offsets[d] : offsets[d + 1]]; start_token, above 255, the first token of
    documents, unless they were cut there, and of nothing else.

    Raises ValueError if a token is neither a byte nor the start token, or if there is no held-out byte to score.
    """
    symbols = VOCABULARY if start_token is None else VOCABULARY + 1
    train_tokens, heldout_tokens = (_symbols(tokens, start_token) for tokens in (train_tokens, heldout_tokens))
    scored = count_pairs(heldout_tokens, heldout_offsets, symbols)
    if not scored.sum():
        raise ValueError("there is no held-out byte to score")
    counts = count_pairs(train_tokens, train_offsets, symbols)
    chosen = _take_documents(train_tokens, train_offsets, slice(TUNING_SHARE - 1, None, TUNING_SHARE))
    tuning = count_pairs(*chosen, symbols)
    weights = fit_weights(_components(counts - tuning), tuning)
    return float(-(scored * np.log2(weights @ _components(counts))).sum() / scored.sum())


def _symbols(tokens: np.ndarray, start_token: int | None) -> np.ndarray:
    """Bytes as uint8; bytes and the start token as uint16, that one being VOCABULARY."""
    if start_token is None:
        if tokens.dtype != np.uint8:
            raise ValueError(f"a byte-bigram model needs uint8 tokens, got {tokens.dtype}")
        return tokens
    if ((tokens >= VOCABULARY) & (tokens != start_token)).any():
        raise ValueError(f"a byte-bigram model needs bytes and the start token {start_token}, got other tokens")
    return np.minimum(tokens, VOCABULARY).astype(np.uint16)


def count_pairs(tokens: np.ndarray, offsets: np.ndarray, symbols: int = VOCABULARY) -> np.ndarray:
    """How often byte j follows symbol i in a document, int64 [symbols * 256] at i * 256 + j.

    Symbols are bytes, and with symbols=257 also 256, which only ever is a document's first.
    """
    pair = lambda previous, following: previous.astype(np.uint32) * np.uint32(symbols) + following  # noqa: E731
    counts = np.zeros(symbols**2, np.int64)
    for start in range(0, tokens.size - 1, CHUNK):
        chunk = tokens[start : start + CHUNK + 1]
        counts += np.bincount(pair(chunk[:-1], chunk[1:]), minlength=symbols**2)
    borders = np.unique(offsets)
    borders = borders[(borders > 0) & (borders < tokens.size)]
    counts -= np.bincount(pair(tokens[borders - 1], tokens[borders]), minlength=symbols**2)
    return counts.reshape(symbols, symbols)[:, :VOCABULARY].ravel()


def _take_documents(tokens: np.ndarray, offsets: np.ndarray, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of some of the documents."""
    starts, ends = offsets[:-1][chosen], offsets[1:][chosen]
    pieces = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
    return np.concatenate([tokens[:0], *pieces]), np.cumsum([0, *(ends - starts)])


def _components(counts: np.ndarray) -> np.ndarray:
    """Uniform, unigram and bigram probabilities of each pair's second byte, float64 [3, symbols * 256].

    Each sums to 1 over the second byte: a byte that was never seen as the first of a pair gives the unigram, and counts
    of nothing give the uniform distribution.
    """
    table = counts.reshape(-1, VOCABULARY).astype(np.float64)
    uniform = np.full_like(table, 1 / VOCABULARY)
    unigram = np.broadcast_to(table.sum(0) / table.sum(), table.shape) if table.sum() else uniform
    totals = table.sum(1, keepdims=True)
    bigram = np.where(totals > 0, table / np.maximum(totals, 1), unigram)
    return np.stack([uniform, unigram, bigram]).reshape(3, -1)


def fit_weights(components: np.ndarray, counts: np.ndarray, iterations: int = 1000) -> np.ndarray:
    """Weights of a mixture, float64 [components], that make the counted pairs likely, by expectation maximisation.

    A component's new weight is the mean of its shares of the pairs' probabilities. One more pair is credited to each
    component, so that no weight is 0 (a pair that only the uniform component allows would cost infinitely many bits)
    and all are equal where there is nothing to fit.
    """
    weights = np.full(len(components), 1 / len(components))
    seen = counts > 0
    components, counts = components[:, seen], counts[seen]
    for _ in range(iterations):
        shares = weights[:, None] * components
        credit = (shares / shares.sum(0)) @ counts + 1
        weights = credit / credit.sum()
    return weights
