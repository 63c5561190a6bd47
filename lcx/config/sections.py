"""The sections of a config as frozen dataclasses, with their units and limits: what a run is made of.

`Config.from_dict` refuses unknown keys and impossible values. What only a model can know (heads that do not divide, a
mixer's options, the pattern) is validated where the model is built.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from lcx.errors import UserError, suggest
from lcx.schema import build, limited, plain

MESH_AXES = ("data", "fsdp", "seq", "tensor")
SEED_LIMIT = 2**31 - 1
Dtype = Literal["float32", "bfloat16", "float64"]
REMAT = ("none", "dots", "offload", "full")  # and "time:TOKENS"
DEFAULT_REMAT = "dots"


def remat_chunk(policy: str) -> int | None:
    """The tokens of a chunk of the remat policy "time:TOKENS"; None for any other text."""
    found = re.fullmatch(r"time:([1-9]\d*)", policy)
    return int(found[1]) if found else None


class Section:
    """What every part of a config can do."""

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """An instance from a ConfigDict, a mapping or an instance (validated again); raises UserError."""
        return build(cls, values, cls.__name__.removesuffix("Config").lower())

    def to_dict(self) -> dict:
        """The same as dicts, lists and scalars, for JSON; `from_dict` of it gives an equal instance."""
        return plain(asdict(self))

    @cached_property
    def key(self) -> str:
        """`to_dict` as JSON: equal for equal sections, and hashable, so that functions of it can be cached by it."""
        return json.dumps(self.to_dict(), sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A residual stack: the pattern's mixers, `periods` times, between embedding and head."""

    family: str = "custom"  # for people and reports; nothing is computed from it
    pattern: str = ""  # names of mixers, "mamba mlp swa mlp"; parallel(a, b) sums two mixers of one input
    mixers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name: {type, and the options of that type}
    periods: int = limited(1, minimum=1)  # repeats of the pattern
    d_model: int = limited(128, minimum=1)  # width of the residual stream
    vocab_size: int = limited(256, minimum=2)  # rows of the embedding
    tie_embeddings: bool = True  # the head is the embedding
    norm_eps: float = limited(1e-5, above=0)  # added to the mean square in every RMSNorm
    init: Literal["fan_in", "small", "normal"] = "fan_in"  # a scheme of lcx.layers.initializers
    # muP: the width at which learning rates were found, to be used at any other. None: the standard parametrisation.
    mup_base_width: int | None = limited(None, minimum=1)
    param_dtype: Dtype = "float32"  # parameters and optimizer state
    compute_dtype: Literal["auto", Dtype] = "auto"  # activations; auto: bfloat16, on CPU float32
    residual_dtype: Dtype = "float32"  # the residual stream, which is at least compute_dtype
    # Mixer: what its backward pass computes again: nothing ("none"), what lies between matrix products and kernels
    # ("dots", which a mixer that is not named has; "offload", with the rest kept in the host's memory), all ("full"),
    # or all, chunk by chunk from the states between chunks ("time:2048", of 2,048 tokens).
    remat: Mapping[str, str] = field(default_factory=dict)

    @property
    def remat_policies(self) -> dict[str, str]:
        """The remat policy of each mixer, be it named in `remat` or not."""
        return {name: self.remat.get(name, DEFAULT_REMAT) for name in self.mixers}

    def __post_init__(self):
        for name, policy in self.remat.items():
            key = f"model.remat.{name}"
            if name not in self.mixers:
                raise UserError(f"{key}: no mixer has this name: {suggest(name, self.mixers)}")
            if policy not in REMAT and remat_chunk(policy) is None:
                raise UserError(f'{key} cannot be "{policy}": {suggest(policy, (*REMAT, "time:TOKENS"))}')


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One corpus of the mixture."""

    name: str  # in reports, and in the weights of a stage
    path: str  # file or folder; "stdlib" is the source code of the running Python's standard library
    format: str = "auto"  # a name of lcx.data.readers.FORMATS; auto: by the file names
    weight: float = limited(1.0, above=0)  # share of the mixture's rows, relative to the other sources'
    loss_weight: float = limited(1.0, minimum=0)  # of each of its tokens in the loss; 0: read, never a target
    # Shortest length in tokens: how much more often than by chance documents of that length are read, up to the next
    # length of the mapping: {"0": 1, "8192": 4}. Empty: all alike.
    length_weights: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of the format, or of a synthetic task

    def __post_init__(self):
        borders = [name for name in self.length_weights if not name.isdigit()]
        if borders:
            raise UserError(
                f'data.sources "{self.name}": length_weights are by length in tokens, like "8192", not "{borders[0]}".'
            )
        if any(weight < 0 for weight in self.length_weights.values()):
            raise UserError(f'data.sources "{self.name}": length_weights must be at least 0.')


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where tokens come from. A batch is a pure function of this section, batch_size, sequence_length and an index."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(name="python", path="stdlib"),)
    tokenizer: str = "bytes"  # "bytes" (256 tokens), or the path of a tokenizers JSON file
    # A token that every document begins with, and every row that goes on with one: a trained attention sink. It is
    # never predicted. A special token of the tokenizer, or a number above all of its tokens. None: there is none.
    start_token: int | None = limited(None, minimum=0)
    # concatenate: documents end to end, cut into rows; best_fit: whole where they fit, several to a row
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    workers: int = limited(2, minimum=0)  # threads that read ahead; 0 reads in line
    worker_processes: int = limited(0, minimum=0, maximum=64)  # processes that read ahead, instead of threads
    max_bad_records: int = limited(100, minimum=0)  # unreadable documents of prepared data that a run gets over
    seed: int = limited(0, minimum=0, maximum=SEED_LIMIT)  # of shuffling

    def __post_init__(self):
        names = [source.name for source in self.sources]
        if not names:
            raise UserError("data.sources is empty: give at least one record with name and path.")
        if len(set(names)) < len(names):
            raise UserError(f"data.sources must have different names, not {', '.join(names)}.")


@dataclass(frozen=True, kw_only=True)
class StageConfig(Section):
    """What changes from a step on; what is None stays as the run began. A stage reads its data from the beginning, in
    an order of its own."""

    step: int = limited(minimum=0)  # the first data_index of the stage
    sequence_length: int | None = limited(None, minimum=1)
    batch_size: int | None = limited(None, minimum=1)
    rope_base: float | None = limited(None, above=0)  # of all mixers that have rotary positions
    weights: Mapping[str, float] | None = None  # the mixture, by source; sources that are not named are not read


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The length and the shape of a run."""

    steps: int = limited(1000, minimum=1)  # optimizer steps; may change when a run is resumed
    batch_size: int = limited(8, minimum=1)  # sequences a step
    sequence_length: int = limited(512, minimum=1)  # tokens a sequence
    accumulate: int = limited(1, minimum=1)  # micro-batches that a step's gradient is summed over
    carry_state: bool = False  # each row goes on from the state that its row of the step before left behind
    stages: tuple[StageConfig, ...] = ()  # changes of length, batch, mixture and positions, in the order of their steps
    loss_chunk_size: int = limited(1024, minimum=1)  # tokens whose logits exist at one time
    z_loss: float = limited(0.0, minimum=0)  # weight of the mean squared log-sum-exp of the logits
    seed: int = limited(0, minimum=0, maximum=SEED_LIMIT)  # of initialisation

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise UserError(f"train.accumulate = {self.accumulate} must divide train.batch_size = {self.batch_size}.")
        previous = -1
        for i, stage in enumerate(self.stages):
            if stage.step <= previous:
                raise UserError(
                    f"train.stages[{i}].step = {stage.step} goes backwards: the stage before begins at {previous}."
                )
            previous = stage.step
            if stage.batch_size and stage.batch_size % self.accumulate:
                raise UserError(
                    f"train.accumulate = {self.accumulate} must divide train.stages[{i}].batch_size = "
                    f"{stage.batch_size}."
                )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Which update, and how large. Warm-up and decay are clamped to the run's steps where the schedule is built."""

    name: str = "adamw"  # or "lion": the table in lcx.training.optimizers
    learning_rate: float = limited(3e-4, minimum=0)  # peak
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warm up, stay, decay
    warmup_steps: int = limited(100, minimum=0)  # linear, from 0 to the peak
    final_ratio: float = limited(0.1, minimum=0, maximum=1)  # learning rate of the last step over the peak
    decay_fraction: float = limited(0.1, minimum=0, maximum=1)  # wsd: share of the steps that decay
    weight_decay: float = limited(0.1, minimum=0)  # decoupled; times the learning rate
    decay_all: bool = False  # decay every parameter, as the SAMBA code does, not only those that declare it
    betas: tuple[float, float] = limited((0.9, 0.95), minimum=0, below=1)  # decay of the first and second moment
    eps: float = limited(1e-8, above=0)
    clip_norm: float = limited(1.0, above=0)  # largest global norm of the gradient


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh; together all visible ones. -1 takes what the other axes leave.

    The rules say over which mesh axes a logical axis of parameters or of activations is cut, and change the tables in
    lcx/parallel/sharding.py: {"vocab": "tensor fsdp"}, or {"vocab": ""} for one that is not cut.
    """

    data: int = -1  # batch
    fsdp: int = 1  # batch, and parameters sharded
    seq: int = 1  # time
    tensor: int = 1  # heads and channels
    parameter_rules: Mapping[str, str] = field(default_factory=dict)
    activation_rules: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        axes = {name: getattr(self, name) for name in MESH_AXES}
        for name, size in axes.items():
            if size != -1 and size < 1:
                raise UserError(f"mesh.{name} must be at least 1, or -1 for the devices left over, not {size}.")
        if list(axes.values()).count(-1) > 1:
            free = " and ".join(f"mesh.{name}" for name, size in axes.items() if size == -1)
            raise UserError(f"{free} are both -1: only one axis can take the devices left over.")
        for kind in ("parameter_rules", "activation_rules"):
            for name, places in getattr(self, kind).items():
                for place in places.split():
                    if place not in axes:
                        raise UserError(f'mesh.{kind}.{name}: the mesh has no axis "{place}": {suggest(place, axes)}')
                if len(set(places.split())) < len(places.split()):
                    raise UserError(f'mesh.{kind}.{name}: "{places}" names an axis twice.')


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When the state is saved, and what stays; the last step always is saved."""

    every: int = limited(500, minimum=1)  # steps
    keep: int = limited(3, minimum=1)  # newest checkpoints that stay
    keep_every: int = limited(0, minimum=0)  # steps: checkpoints at its multiples stay, too; 0: none
    keep_best: int = limited(0, minimum=0)  # so many with the lowest best_metric stay, too
    best_metric: str = "heldout_loss"  # a name of metrics.jsonl, of the step that was saved
    # A run's workdir, "WORKDIR" or "WORKDIR@STEP": begin from what was saved there. What of it: the whole state
    # ("all"), all but the optimizer's ("no_optimizer"), or the parameters alone, from step 0 ("parameters").
    fork: str = ""
    fork_state: Literal["all", "no_optimizer", "parameters"] = "all"


@dataclass(frozen=True, kw_only=True)
class HealthConfig(Section):
    """What a run does about steps that go wrong, and about processes that do not answer."""

    skip: bool = True  # steps whose loss or gradient is not finite, or spikes, leave the parameters as they were
    window: int = limited(128, minimum=16, maximum=4096)  # good steps that say what is usual, once half are there
    threshold: float = limited(30.0, above=0)  # a spike: so many robust standard deviations above the window's median
    patience: int = limited(10, minimum=1)  # skipped steps in a row after which the run rewinds
    max_rewinds: int = limited(3, minimum=0, maximum=16)  # after which it gives up
    step_timeout: float = limited(1800.0, minimum=0)  # seconds after which a step is stuck; 0: never
    peer_timeout: float = limited(60.0, minimum=2)  # seconds after which a process that does not answer is gone


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """When held-out rows are scored and suites are run; after the last step they always are."""

    every: int = limited(0, minimum=0)  # steps; 0: only at the end
    max_rows: int = limited(512, minimum=0)  # held-out rows scored, at equal distances; 0: all
    suites: (
        str | tuple[str, ...]
    ) = ()  # names of lcx.evaluation.suites.SUITES: ["passkey", "ruler"], or "passkey,ruler"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of the suites, by their names
    chunk_size: int = limited(1024, minimum=1)  # tokens of a sequence that a suite reads at once
    batch_size: int = limited(8, minimum=1)  # sequences that a suite reads together

    @property
    def suite_names(self) -> tuple[str, ...]:
        """The suites, however they were written."""
        names = self.suites.split(",") if isinstance(self.suites, str) else self.suites
        return tuple(name.strip() for name in names if name.strip())


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """What a run says of itself."""

    every: int = limited(10, minimum=1)  # steps from one line of metrics to the next
    tensorboard: bool = True  # the same numbers for TensorBoard


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self):
        sources = [source.name for source in self.data.sources]
        for i, stage in enumerate(self.train.stages):
            weights = stage.weights
            if weights is None:
                continue
            for name, weight in weights.items():
                if name not in sources:
                    raise UserError(
                        f'train.stages[{i}].weights: no source is called "{name}": {suggest(name, sources)}'
                    )
                if weight < 0:
                    raise UserError(f"train.stages[{i}].weights.{name} must be at least 0, not {weight:g}.")
            if not sum(weights.values()):
                raise UserError(f"train.stages[{i}].weights are all 0: nothing would be read.")
        if self.train.carry_state and self.data.packing != "concatenate":
            raise UserError(
                f"train.carry_state needs data.packing=concatenate, not {self.data.packing}: a carried state goes on "
                "with a document where the row before ended."
            )

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """An instance from a ConfigDict, a mapping or an instance (validated again); raises UserError."""
        return build(cls, values)
