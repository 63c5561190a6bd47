"""`lcx export`: writes a trained model for other libraries, and proves that it is the model."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lcx.cli.flags import WORKDIR, Flag, parse
from lcx.config import Config, choose
from lcx.errors import UserError
from lcx.files import read_json

if TYPE_CHECKING:
    from lcx.interop.export import Source

SUMMARY = """Writes a trained model as safetensors with config, tokenizer and model card, in the form of transformers:
Llama, Mistral, Qwen3, Mamba or Mamba-2 where the model is one, else with one file of PyTorch code beside it. What was
written is read back and held beside the model: fidelity.json."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
FLAGS = [
    WORKDIR,
    Flag("out", "the folder to write, which must not be there", required=True),
    Flag("step", "the checkpoint to export; left out: the newest", kind=int, limits={"lower_bound": 0}),
    Flag("format", "auto, or one of llama, mistral, qwen3, mamba, mamba2, lcx, fla", default="auto"),
    Flag(
        "dtype",
        "of the files: float32, bfloat16, float16; auto: what the run keeps, or what it was imported in",
        default="auto",
    ),
    Flag("shard_gb", "size of a file of weights, at most, in 10^9 bytes", kind=float, default=5.0),
    Flag("vocab_size", "rows of the vocabulary to keep; 0: those that the tokenizer has", kind=int, default=0),
    Flag("tolerance", "largest difference of logits, over the largest logit", kind=float, default=1e-4),
    Flag("prompt_tokens", "tokens of the prompts compared; 0: past windows, at most 512", kind=int, default=0),
    Flag("verify", "run the export beside the model; --noverify compares tensors alone", kind=bool, default=True),
    Flag("check", "write nothing: stamp the export that lies in --out anew", kind=bool, default=False),
]


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("export", SUMMARY, FLAGS, argv)
    choose("dtype", values.dtype, dict.fromkeys(DTYPES))
    if values.shard_gb <= 0:
        raise UserError(f"--shard_gb must be above 0, not {values.shard_gb:g}.")
    from lcx.interop.export import Settings, check, export  # takes seconds: JAX, flax, orbax

    source, dtype = open_run(values)
    settings = Settings(
        format=values.format,
        dtype=dtype if values.dtype == "auto" else values.dtype,
        shard_bytes=int(values.shard_gb * 1e9),
        tolerance=values.tolerance,
        prompt=values.prompt_tokens or None,
        run=values.verify,
    )
    stamp = (check if values.check else export)(source, values.out, settings)
    print(describe(stamp, values.out))
    return 0


def open_run(values: SimpleNamespace) -> tuple["Source", str]:
    """What is exported of a workdir, and the dtype that it has. Raises UserError where there is nothing to export."""
    from lcx.cli.load import open_checkpoint
    from lcx.data import load_tokenizer
    from lcx.interop.export import Source

    folder, config, step, read = open_checkpoint(values.workdir, values.step)
    imported = read_json(folder / "imported.json") if (folder / "imported.json").exists() else None
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.start_token)
    rows = config.model.vocab_size
    if values.vocab_size:
        if values.vocab_size > rows:
            raise UserError(f"--vocab_size={values.vocab_size} is more than the {rows} rows of the model's vocabulary.")
        rows = values.vocab_size
    elif imported is None:  # whose vocabulary is its own
        rows = min(rows, tokenizer.vocab_size)
    source = Source(
        config=config.model,
        read=read,
        vocab_size=rows,
        tokenizer=config.data.tokenizer,
        start_token=config.data.start_token,
        end_token=tokenizer.end_token,
        facts=facts(folder, config, step, imported),
    )
    untouched = imported is not None and step == 0
    kept = config.model.param_dtype if config.model.param_dtype in DTYPES else "float32"
    return source, imported["dtype"] if untouched else kept


def facts(folder, config: Config, step: int, imported: dict | None):
    """What the model card tells of a run."""
    from lcx.interop.card import Facts

    report, loss = folder / "evaluation" / "heldout.json", None
    if report.exists():
        scored = read_json(report)
        loss = scored.get("loss") if scored.get("step") == step else None
    return Facts(
        name=folder.name,
        family=config.model.family,
        step=step,
        tokens=step * config.train.batch_size * config.train.sequence_length,
        sequence_length=config.train.sequence_length,
        data=tuple(source.name for source in config.data.sources) if step else ("unknown",),
        tokenizer=config.data.tokenizer if config.data.tokenizer == "bytes" else "tokenizer.json",
        optimizer=config.optimizer.name,
        learning_rate=config.optimizer.learning_rate,
        heldout_loss=loss,
        imported_from=imported and imported["source"],
    )


def describe(stamp: dict, out: str) -> str:
    """The stamp in a few lines, for people."""
    if not stamp["verified"]:
        return (
            f"{out}: unverified ({stamp['reason']}); {len(stamp['checksums'])} tensors are bitwise those of the model"
        )
    lines = [f"{out}: verified, {len(stamp['checksums'])} tensors bitwise those of the model"]
    for part, words in (("prefill", "prompt at once"), ("decode", "token by token")):
        errors = stamp[part]
        lines.append(
            f"  {words}: logits differ by at most {errors['max_error']:.1e} (relative {errors['relative_error']:.1e}), "
            f"the likeliest token is the same for {errors['top1_agreement']:.2%}"
        )
    return "\n".join(lines)
