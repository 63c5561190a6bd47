"""lm-evaluation-harness (pip: lm-eval) on lcx's own models.

    import lcx, lm_eval
    from lcx.interop.harness import HarnessModel

    model = HarnessModel(*lcx.load("runs/samba"))
    results = lm_eval.simple_evaluate(model, tasks=["lambada_openai"])

Texts are encoded, cut and normalised as the harness's own `hf` model does it, so that numbers are those of the export.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lcx.models import LanguageModel
from lcx.models.generate import generate
from lcx.params import split

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

SHORTEST = 64  # tokens of a scored row; longer ones are doubled, so that few programs are compiled
SLICE = 128  # tokens of a row whose logits exist at one time
NEW_TOKENS = 256  # where a task does not say how many


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those that `lcx.load` gives have it."""

    vocab_size: int
    start_token: int | None
    end_token: int | None

    def encode(self, document: str) -> np.ndarray: ...

    def decode(self, tokens: Iterable[int]) -> bytes: ...


class HarnessModel(TemplateLM):
    """A model as the harness asks for it: `loglikelihood`, `loglikelihood_rolling` and `generate_until`."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, batch_size: int = 8, max_length: int = 2048):
        """Wraps a model.

        Args:
          model, tokenizer: as `lcx.load` gives them. Logits beyond the tokenizer's vocabulary are padding.
          batch_size: texts scored at once.
          max_length: tokens that a prediction may look at; longer texts are cut from the left, or into windows. An
            export gives the harness train.sequence_length here.
        """
        super().__init__()
        self.lcx_tokenizer, self.batch_size, self.max_length = tokenizer, batch_size, max_length
        self._model = model
        self._graphdef, self._params = split(model)
        self._columns = min(tokenizer.vocab_size, model.embedding.table.shape[0])

    @property
    def eot_token_id(self) -> int:
        """What stands for the end of a text: it ends a continuation."""
        end = self.lcx_tokenizer.end_token
        return 0 if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        start = self.lcx_tokenizer.start_token
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, after the start token where there is one and add_special_tokens is not False."""
        tokens = self.lcx_tokenizer.encode(string).tolist()
        return tokens[1:] if add_special_tokens is False and self.lcx_tokenizer.start_token is not None else tokens

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in nats."""
        del disable_tqdm
        texts = [request.args[0] for request in requests]
        windows = [(number, window) for number, text in enumerate(texts) for window in self._windows(text)]
        totals = [0.0] * len(texts)
        scores = self._loglikelihood_tokens([(("", ""), *window) for _, window in windows])
        for (number, _), (score, _) in zip(windows, scores, strict=True):
            totals[number] += score
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text)
        return [*map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1))]

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: Any) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): log-likelihood in nats, whether all its tokens are the likeliest."""
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        found: dict[int, tuple[float, bool]] = {}
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            scores, likeliest = self._score([rows[index] for index in batch])
            for row, index in enumerate(batch):
                length, count = len(rows[index]) - 1, len(requests[index][2])
                part = slice(length - count, length)
                found[index] = (float(scores[row, part].sum()), bool(likeliest[row, part].all()))
        return [found[index] for index in range(len(rows))]

    def _score(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Of each row's tokens but the first: float64 log-likelihoods [batch, time], and whether they are likeliest."""
        time = SHORTEST
        while time < len(rows[0]) - 1:
            time *= 2
        tokens = np.zeros((self.batch_size, time + 1), np.int32)
        for row, content in enumerate(rows):
            tokens[row, : len(content)] = content
        scores, likeliest = _scores(self._graphdef, self._columns, self._params, tokens)
        return np.asarray(scores, np.float64), np.asarray(likeliest)

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text, up to the first of the stop sequences, without it."""
        del disable_tqdm
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        found: dict[int, str] = {}
        for members in groups.values():
            prompts = {index: self._prompt(*requests[index].args) for index in members}
            members.sort(key=lambda index, prompts=prompts: len(prompts[index]))
            for begin in range(0, len(members), self.batch_size):
                batch = members[begin : begin + self.batch_size]
                settings = normalize_gen_kwargs(requests[batch[0]].args[1], NEW_TOKENS)
                texts = self._continue([prompts[index] for index in batch], settings)
                found |= dict(zip(batch, texts, strict=True))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[index])
        return [found[index] for index in range(len(requests))]

    def _prompt(self, context: str, settings: dict[str, Any]) -> np.ndarray:
        room = max(1, self.max_length - normalize_gen_kwargs(settings, NEW_TOKENS)["max_gen_toks"])
        return np.array((self.tok_encode(context) or [self.prefix_token_id])[-room:], np.int32)

    def _continue(self, prompts: Sequence[np.ndarray], settings: dict[str, Any]) -> list[str]:
        stop = handle_stop_sequences(settings.get("until"), eos=None)
        choice = {name: settings[name] for name in ("top_k", "top_p") if name in settings}
        choice["temperature"] = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
        written: list[list[int]] = [[] for _ in prompts]
        texts, open_rows = [""] * len(prompts), set(range(len(prompts)))
        for tokens in generate(self._model, prompts, settings["max_gen_toks"], chunk_size=SLICE, **choice):
            for row in sorted(open_rows):
                token = int(tokens[row])
                if token != self.lcx_tokenizer.end_token:
                    written[row].append(token)
                    texts[row] = self.lcx_tokenizer.decode(written[row]).decode(errors="replace")
                if token == self.lcx_tokenizer.end_token or any(word and word in texts[row] for word in stop):
                    open_rows.remove(row)
            if not open_rows:
                break
        return [postprocess_generated_text(text, stop, None) for text in texts]


@partial(jax.jit, static_argnums=(0, 1))
def _scores(graphdef: nnx.GraphDef, columns: int, params: dict, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of tokens[:, 1:], from the first `columns` logits: log-probability [batch, time], whether it is the largest."""
    model = nnx.merge(graphdef, params)
    hidden, _, _ = model.hidden(tokens[:, :-1])
    count = -(-hidden.shape[1] // SLICE)
    padding = ((0, 0), (0, count * SLICE - hidden.shape[1]))
    cut = lambda array: jnp.moveaxis(array.reshape(len(array), count, SLICE, *array.shape[2:]), 1, 0)  # noqa: E731

    def scores(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = part
        logits = model.logits(hidden)[..., :columns]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    parts = jax.lax.map(scores, (cut(jnp.pad(hidden, (*padding, (0, 0)))), cut(jnp.pad(tokens[:, 1:], padding))))
    return tuple(jnp.moveaxis(part, 0, 1).reshape(len(tokens), -1)[:, : hidden.shape[1]] for part in parts)
