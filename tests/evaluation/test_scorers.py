"""Scores of right and wrong answers, worked out by hand."""

import pytest

from lcx.evaluation import scorers
from lcx.evaluation.suites.babilong import is_right
from lcx.evaluation.suites.longbench import score
from lcx.evaluation.suites.passkey import first_number


@pytest.mark.parametrize(
    "written, expected, right",
    [
        (" 1234567 and 7654321.", ["1234567", "7654321"], 1.0),
        (" 1234567.", ["1234567", "7654321"], 0.5),
        (" 123456", ["1234567"], 0.0),
        ("Tall-Nest", ["tall-nest"], 1.0),
        ("", ["x"], 0.0),
    ],
)
def test_share_of_answers_that_are_there(written, expected, right):
    assert scorers.share_contained(written, expected) == right


def test_one_of_several_answers_is_enough_for_questions():
    assert scorers.any_contained("It was Paris, I think", ["paris", "Lyon"]) == 1.0
    assert scorers.any_contained("It was Rome", ["paris", "Lyon"]) == 0.0


@pytest.mark.parametrize(
    "text, number", [(" 0123. 99", 123), ("is 7", 7), ("none", None), ("", None), ("12345 6", 12345)]
)
def test_the_first_number_counts(text, number):
    assert first_number(text) == number


def test_words_shared():
    assert scorers.f1("The cat sat.", "a cat sat down") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert scorers.f1("An apple", "the apple!") == 1.0 and scorers.f1("", "x") == 0.0 == scorers.f1("dog", "cat")
    assert scorers.rouge_1_recall("sit in the park, sit", "sit in Dolores Park") == 0.75
    assert scorers.rouge_l("a b c d", "a x c d") == 0.75 and scorers.rouge_l("b a", "a b") == 0.5
    assert scorers.rouge_l("", "a") == 0.0
    assert scorers.characters_f1("今天。", "今日") == 0.5 and scorers.characters_rouge_l("今天 好", "今天") == 0.8


def test_classes():
    classes = ["Food", "Food and drink", "Animal"]
    assert scorers.classification("It is Animal", "Animal", classes) == 1.0
    assert scorers.classification("Animal or Food", "Animal", classes) == 0.5
    assert scorers.classification("Food", "Animal", classes) == 0.0
    assert scorers.classification("Food and drink", "Food and drink", classes) == 1.0  # Food is part of the right name


def test_numbers_and_code():
    assert scorers.count("There are 12", "12") == 1.0 and scorers.count("12 or 13", "12") == 0.5
    assert scorers.count("twelve", "12") == 0.0
    assert (
        scorers.retrieval("Paragraph 3", "Paragraph 3") == 1.0 and scorers.retrieval("Paragraph 13", "Paragraph 3") == 0
    )
    assert scorers.code_similarity("\n# a comment\nreturn x\n", "return x") == 1.0
    assert scorers.code_similarity("```\nreturn y", "return x") == 0.88
    assert scorers.code_similarity("", "return x") == 0.0


def test_longbench_takes_the_best_answer_and_the_first_line_where_it_should():
    record = {"answers": ["blue whale", "whale"], "all_classes": []}
    assert score("hotpotqa", "whale", record) == 1.0
    assert score("triviaqa", "\nwhale\nQuestion: next", record) == 1.0
    assert score("hotpotqa", "whale\nQuestion: next", record) < 1.0


def test_babilong_wants_one_label_and_no_other():
    record = {"question": "Where is Mary?", "target": "garden"}
    assert is_right("qa1", " The garden. Then the office.", record)
    assert not is_right("qa1", "garden or office", record) and not is_right("qa1", "kitchen", record)
    assert is_right("qa5", "Jeff.", {"question": "What did Fred give to Mary?", "target": "Jeff"})
    assert is_right("qa5", "Fred gave it to Jeff", {"question": "To whom did Fred give it?", "target": "Jeff"})
    assert not is_right("qa1", "", record)
