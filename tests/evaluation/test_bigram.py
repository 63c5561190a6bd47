import itertools

import numpy as np
import pytest

from lcx.evaluation.bigram import bigram_bits_per_byte, count_pairs, fit_weights


def pack(documents):
    return np.frombuffer(b"".join(documents), np.uint8), np.cumsum([0, *map(len, documents)])


def naive_counts(documents):
    counts = np.zeros((257, 256))
    for document in documents:
        for previous, following in itertools.pairwise(document):
            counts[previous, following] += 1
    return counts


def naive_probability(counts, weights, previous, following):
    unigram = counts[:, following].sum() / counts.sum()
    row = counts[previous].sum()
    bigram = counts[previous, following] / row if row else unigram
    return weights[0] / 256 + weights[1] * unigram + weights[2] * bigram


def naive_bits(train, heldout):
    tuning = train[19::20]
    part = naive_counts([document for i, document in enumerate(train) if i % 20 != 19])
    pairs = [pair for document in tuning for pair in itertools.pairwise(document)]
    weights = np.full(3, 1 / 3)
    units = np.eye(3)
    for _ in range(1000):
        shares = np.zeros(3)
        for pair in pairs:
            terms = np.array([weights[k] * naive_probability(part, units[k], *pair) for k in range(3)])
            shares += terms / terms.sum()
        weights = (shares + 1) / (len(pairs) + 3)
    full = naive_counts(train)
    bits = [
        -np.log2(naive_probability(full, weights, *pair))
        for document in heldout
        for pair in itertools.pairwise(document)
    ]
    return np.mean(bits)


def random_documents(count, seed, alphabet=6):
    rng = np.random.default_rng(seed)
    return [bytes(rng.integers(97, 97 + alphabet, rng.integers(1, 12)).tolist()) for _ in range(count)]


def test_pairs_do_not_cross_documents(monkeypatch):
    documents = random_documents(50, 0)
    tokens, offsets = pack(documents)
    for chunk in (1 << 22, 7, 1):
        monkeypatch.setattr("lcx.evaluation.bigram.CHUNK", chunk)
        assert np.array_equal(count_pairs(tokens, offsets).reshape(256, 256), naive_counts(documents)[:256])
    assert count_pairs(tokens[:0], np.zeros(1, int)).sum() == 0
    assert count_pairs(tokens[:1], np.array([0, 0, 1, 1])).sum() == 0  # empty documents too


def test_bits_equal_a_naive_computation():
    train, heldout = random_documents(60, 1), [*random_documents(10, 2, alphabet=8), b"a", b"zzz"]
    got = bigram_bits_per_byte(*pack(train), *pack(heldout))
    assert got == pytest.approx(naive_bits(train, heldout), abs=1e-6)


def test_a_start_token_is_a_context_and_nothing_else():
    """Of documents that a row cut, the first token is a byte, and only a context too."""
    start = 300
    train = [b"\0" + text for text in random_documents(60, 1)]
    heldout = [*random_documents(10, 2, alphabet=8), b"a", b"\0zz"]
    expected = naive_bits([[256, *text] for text in train], [*([256, *text] for text in heldout), b"abab"])
    began = lambda documents: [[start, *text] for text in documents]  # noqa: E731
    pack = lambda documents: (np.concatenate(documents).astype(np.uint16), np.cumsum([0, *map(len, documents)]))  # noqa: E731
    got = bigram_bits_per_byte(*pack(began(train)), *pack([*began(heldout), list(b"abab")]), start)
    assert got == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="got other tokens"):
        bigram_bits_per_byte(*pack(began(train)), *pack(began(heldout)), 301)


def test_known_answers():
    rng = np.random.default_rng(0)
    uniform = [rng.bytes(5000) for _ in range(40)]
    assert 7.99 < bigram_bits_per_byte(*pack(uniform), *pack([rng.bytes(50_000)])) < 8.02
    cycle = [bytes(range(256)) * 4] * 40
    assert bigram_bits_per_byte(*pack(cycle), *pack([bytes(range(256))])) < 0.03
    # Too few documents to fit weights: equal weights, and a never-seen byte still costs finitely many bits.
    assert bigram_bits_per_byte(*pack([b"ab"]), *pack([b"xy"])) == pytest.approx(-np.log2(1 / 3 / 256))


def test_em_finds_the_mixture():
    rng = np.random.default_rng(0)
    components = rng.dirichlet(np.ones(50) * 0.3, size=3)
    weights = np.array([0.2, 0.5, 0.3])
    counts = rng.multinomial(1_000_000, weights @ components)
    assert np.allclose(fit_weights(components, counts), weights, atol=0.01)


def test_only_bytes_and_only_something():
    data = pack([b"abc"])
    with pytest.raises(ValueError, match="uint8"):
        bigram_bits_per_byte(data[0].astype(np.int32), data[1], *data)
    with pytest.raises(ValueError, match="no held-out byte"):
        bigram_bits_per_byte(*data, *pack([b"a", b"b"]))
