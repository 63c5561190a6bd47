"""Training recipes that several config files share: a published run's numbers as fields of a config.

A published run keeps its tokens a step at any sequence length, so that its learning rate and its steps stay what they
are. Everything is recomputed in the backward pass, which no paper says; choose otherwise where memory allows.
"""

import math

from ml_collections import ConfigDict

GPT3_WARMUP_TOKENS = 375e6  # stands in for warm-ups that are not published
# d_model: tokens a step, in rows of 2048, and five times GPT-3's learning rate.
PILE = {
    768: (2**19, 3e-3),
    1024: (2**19, 1.5e-3),
    1536: (2**19, 1.25e-3),
    2048: (2**20, 1e-3),
    2560: (2**20, 8e-4),
}


def tiny(config: ConfigDict, sequence_length: int) -> None:
    """A minute on two CPU cores."""
    config.train.update(steps=200, batch_size=8, sequence_length=sequence_length)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=20)
    config.checkpoint.every = 50


def slimpajama(config: ConfigDict, sequence_length: int, tokens: float, batch_size: int, learning_rate: float) -> None:
    """SAMBA's runs (arXiv 2406.07522, section 4): rows of 4096 tokens, AdamW that decays every parameter, cosine to a
    tenth, a warm-up of 1% of the tokens. `batch_size` rows a step."""
    tokens_per_step = batch_size * 4096
    steps = math.ceil(tokens / tokens_per_step)
    published(config, sequence_length, tokens_per_step, steps)
    config.optimizer.update(
        learning_rate=learning_rate, warmup_steps=steps // 100, final_ratio=0.1, weight_decay=0.1, decay_all=True
    )


def gpt3_like(config: ConfigDict, sequence_length: int, tokens_per_step: int, steps: int, learning_rate: float) -> None:
    """The Mamba papers' runs (arXiv 2312.00752, appendix E.2): AdamW, cosine to 1e-5."""
    published(config, sequence_length, tokens_per_step, steps)
    warmup = round(GPT3_WARMUP_TOKENS / tokens_per_step)
    config.optimizer.update(learning_rate=learning_rate, warmup_steps=warmup, final_ratio=1e-5 / learning_rate)


def pile(config: ConfigDict, sequence_length: int) -> None:
    """The runs of the Mamba papers' checkpoints, by the model's width: 300e9 tokens of the Pile."""
    tokens_per_step, learning_rate = PILE[config.model.d_model]
    gpt3_like(config, sequence_length, tokens_per_step, math.ceil(300e9 / tokens_per_step), learning_rate)


def published(config: ConfigDict, sequence_length: int, tokens_per_step: int, steps: int) -> None:
    """The shape of a published run; its optimizer is set by the caller."""
    rows = max(1, tokens_per_step // sequence_length)
    config.train.update(steps=steps, batch_size=rows, sequence_length=sequence_length)
    config.model.remat = {name: "full" for name in config.model.mixers}
