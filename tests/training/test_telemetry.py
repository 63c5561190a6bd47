import io
import json
import math
import re
import resource

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lcx.errors import UserError
from lcx.training.telemetry import FIELDS, Telemetry, cut_back


def metrics(step, **changes):
    values = dict.fromkeys(FIELDS, 0) | {"step": step, "loss": 5.0 / step, "tokens_per_second": 12345.6, "mfu": None}
    return values | changes


def plain_console(output=None):
    return Console(file=output or io.StringIO(), force_terminal=False, width=40)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_object_a_step_flushed_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    loss = np.float32(1 / 3)
    with Telemetry(path, steps=10, console=plain_console()) as telemetry:
        telemetry.log(metrics(1, loss=loss, batch_hash=np.uint32(2**32 - 1), gate=np.float32(0.5)))
        (line,) = lines(path)
        telemetry.log(metrics(2, loss=math.nan, grad_norm=np.float32(np.inf)))
    assert list(line) == ["format_version", *FIELDS, "gate"]
    assert line["format_version"] == 1 and line["mfu"] is None
    assert np.float32(line["loss"]) == loss and line["batch_hash"] == 2**32 - 1 and line["gate"] == 0.5
    assert (lines(path)[1]["loss"], lines(path)[1]["grad_norm"]) == (None, None)


def test_a_missing_field_is_named(tmp_path):
    with Telemetry(tmp_path / "m", steps=1, console=plain_console()) as telemetry:
        with pytest.raises(ValueError, match="lack loss, mfu"):
            telemetry.log({name: 0 for name in FIELDS if name not in ("loss", "mfu")})


def test_a_full_disk_is_a_sentence(tmp_path):
    path = tmp_path / "m"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match="m cannot be written: (No space left|File too large)"):
        with Telemetry(path, steps=1, console=plain_console()) as telemetry:
            telemetry.log(metrics(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))  # room for a part of a line
            try:
                telemetry.log(metrics(2))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    cut_back(path, 2)
    assert [line["step"] for line in lines(path)] == [1]


def test_resuming_cuts_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Telemetry(path, steps=10, console=plain_console()) as telemetry:
        for step in range(1, 7):
            telemetry.log(metrics(step))
    whole = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(b'{"format_version": 1, "step": 2, "lo')  # torn
    with Telemetry(path, steps=10, restored_step=4, console=plain_console()) as telemetry:
        assert path.read_bytes() == b"".join(whole[:4])
        telemetry.log(metrics(5))
    assert path.read_bytes() == b"".join(whole[:5])


@pytest.mark.parametrize(
    "tail", [b"", b"\n", b"{}\n", b"[]\n", b"3\n", b"\xff\xfe\n", b'{"step": "x"}\n', b'{"step": 1}']
)
def test_what_is_no_line_of_metrics_is_cut(tmp_path, tail):
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n' + tail)
    cut_back(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n'
    cut_back(path, 0)
    assert path.read_bytes() == b""
    cut_back(tmp_path / "absent", 3)
    assert not (tmp_path / "absent").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    output = io.StringIO()
    with Telemetry(tmp_path / "m", steps=200, restored_step=10, console=plain_console(output)) as telemetry:
        telemetry.say("resumed from step 10 of a run whose name, being [long], does not fit on one line")
        for step in range(11, 21):
            telemetry.advance(step)
            if step in (11, 20):
                telemetry.log(metrics(step, loss=None if step == 20 else 3.21987))
    first, second, third = output.getvalue().splitlines()
    assert first.endswith("being [long], does not fit on one line")
    assert second == "step 11/200  loss 3.2199  12,346 tokens/s  -:--:-- left"
    assert re.fullmatch(r"step 20/200  loss \?  12,346 tokens/s  0:00:0\d left", third)


def test_a_bar_on_a_terminal(tmp_path):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, color_system=None)
    with Telemetry(tmp_path / "m", steps=200, console=console) as telemetry:
        for step in range(1, 101):
            telemetry.advance(step)
        telemetry.log(metrics(100, loss=3.21987))
        telemetry.say("saved")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    final = text.splitlines()[-1]
    assert "100/200" in final and "loss 3.2199" in final and "12,346 tokens/s" in final and "left" in final
    assert re.search(r"\d:\d\d:\d\d left", final) and "━" in final
    assert "saved" in text
    assert output.getvalue().count("\x1b[?25h") == 1, "the cursor comes back"


def read_events(folder):
    """The records of all TensorBoard files: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_gets_scalars_and_histograms_and_a_purge(tmp_path):
    folder = tmp_path / "tensorboard"
    arguments = {"steps": 9, "restored_step": 4, "tensorboard": folder, "console": plain_console()}
    with Telemetry(tmp_path / "m", **arguments) as telemetry:
        telemetry.log(metrics(5, loss=2.5, gate=0.25), {"gates": np.linspace(0, 1, 7)})
    events = read_events(folder)
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [5]
    values = {value.tag: value for event in events if event.step == 5 for value in event.summary.value}
    assert values["loss"].simple_value == 2.5 and values["gate"].simple_value == 0.25
    assert values["gates"].histo.num == 7 and values["gates"].histo.max == 1
    assert "mfu" not in values


def test_no_tensorboard_unless_wanted(tmp_path):
    with Telemetry(tmp_path / "m", steps=1, console=plain_console()) as telemetry:
        telemetry.log(metrics(1), {"gates": np.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
