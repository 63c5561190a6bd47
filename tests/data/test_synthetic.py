"""Synthetic tasks: each solved a second time from the problem alone, and scored exactly."""

import re

import numpy as np
import pytest

from lcx.config import Config, SourceConfig
from lcx.data import batch, check_data, heldout_batches
from lcx.data.synthetic import make_task, score
from lcx.data.synthetic.symbols import BLANK, QUESTION, SEPARATOR, SYMBOLS
from lcx.data.synthetic.task import TASKS
from lcx.data.tokenizers import load_tokenizer
from lcx.errors import UserError

BYTES = load_tokenizer("bytes")


def task_of(name, tokenizer=BYTES, **options):
    options = {"length": 600, **options}
    return make_task(SourceConfig(name="s", path=name, format="synthetic", options=options), tokenizer)


def text(tokens):
    return bytes(tokens).decode()


def solve_passkey(problem):
    return [re.search(r"pass key is (\d+)\. Remember", text(problem))[1]]


def solve_phonebook(problem):
    name = re.search(r"\n(\w+): $", text(problem))[1]
    return [re.search(name + r": (\d+)\n", text(problem))[1]]


def solve_variable_tracking(problem):
    said = text(problem)
    value = re.search(r"hold (\d+)\?", said)[1]
    holding = re.findall(rf"VAR (\w+) = {value}\.", said)
    while more := [a for a, b in re.findall(r"VAR (\w+) = VAR (\w+)\.", said) if b in holding and a not in holding]:
        holding += more
    return holding


def solve_thread_following(problem):
    said = text(problem)
    links = dict(re.findall(r"From (\w+) go to (\w+)\.", said))
    name = re.search(r"Starting from (\w+),", said)[1]
    while name in links:
        name = links[name]
    return [name]


def solve_copying(problem):
    return [[t for t in problem[: problem.index(SEPARATOR)] if t != BLANK]]


def solve_induction(problem):
    return [[problem[problem.index(QUESTION) + 1]]]


def solve_counting(problem):
    *field, question, symbol = problem
    assert question == QUESTION
    digits = f"{field.count(symbol):03}"
    return [[SYMBOLS + 8 + int(digit) for digit in digits]]


def solve_hierarchical_recall(problem):
    marks = [SYMBOLS + 64 + 20 * level for level in range(4)]
    at = problem.index(QUESTION)
    address = [token - marks[level] for level, token in enumerate(problem[at + 1 : -1])]
    place, words = [-1] * 4, []
    for token in problem[:at]:
        level = (token - SYMBOLS - 64) // 20
        if token >= marks[0]:
            place[level:] = [token - marks[level]] + [-1] * (3 - level)
        elif token != BLANK:
            place[3] += 1
            if place[: len(address)] == address:
                words.append(token)
    return [words]


def solve_associative_recall(problem):
    values = dict(zip(problem[0:16:2], problem[1:16:2], strict=True))
    return [[values[token]] for token in problem[16:] if token in values]


def solve_joint_recall(problem):
    said, asked = problem[: 4 * 9], problem[problem.index(SEPARATOR) + 1 :]
    values = {(c[0], k): v for c in zip(*[iter(said)] * 9, strict=True) for k, v in zip(c[1::2], c[2::2], strict=True)}
    return [[values[pair]] for pair in zip(asked[::2], asked[1::2], strict=True)]


SOLVERS = {name.removeprefix("solve_"): value for name, value in globals().items() if name.startswith("solve_")}
SOLVERS["selective_copying"] = solve_copying


@pytest.mark.parametrize("name", sorted(TASKS))
def test_answers_are_right_and_scored_exactly(name):
    task = task_of(name)
    for index in range(12):
        example = task.example(index)
        again = task_of(name).example(index)
        assert np.array_equal(example.tokens, again.tokens) and np.array_equal(example.answers, again.answers)
        assert example.tokens.shape == example.answers.shape == (600,) and example.tokens.dtype == np.int32
        assert 0 <= example.tokens.min() and example.tokens.max() < 256
        count = example.answers.max()
        assert count > 0 and set(example.answers.tolist()) - {0} == set(range(1, count + 1))
        if name in SOLVERS:
            last = np.flatnonzero(example.answers == 0)[-1] + 1
            problem = [t for t, a in zip(example.tokens.tolist(), example.answers.tolist(), strict=True) if not a]
            if name in ("copying", "selective_copying", "induction", "counting"):
                problem = example.tokens[:last].tolist()
            answers = [example.tokens[example.answers == i].tolist() for i in range(1, count + 1)]
            expected = [list(a.encode()) if isinstance(a, str) else list(a) for a in SOLVERS[name](problem)]
            assert sorted(answers) == sorted(expected), (name, index)
        assert score(example, example.tokens.copy()) == (count, count)
        wrong = example.tokens.copy()
        wrong[example.answers == 0] += 1  # what is not asked does not matter
        assert score(example, wrong) == (count, count)
        place = np.flatnonzero(example.answers)[-1]
        wrong[place] = 7
        assert score(example, wrong) == (count - 1, count)


def test_keys_are_asked_again_only_where_queries_are_more_than_pairs():
    def asked(queries):
        tokens = task_of("associative_recall", length=80, pairs=8, queries=queries).example(0).tokens.tolist()
        values = dict(zip(tokens[0:16:2], tokens[1:16:2], strict=True))
        places = [place for place in range(16, 80) if tokens[place] in values]
        assert [tokens[place + 1] for place in places] == [values[tokens[place]] for place in places]
        return [tokens[place] for place in places]

    assert len(set(asked(8))) == len(asked(8)) == 8
    assert len(asked(24)) == 24 > len(set(asked(24)))


def test_any_word_of_the_language_is_right():
    task = task_of("formal_language")
    example = task.example(3)
    random = np.random.default_rng(0)
    other = example.tokens.copy()
    for place, tokens in example.accepted.items():
        assert int(example.tokens[place]) in tokens and len(tokens) <= 4
        other[place] = random.choice(sorted(tokens))
    assert (other != example.tokens).sum() > 100 and score(example, other)[0] == score(example, other)[1]
    places = [place for place in example.accepted if example.answers[place]]
    other[places[0]] = next(t for t in range(SYMBOLS, SYMBOLS + 12) if t not in example.accepted[places[0]])
    assert score(example, other) == (len(places) - 1, len(places))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_heldout_examples_are_never_trained_on(name):
    task = task_of(name, heldout=20)
    trained = {task.example(index, seed).tokens.tobytes() for index in range(50) for seed in (0, 1)}
    assert len(trained) == 100
    heldout = task.heldout()
    examples = [heldout.tokens[a : a + 600].tobytes() for a in heldout.offsets[:-1]]
    assert len(set(examples)) == 20 and not set(examples) & trained
    assert heldout.scored.any() and not heldout.scored.all() or name == "formal_language"


def test_all_tasks_follow_the_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["The pass key is 12345. What is the pass key? " * 5], trainer)
    tokenizer.save(str(tmp_path / "bpe.json"))
    for start_token in (None, 400):
        loaded = load_tokenizer(str(tmp_path / "bpe.json"), start_token)
        for name in TASKS:
            example = task_of(name, loaded).example(0)
            assert example.tokens.shape == (600,) and (example.tokens[0] == 400) == (start_token == 400)
            assert example.answers[0] == 0


def config_of(name, row_length=128, packing="concatenate", train=None, **options):
    source = {"name": "s", "path": name, "format": "synthetic", "options": options}
    return Config.from_dict(
        {
            "data": {"sources": [source], "packing": packing},
            "train": {"batch_size": 4, "sequence_length": row_length, **(train or {})},
        }
    )


@pytest.mark.parametrize("train", [{}, {"carry_state": True}])
def test_rows_hold_whole_examples(train):
    config = config_of("associative_recall", train=train, length=60)
    task = task_of("associative_recall", length=60)
    got = batch(config, 7)
    for row in range(4):
        for i in range(2):
            example = task.example((28 + row) * 2 + i)
            here = slice(59 * i, 59 * (i + 1))
            assert np.array_equal(got["tokens"][row, here], example.tokens[:-1])
            assert np.array_equal(got["targets"][row, here], example.tokens[1:])
            assert np.array_equal(got["loss_weights"][row, here] > 0, example.answers[1:] > 0)
        assert got["segment_ids"][row].tolist() == [1] * 59 + [2] * 59 + [0] * 10
    everything = config_of("copying", length=129, loss="all")
    assert batch(everything, 0)["loss_weights"].all()
    scored = sum(int((one["loss_weights"] > 0).sum()) for one in heldout_batches(config))
    assert scored == 32 * 8


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("passky", {}, 'unknown task "passky": did you mean "passkey"'),
        ("passkey", {"digit": 3}, 'unknown key .*options.digit": did you mean "digits"'),
        ("passkey", {"length": 100}, "no room for the facts and the question of passkey with options.length=100"),
        (
            "passkey",
            {"length": 600},
            "examples of 600 tokens do not fit into rows of 128: set options.length to at most 129",
        ),
        ("associative_recall", {"length": 60, "pairs": 100}, "not enough symbols"),
        ("hierarchical_recall", {"length": 100, "span": "word"}, 'options.span cannot be "word"'),
    ],
)
def test_what_cannot_be_made_is_one_sentence(name, options, message):
    with pytest.raises(UserError, match=message):
        check_data(config_of(name, **options))
