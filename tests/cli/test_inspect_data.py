import io
import json

import numpy as np
import pytest
from rich.console import Console

from lcx.cli.inspect_data import inspect_data, row_text
from lcx.cli.main import main
from lcx.config import Config
from lcx.data import load_tokenizer


def test_a_row_shows_documents_weights_and_padding():
    row = {
        "tokens": np.array([*b"abcde", 0, 0]),
        "segment_ids": np.array([1, 1, 1, 2, 2, 0, 0]),
        "positions": np.array([7, 8, 9, 0, 1, 0, 1]),
        "loss_weights": np.array([1, 0, 0, 0.5, 0, 0, 0], np.float32),
    }
    text = row_text(row, load_tokenizer("bytes"))
    assert text.plain == "[1 from 7]abc[2]d(0.5)e[padding: 2]"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["b"] == "yellow" and styles["a"] == styles["c"] == "dim yellow" and styles["e"] == "green"


def test_batches_are_shown_with_their_sources(tmp_path):
    (tmp_path / "a.txt").write_text("all of this is text\n" * 20)
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "ask ", "completion": "answer"}) + "\n")
    sources = [{"name": "book", "path": str(tmp_path / "a.txt")}, {"name": "chat", "path": str(tmp_path / "b.jsonl")}]
    train = {"batch_size": 4, "sequence_length": 24}
    config = Config.from_dict({"data": {"sources": sources}, "train": train})
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)
    inspect_data(config, 2, console)
    shown = console.file.getvalue()
    assert "batch 0: 4 rows of 24 tokens, stage 0" in shown and "batch 1" in shown and "batch 2" not in shown
    assert "row 7: " in shown and ": book, its row" in shown and ": chat, its row" in shown
    assert "of this is" in shown and "ask answer" in shown


def test_the_flag_needs_no_workdir_and_trains_nothing(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("all of this is text\n" * 20)
    arguments = ["train", "--config=configs/samba.py:size=tiny,sequence_length=16", "--inspect_data=1"]
    assert main([*arguments, f"--config.data.sources[0].path={tmp_path / 'a.txt'}"]) == 0
    assert "batch 0: 8 rows of 16 tokens" in capsys.readouterr().out
    assert main(arguments[:2]) == 2
    assert "lcx train needs --workdir" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["tiny", "1.3b,data=prolong"])
def test_prolong_is_a_config(size):
    from lcx.config import load_config
    from lcx.stages import stages

    first, second = stages(Config.from_dict(load_config(f"configs/prolong.py:size={size}")))
    assert (first.first_index, first.rope_base) < (second.first_index, second.rope_base)
    assert second.config.train.sequence_length > first.config.train.sequence_length
    for stage in (first, second):
        assert sum(source.weight for source in stage.config.data.sources) == pytest.approx(1)
