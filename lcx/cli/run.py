"""A training run from beginning to end: the wiring behind `lcx train` and `lcx.train`."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

import lcx
import lcx_kernels
from lcx import data
from lcx.cli.material import make_material
from lcx.cli.suites import check_suites, find, keep
from lcx.config import Config
from lcx.evaluation.bigram import bigram_bits_per_byte
from lcx.evaluation.perplexity import Perplexity, make_score, perplexity
from lcx.evaluation.report import plot_loss
from lcx.evaluation.results import Result
from lcx.files import write_bytes, write_json
from lcx.models.generate import generate
from lcx.parallel import processes
from lcx.params import count_parameters
from lcx.planning import mfu
from lcx.planning.hardware import peak_flops
from lcx.training.beginning import with_beginning
from lcx.training.checkpointing import Checkpoints
from lcx.training.heartbeats import Peers
from lcx.training.preemption import interrupted, run_interruptible, stop_at
from lcx.training.quarantine import Quarantine
from lcx.training.telemetry import Silence, Telemetry
from lcx.training.train_state import TrainState
from lcx.training.trainer import Program, Surroundings, fit, make_programs, program_at
from lcx.training.watchdog import Watchdog
from lcx.training.workdir import Workdir, open_workdir

YARDSTICK = 2**28  # tokens of each source of prepared data that the bigram model is counted on
PROMPT, SAMPLE = 64, 400  # tokens of a held-out document, and how many the model writes after them


def run(config: Config | Mapping[str, Any], workdir: str, deadline: float | None = None) -> dict[str, Any]:
    """See `lcx.cli.train.train`. deadline: seconds since 1970, at which all must be saved."""
    with opened(Config.from_dict(config), workdir, deadline) as made:
        state = fit(made.programs, made.around)
        program = program_at(made.programs, int(state.data_index) - 1)  # of the last step
        made.in_loop.run(program, state)
        return finish(program, made.corpus, made.folder, made.heldout, state)


@dataclass(frozen=True)
class Opened:
    """A run that is about to begin."""

    programs: Sequence[Program]
    around: Surroundings
    corpus: data.Corpus
    folder: Workdir
    heldout: "HeldOut"
    in_loop: "InLoop"


@contextmanager
def opened(config: Config, workdir: str, deadline: float | None = None) -> Iterator[Opened]:
    """Everything that a run needs, found and checked in the order in which mistakes should be found; then closed."""
    processes.join()
    interrupted.patient = jax.process_count() > 1
    use_compilation_cache()
    programs = make_programs(config)
    corpus = run_interruptible(lambda: data.check_data(config))
    processes.check_same({"code of lcx": code_fingerprint(), "config": config.to_dict(), "data": corpus.fingerprint})
    with ExitStack() as stack:
        lock = open_workdir(workdir, config.to_dict(), {"data": corpus.fingerprint})
        processes.on_first(lambda: stack.enter_context(lock) and None)
        folder = Workdir.at(workdir)
        peers = Peers(folder.heartbeats, jax.process_index(), jax.process_count(), config.health.peer_timeout)
        stack.enter_context(peers.watching())
        speaker()(describe(programs, corpus, folder), flush=True)
        heldout, in_loop = HeldOut(config), InLoop(config, folder)
        rows = [program.rows for program in programs]
        programs = with_beginning(programs, folder.imported)
        keep = config.checkpoint
        checkpoints = Checkpoints(folder.checkpoints, keep.keep, print, keep.keep_every, keep.keep_best)
        stack.callback(checkpoints.close)
        around = Surroundings(
            checkpoints=checkpoints,
            quarantine=Quarantine(folder.path, lambda index: data.documents_of(config, index), speaker()),
            watchdog=Watchdog(config.health.step_timeout),
            telemetry=lambda step: report(config, folder, step),
            batches=lambda data_index: data.read_ahead(config, data_index, rows),
            evaluate=lambda state, program: (
                {"heldout_loss": heldout.score(program, state.params).loss} | in_loop.run(program, state)
            ),
            utilisation=Utilisation(),
        )
        if deadline is not None:
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(programs[0].abstract))
            stop_at(deadline, lambda: checkpoints.seconds_to_save(size) + around.watchdog.slowest_step)
        yield Opened(programs, around, corpus, folder, heldout, in_loop)


def report(config: Config, folder: Workdir, step: int) -> Telemetry | Silence:
    """What a run says from this step on; of several processes the first speaks."""
    if not processes.is_first():
        return Silence()
    tensorboard = folder.tensorboard if config.logging.tensorboard else None
    return Telemetry(folder.metrics, config.train.steps, step, tensorboard)


def code_fingerprint(packages: Sequence[ModuleType] = (lcx, lcx_kernels)) -> str:
    """SHA-256 of the packages' sources: two checkouts of one version may differ, and their numbers with them."""
    digest = hashlib.sha256()
    for package in packages:
        folder = Path(package.__file__ or "").parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another one."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lcx" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def describe(programs: Sequence[Program], corpus: data.Corpus, folder: Workdir) -> str:
    """What is about to be trained, for people."""
    program, config = programs[0], programs[0].config
    tokens = config.train.batch_size * config.train.sequence_length
    mesh = " x ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    documents, total = sum(map(len, corpus.collections)), sum(part.total for part in corpus.collections)
    return (
        f"{config.model.family}: {count_parameters(program.blueprint.shapes):,} parameters, {tokens:,} tokens a step "
        f"on {mesh} ({jax.devices()[0].device_kind})\n"
        f"data: {documents:,} documents, {total:,} tokens; held out "
        f"{len(corpus.heldout):,} documents, {corpus.heldout.tokens.size:,} tokens\n"
        f"workdir: {folder.path}; compiling (seconds to minutes, kept for the next time)"
    )


class Utilisation:
    """The model FLOPs utilisation of a run at some speed; None where a mixer or the chip's peak is not known."""

    def __init__(self):
        # By stage: the FLOPs of a document as long as its rows, and the chip's peak. The model is rebuilt for them.
        self._known: dict[int, tuple[int | None, float | None]] = {}

    def __call__(self, program: Program, tokens_per_second: float) -> float | None:
        stage, tokens = program.stage.number, program.config.train.sequence_length
        if stage not in self._known:
            model = program.blueprint.model(program.blueprint.shapes)
            peak = peak_flops(program.mesh.devices.flat[0].device_kind, str(model.compute_dtype))
            self._known[stage] = model.flops(tokens), peak
        flops, peak = self._known[stage]
        return mfu(flops, tokens, tokens_per_second, program.mesh.size, peak)


class HeldOut:
    """Scores parameters on the held-out rows of a run, of all its sources; compiles at a stage's first call."""

    def __init__(self, config: Config):
        self._config = config
        self._scores: dict[int, Callable] = {}

    def config_of(self, program: Program) -> Config:
        """What is scored in a stage: rows of its length, of what the whole run holds out."""
        return replace(program.config, data=self._config.data)

    def score(self, program: Program, params: dict) -> Perplexity:
        """In a thread, so that a signal is noticed at once; then it raises Interrupted."""
        return run_interruptible(lambda: self._score_all(program, params))

    def _score_all(self, program: Program, params: dict) -> Perplexity:
        config = self.config_of(program)
        batches = data.heldout_batches(config, config.evaluation.max_rows, program.rows)
        with program.on_mesh():
            return perplexity(lambda batch: self._call(program, params, program.put(batch)), batches)

    def _call(self, program: Program, params: dict, batch: dict[str, jax.Array]) -> tuple:
        stage = program.stage.number
        if stage not in self._scores:
            score = make_score(program.blueprint.model, program.config.train.loss_chunk_size)
            self._scores[stage] = jax.jit(score).lower(params, batch).compile()
            processes.meet()
        return self._scores[stage](params, batch)


class InLoop:
    """Runs the suites of a config inside training, on the run's mesh and its sharded parameters."""

    def __init__(self, config: Config, folder: Workdir):
        check_suites(config.evaluation)  # before anything is compiled
        self._config, self._folder = config, folder
        self._done: int | None = None  # the step that was evaluated last

    def run(self, program: Program, state: TrainState) -> dict[str, float]:
        """Writes down what the suites find and returns their scalars, as "suite/name"; nothing, if the step is done.

        In a thread, so that a signal is noticed at once; then it raises Interrupted. All processes compute, the first
        one writes.
        """
        step = int(state.step)
        if step == self._done or not self._config.evaluation.suite_names:
            return {}
        material = make_material(replace(program.config, data=self._config.data))
        model, evaluation = program.blueprint.model(state.params), self._config.evaluation

        def found() -> dict[str, Result]:
            with program.on_mesh():
                return dict(find(model, evaluation, material, say=speaker()))

        results = run_interruptible(found)
        self._done = step
        if processes.is_first():
            board = self._folder.tensorboard / "evaluation" if self._config.logging.tensorboard else None
            keep(results, self._folder.evaluation, board, step, evaluation)
        return {f"{suite}/{name}": value for suite, found in results.items() for name, value in found.scalars.items()}


def finish(
    program: Program, corpus: data.Corpus, folder: Workdir, heldout: HeldOut, state: TrainState
) -> dict[str, Any]:
    """Held-out loss, its yardstick, the loss curve and a sample: printed, and written to evaluation/.

    All processes compute; the first one says and writes what came of it.
    """
    config, say = heldout.config_of(program), speaker()
    result: dict[str, Any] = {"step": int(state.step), "parameters": count_parameters(program.blueprint.shapes)}
    scored = data.heldout_documents(config, config.evaluation.max_rows)
    baselines = {}
    anything = scored.tokens.size > len(scored)  # a document's first token is not predicted
    if anything:
        say(f"scoring {scored.tokens.size:,} held-out tokens", flush=True)
        score = heldout.score(program, state.params)
        result |= {"loss": score.loss, "bits_per_token": score.bits_per_token, "tokens": score.tokens}
        unit = "byte" if config.data.tokenizer == "bytes" else "token"
        say(f"held-out loss: {score.bits_per_token:.3f} bits per {unit} over {score.tokens:,} {unit}s")
    else:
        say("nothing of this corpus is held out, so there is no held-out loss")
    if anything and config.data.tokenizer == "bytes" and corpus.collections and scored.scored is None:
        train, start = data.joined(corpus.collections, YARDSTICK), config.data.start_token
        bigram = bigram_bits_per_byte(train.tokens, train.offsets, scored.tokens, scored.offsets, start)
        baselines["byte bigram"] = result["bigram_bits_per_token"] = bigram
        say(f"byte-bigram model on the same bytes: {bigram:.3f} bits per byte", end="")
        lead = bigram - result["bits_per_token"]
        say(f" (the model is {abs(lead):.3f} {'below' if lead >= 0 else 'above'})")
    if processes.is_first():
        write_json(folder.evaluation / "heldout.json", result)
        points = {result["step"]: result["bits_per_token"]} if anything else {}
        plot_loss(folder.metrics, folder.evaluation / "heldout.png", baselines, points)
    say(f"loss curve: {folder.evaluation / 'heldout.png'}")
    documents = scored if len(scored) else data.joined(corpus.collections, PROMPT)
    if len(documents):
        show_sample(program, folder, state, documents)
    return result


def speaker() -> Callable[..., None]:
    """`print` on the first process; what says nothing on the others."""
    return print if processes.is_first() else lambda *_, **__: None


def show_sample(program: Program, folder: Workdir, state: TrainState, documents: data.Documents) -> None:
    """Prints and writes what the model makes of the first tokens of a document."""
    tokenizer = data.load_tokenizer(program.config.data.tokenizer, program.config.data.start_token)
    prompt = documents.tokens[: documents.offsets[1]][:PROMPT].astype(np.int32)
    model = program.blueprint.model(state.params)

    def write() -> bytes:
        with program.on_mesh():
            tokens = generate(model, prompt[None], SAMPLE, temperature=0.8, top_p=0.95, seed=program.config.train.seed)
            return tokenizer.decode([*prompt, *(int(token[0]) for token in tokens)])

    text = run_interruptible(write)
    if not processes.is_first():
        return
    write_bytes(folder.evaluation / "sample.txt", text)
    print(f"a sample, after the first {len(prompt)} tokens of {documents.names[0]}:\n")
    readable = (
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text.decode(errors="replace")
    )
    print("".join(readable), flush=True)
