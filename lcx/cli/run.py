"""A training run from beginning to end: the wiring behind `lcx train` and `lcx.train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcx import data
from lcx.config import Config
from lcx.evaluation.bigram import bigram_bits_per_byte
from lcx.evaluation.perplexity import Perplexity, make_score, perplexity
from lcx.evaluation.report import plot_loss
from lcx.files import write_bytes, write_json
from lcx.models.generate import generate
from lcx.params import count_parameters
from lcx.training.checkpointing import Checkpoints
from lcx.training.preemption import run_interruptible
from lcx.training.telemetry import Telemetry
from lcx.training.train_state import TrainState
from lcx.training.trainer import Program, begin_from, fit, make_program
from lcx.training.workdir import Workdir, open_workdir

PROMPT, SAMPLE = 64, 400  # tokens of a held-out document, and how many the model writes after them


def run(config: Config | Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """See `lcx.cli.train.train`."""
    config = Config.from_dict(config)
    use_compilation_cache()
    program = make_program(config)
    corpus = data.training_corpus(config)
    with open_workdir(workdir, config.to_dict(), {"data": corpus.fingerprint}) as folder:
        print(describe(program, corpus, folder), flush=True)
        program = begin_from(program, folder.imported)
        heldout = HeldOut(program)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, say=print)
        tensorboard = folder.tensorboard if config.logging.tensorboard else None
        try:
            state = fit(
                program,
                checkpoints,
                telemetry=lambda step: Telemetry(folder.metrics, config.train.steps, step, tensorboard),
                batches=lambda data_index: data.read_ahead(config, data_index),
                evaluate=lambda params, step: {"heldout_loss": heldout.score(params).loss},
            )
        finally:
            checkpoints.close()
        return finish(program, corpus, folder, heldout, state)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another one."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lcx" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def describe(program: Program, corpus: data.Corpus, folder: Workdir) -> str:
    """What is about to be trained, for people."""
    config = program.config
    tokens = config.train.batch_size * config.train.sequence_length
    mesh = " x ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    return (
        f"{config.model.family}: {count_parameters(program.blueprint.shapes):,} parameters, {tokens:,} tokens a step "
        f"on {mesh} ({jax.devices()[0].device_kind})\n"
        f"data: {len(corpus.train):,} documents, {corpus.train.tokens.size:,} tokens; held out "
        f"{len(corpus.heldout):,} documents, {corpus.heldout.tokens.size:,} tokens\n"
        f"workdir: {folder.path}; compiling (seconds to minutes, kept for the next time)"
    )


class HeldOut:
    """Scores parameters on the held-out rows of a run; compiles at the first call."""

    def __init__(self, program: Program):
        self._program = program
        self._score = jax.jit(make_score(program.blueprint.model, program.config.train.loss_chunk_size))

    def score(self, params: dict) -> Perplexity:
        """In a thread, so that a signal is noticed at once; then it raises Interrupted."""
        return run_interruptible(lambda: self._score_all(params))

    def _score_all(self, params: dict) -> Perplexity:
        config = self._program.config
        batches = data.heldout_batches(config, config.evaluation.max_rows)
        with jax.set_mesh(self._program.mesh):
            return perplexity(lambda batch: self._score(params, self._program.put(batch)), batches)


def finish(
    program: Program, corpus: data.Corpus, folder: Workdir, heldout: HeldOut, state: TrainState
) -> dict[str, Any]:
    """Held-out loss, its yardstick, the loss curve and a sample: printed, and written to evaluation/."""
    config = program.config
    result: dict[str, Any] = {"step": int(state.step), "parameters": count_parameters(program.blueprint.shapes)}
    scored = data.heldout_documents(config, config.evaluation.max_rows)
    baselines = {}
    anything = scored.tokens.size > len(scored)  # a document's first token is not predicted
    if anything:
        print(f"scoring {scored.tokens.size:,} held-out tokens", flush=True)
        score = heldout.score(state.params)
        result |= {"loss": score.loss, "bits_per_token": score.bits_per_token, "tokens": score.tokens}
        unit = "byte" if config.data.tokenizer == "bytes" else "token"
        print(f"held-out loss: {score.bits_per_token:.3f} bits per {unit} over {score.tokens:,} {unit}s")
    else:
        print("nothing of this corpus is held out, so there is no held-out loss")
    if anything and config.data.tokenizer == "bytes":
        train, start = corpus.train, config.data.start_token
        bigram = bigram_bits_per_byte(train.tokens, train.offsets, scored.tokens, scored.offsets, start)
        baselines["byte bigram"] = result["bigram_bits_per_token"] = bigram
        print(f"byte-bigram model on the same bytes: {bigram:.3f} bits per byte", end="")
        lead = bigram - result["bits_per_token"]
        print(f" (the model is {abs(lead):.3f} {'below' if lead >= 0 else 'above'})")
    write_json(folder.evaluation / "heldout.json", result)
    points = {result["step"]: result["bits_per_token"]} if anything else {}
    plot_loss(folder.metrics, folder.evaluation / "heldout.png", baselines, points)
    print(f"loss curve: {folder.evaluation / 'heldout.png'}")
    show_sample(program, folder, state, scored if len(scored) else corpus.train)
    return result


def show_sample(program: Program, folder: Workdir, state: TrainState, documents: data.Documents) -> None:
    """Prints and writes what the model makes of the first tokens of a document."""
    tokenizer = data.load_tokenizer(program.config.data.tokenizer, program.config.data.start_token)
    prompt = documents.tokens[: documents.offsets[1]][:PROMPT].astype(np.int32)
    model = program.blueprint.model(state.params)

    def write() -> bytes:
        with jax.set_mesh(program.mesh):
            tokens = generate(model, prompt[None], SAMPLE, temperature=0.8, top_p=0.95, seed=program.config.train.seed)
            return tokenizer.decode([*prompt, *(int(token[0]) for token in tokens)])

    text = run_interruptible(write)
    write_bytes(folder.evaluation / "sample.txt", text)
    print(f"a sample, after the first {len(prompt)} tokens of {documents.names[0]}:\n")
    readable = (
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text.decode(errors="replace")
    )
    print("".join(readable), flush=True)
