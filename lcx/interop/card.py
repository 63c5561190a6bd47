"""The model card: what a model is and how it was trained, for people."""

from dataclasses import dataclass

from lcx.interop.architecture import Architecture
from lcx.interop.formats import Format
from lcx.params import count_parameters


@dataclass(frozen=True)
class Facts:
    """What is known of a model's training."""

    name: str
    family: str
    step: int
    tokens: int | None  # seen in training
    sequence_length: int
    data: tuple[str, ...]  # names of the sources
    tokenizer: str
    optimizer: str
    learning_rate: float
    heldout_loss: float | None = None  # nats a token
    imported_from: str | None = None


def model_card(facts: Facts, form: Format, model: Architecture, dtype: str, transformers: str) -> str:
    """README.md of an export, in Markdown."""
    config = model.config
    began = f", begun from the weights of {facts.imported_from}" if facts.imported_from else ""
    rows = {
        "architecture": f"`{form.architecture}`",
        "pattern": f"`{config.pattern}`, {config.periods} times",
        "parameters": f"{count_parameters(model.shapes):,}",
        "vocabulary": f"{config.vocab_size:,} ({'tied' if config.tie_embeddings else 'untied'} head)",
        "dtype of the files": dtype,
        "training steps": f"{facts.step:,}{began}",
        "training tokens": "unknown" if facts.tokens is None else f"{facts.tokens:,}",
        "sequence length": f"{facts.sequence_length:,}",
        "data": ", ".join(facts.data),
        "tokenizer": facts.tokenizer,
        "optimizer": f"{facts.optimizer}, peak learning rate {facts.learning_rate:g}",
    }
    if facts.heldout_loss is not None:
        rows["held-out loss"] = f"{facts.heldout_loss:.4f} nats a token"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\nlibrary_name: {form.library}\ntags:\n- lcx\n- {facts.family}\n---\n\n# {facts.name}\n\n"
        f"A language model of the family `{facts.family}`, pretrained with lcx.\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"## Use\n\n{_use(form, transformers)}\n## Fidelity\n\n`fidelity.json` tells how far the logits of these files "
        "are from those of the model that was trained,\nand has a checksum of each tensor.\n"
    )


def _use(form: Format, transformers: str) -> str:
    if form.library != "transformers":
        return f"Load it with {form.library}'s `{form.architecture}`.\n"
    trust = ", trust_remote_code=True" if form.code else ""
    return (
        f"With transformers{transformers}{' (modeling_lcx.py needs torch besides)' if form.code else ''}:\n\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        '    tokenizer = AutoTokenizer.from_pretrained(".")\n'
        f'    model = AutoModelForCausalLM.from_pretrained("."{trust})\n'
        '    inputs = tokenizer(["Once upon a time"], return_tensors="pt")\n'
        "    print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=64)))\n\n"
    )
