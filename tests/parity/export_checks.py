"""What holds of every exported family, trained: logits, greedy continuations, padded batches, the harness.

The tests run in test_exports_stock.py and test_exports_own.py, which say what `family` is.
"""

import json

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import lcx
from lcx.interop.harness import HarnessModel
from lcx.models.generate import generate
from tests.parity.exports import TIME, Run, make_export, make_run, text

LOGITS = 1e-4
LENGTHS = (50, 9, 33)  # of prompts
NEW, ALONE = 64, 6  # tokens written after them, in a batch and one prompt at a time
CLASSES = {
    "transformer": "LlamaForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}


@pytest.fixture(scope="module")
def run(family, tmp_path_factory) -> Run:
    workdir = make_run(family, tmp_path_factory.mktemp(family))
    return Run(workdir, make_export(workdir))


@pytest.fixture(scope="module")
def there(run, family) -> torch.nn.Module:
    """As a user loads it: stock classes without our code, where the family has one."""
    known = family in CLASSES
    model = AutoModelForCausalLM.from_pretrained(run.export, trust_remote_code=not known, dtype=torch.float32)
    assert type(model).__name__ == CLASSES.get(family, "LcxForCausalLM")
    return model.eval()


@pytest.fixture(scope="module")
def here(run):
    return lcx.load(run.workdir)


@pytest.fixture(scope="module")
def prompts(here) -> list[np.ndarray]:
    return [here[1].encode(text(400, seed)[-length:]) for seed, length in enumerate(LENGTHS)]


def left_padded(prompts: list[np.ndarray]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.from_numpy(prompt).long(), 1
    return {"input_ids": ids, "attention_mask": mask}


def write(model: torch.nn.Module, inputs: dict[str, torch.Tensor], count: int = NEW) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [batch, count], their logits [batch, count, vocab_size]) of `generate()`."""
    settings = dict(do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=None, pad_token_id=0)
    out = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -count:].numpy(), torch.stack(out.logits, dim=1).numpy()


def same_until_a_tie(a: np.ndarray, b: np.ndarray, logits: np.ndarray, error: float) -> int:
    """How many tokens are the same, which is all of them, or all to where the two likeliest are as good as equal."""
    differ = np.flatnonzero(a != b)
    if not len(differ):
        return len(a)
    second, first = np.sort(logits[differ[0]])[-2:]
    assert first - second <= 10 * error, f"token {differ[0]} differs, whose logits lie {first - second:.1e} apart"
    return int(differ[0])


def test_the_stamp(run):
    stamp = json.loads((run.export / "fidelity.json").read_text())
    assert stamp["verified"] and stamp["beyond_windows"]
    for part in ("prefill", "decode"):
        assert stamp[part]["max_error"] < LOGITS and stamp[part]["top1_agreement"] > 0.99, stamp[part]


def test_logits(run, here, there, family, say):
    """Held-out text of 100 tokens, longer than windows, segments and the training rows."""
    tokens = np.stack([here[1].encode(text(1000, seed=seed)[-100:])[:100] for seed in (3, 4)])
    expected = here[0](tokens)[0][..., : there.config.vocab_size]
    with torch.no_grad():
        found = there(torch.from_numpy(tokens).long()).logits.numpy()
    error = np.abs(found - expected).max()
    say(f"export of {family}: logits of {tokens.shape[1]} tokens differ by at most {error:.1e}")
    assert error < LOGITS


@pytest.fixture(scope="module")
def written(there, prompts):
    return write(there, left_padded(prompts))


def test_greedy_continuations(here, there, written, prompts, family, say):
    tokens, logits = written
    error = json_error(there)
    ours = np.stack(list(generate(here[0], prompts, NEW, temperature=0)), axis=1)
    same = [same_until_a_tie(*row, error) for row in zip(tokens, ours, logits, strict=True)]
    say(f"export of {family}: {same} of {NEW} greedy tokens the same, {len(prompts)} prompts in a left-padded batch")
    assert sum(same) > 2 * NEW


def json_error(model: torch.nn.Module) -> float:
    with open(f"{model.name_or_path}/fidelity.json") as file:
        stamp = json.load(file)
    return max(stamp[part]["max_error"] for part in ("prefill", "decode"))


def test_left_padded_batches_equal_single_prompts(there, written, prompts):
    tokens, logits = (array[:, :ALONE] for array in written)
    for row, prompt in enumerate(prompts):
        alone, alone_logits = write(there, {"input_ids": torch.from_numpy(prompt).long()[None]}, ALONE)
        same = same_until_a_tie(tokens[row], alone[0], logits[row], LOGITS / 10)
        assert np.abs(logits[row, : same + 1] - alone_logits[0, : same + 1]).max() < LOGITS


def test_the_tokenizer(run, here):
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    for example in ("def main(", "\u00e9t\u00e9 \U0001f600\n\x00", " <|end|><|start|> ", ""):
        assert tokenizer(example)["input_ids"] == here[1].encode(example).tolist()
    assert tokenizer.decode(here[1].encode("\u00e9t\u00e9 x"), skip_special_tokens=True) == "\u00e9t\u00e9 x"


def test_lcx_loads_the_export(run, here):
    model, tokenizer = lcx.load(run.export)
    tokens = tokenizer.encode("an export")[None]
    rows = model.embedding.table.shape[0]
    np.testing.assert_allclose(model(tokens)[0], here[0](tokens)[0][..., :rows], atol=1e-5)


def test_short_rows_were_trained():
    assert TIME < 100, "test_logits reads beyond the training rows"


# ---- lm-evaluation-harness: through the adapter, and through its own `hf` model on the export

CHOICE = """
task: words_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: words_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING = """
task: words_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["zz"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files over a file of four documents."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for seed in range(4):
        words = text(400, seed).decode()
        choices = [words[30:42], words[100:105], words[200:240]]
        lines.append({"context": words[: 15 * seed + 5], "choices": choices, "page": words[: 80 * (seed + 1)]})
    path = folder / "documents.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for name, content in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(content.format(path=path))
    return folder


def evaluate(model, tasks, **settings) -> dict:
    """The harness's samples by task."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["words_choice", "words_rolling", "words_writing"]
    results = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **settings)
    return {name: sorted(samples, key=lambda sample: sample["doc_id"]) for name, samples in results["samples"].items()}


def test_adapter_and_export_agree(run, family, tasks, say, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    ours = evaluate(HarnessModel(*lcx.load(run.workdir), max_length=TIME), tasks)
    settings = f"pretrained={run.export},trust_remote_code=True,dtype=float32,max_length={TIME},device=cpu"
    theirs = evaluate("hf", tasks, model_args=settings)
    worst, compared = 0.0, 0
    for name in ("words_choice", "words_rolling"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                x, y = (value[0] if isinstance(value, tuple | list) else value for value in (x, y))
                worst, compared = max(worst, abs(float(x) - float(y))), compared + 1
    say(f"lm-eval of {family}: {compared} log-likelihoods of adapter and export differ by at most {worst:.1e}")
    assert compared == 4 * 3 + 4 and worst < 1e-3
    written = zip(ours["words_writing"], theirs["words_writing"], strict=True)
    same = [a["filtered_resps"] == b["filtered_resps"] for a, b in written]
    assert sum(same) >= 3, "at most one continuation may differ, at a tie"
