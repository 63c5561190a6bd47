"""RULER's samples: exact lengths, the same for the same seed, and solvable from the prompt alone."""

import json
import re

import pytest

from lcx.errors import UserError
from lcx.evaluation.ruler import TASKS, Sources, make_sample
from lcx.evaluation.suites.ruler import effective_length

ESSAY = (
    "One day it rained. The mill stood still! Who would have thought so? Nobody went out; the road was white. " * 400
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    squad = [
        {"context": f"Place {i} is known for thing {i}. " * 6, "qas": [_squad(i), _squad(i) | {"is_impossible": True}]}
        for i in range(40)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": squad}]}))
    hotpot = [
        {"question": f"Q{i}?", "answer": f"A{i}", "supporting_facts": [[f"T{i}", 0]], "context": _passages(i)}
        for i in range(20)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    return Sources(ESSAY, str(folder / "squad.json"), str(folder / "hotpot.json"))


def _squad(i):
    return {"question": f"What is place {i} known for?", "answers": [{"text": f"thing {i}"}]}


def _passages(i):
    return [[f"T{j}", [f"A{j} is told of here. "] * 5] for j in range(i, i + 4)]


def pieces(text):
    """Tokens of several letters, as of a trained tokenizer: words, and what is between them."""
    return len(re.findall(r"\w{1,5}|\W", text))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length, count", [(4096, len), (1024, pieces), (16384, pieces)])
def test_lengths_are_kept(sources, name, length, count):
    for index in range(2):
        sample = make_sample(name, length, index, 42, count, sources)
        assert sample.tokens == count(sample.prompt) + TASKS[name].max_tokens
        assert 0.98 * length <= sample.tokens <= length


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_sample_and_no_other_does(sources, name):
    make = lambda index, seed: make_sample(name, 4096, index, seed, len, sources).prompt  # noqa: E731
    assert make(3, 1) == make(3, 1)
    assert len({make(0, 1), make(1, 1), make(0, 2)}) == 3


def solve(name, prompt):
    """The answers, found in the prompt by reading it as a person would."""
    if name.startswith("niah"):
        asked = re.search(r"for (\S+(?:, \S+)*(?:,? and \S+)?) mentioned in the provided text\?", prompt)[1]
        keys = re.split(r",? and |, ", asked)
        facts = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", prompt)
        return [value for key in keys for found, value in facts if found == key]
    if name == "vt":
        said = prompt[prompt.rindex("Memorize and track") :]
        value = re.search(r"value (\d+) in", said)[1]
        names = re.findall(rf"VAR (\w+) = {value}", said)
        while more := [a for a, b in re.findall(r"VAR (\w+) = VAR (\w+)", said) if b in names and a not in names]:
            names += more
        return names
    said = prompt[prompt.rindex("Below is") :] if name == "cwe" else prompt[prompt.index("coded words. ") : -200]
    words = re.findall(r"\d+\. (\S+)" if name == "cwe" else r"\b[a-z]{6}\b", said.split("\nQuestion")[0])
    ranked = sorted(set(words), key=lambda word: -words.count(word))
    return ranked[: 10 if name == "cwe" else 3]


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("qa")])
def test_the_prompt_holds_the_answers_and_no_others(sources, name):
    for index in range(3):
        sample = make_sample(name, 8192, index, 7, len, sources)
        assert sorted(solve(name, sample.prompt)) == sorted(sample.answers)
    written = " ".join(sample.answers)
    assert TASKS[name].score(written, sample.answers) == 1.0
    assert TASKS[name].score("nothing of it", sample.answers) == 0.0


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_come_with_their_paragraphs(sources, name):
    sample = make_sample(name, 4096, 5, 7, len, sources)
    assert sample.answers == ["thing 5" if name == "qa_1" else "A5"]
    assert re.search(sample.answers[0] + r"\b", sample.prompt) and sample.prompt.count("Document ") > 3


def test_what_cannot_be_made_is_said(sources):
    with pytest.raises(UserError, match="has no room in 256 tokens: an empty one takes"):
        make_sample("vt", 256, 0, 0, len, sources)
    with pytest.raises(UserError, match="needs evaluation.options.ruler.squad"):
        make_sample("qa_1", 4096, 0, 0, len, Sources(ESSAY))


def test_the_effective_length_is_the_largest_that_passes():
    assert effective_length({4096: 96.0, 8192: 85.6, 16384: 85.5}) == 8192
    assert effective_length({4096: 10.0}) == 0
