"""The report: its numbers, its curves, and the page in a browser."""

import html
import json
import re
import shutil

import numpy as np
import pytest

from lcx.cli.sweep import evaluation
from lcx.evaluation.compare import sections
from lcx.evaluation.results import Result, save
from lcx.evaluation.suite import Grid
from lcx.schema import build
from lcx.sweeps.expand import expand
from lcx.sweeps.folder import Folder
from lcx.sweeps.ladder import ladder, parabola
from lcx.sweeps.page import page
from lcx.sweeps.spec import Sweep
from lcx.sweeps.summary import POINTS, summarize, thinned
from tests.sweeps.test_sweep import write_result

EVIL = "</script><img src=x onerror=alert(1)>"
COUNTS = {"parameters": 5e5, "flops": 1e6}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """Of a sweep of two families by two learning rates, two seeds and two budgets; one trial has no result yet."""
    families = {name: f"configs/{family}.py:size=tiny" for name, family in (("samba", "samba"), (EVIL, "mamba"))}
    fields = {
        "set": {"model.family": EVIL},
        "grid": {"optimizer.learning_rate": [1e-3, 1e-2], "train.seed": [0, 1]},
        "budgets": [1e11, 1e12],
    }
    sweep = build(Sweep, {"configs": families} | fields)
    trials = expand(sweep, lambda config, what: COUNTS[what])
    folder = Folder(tmp_path_factory.mktemp("sweep"))
    for number, trial in enumerate(trials[:-1]):
        steps = trial.config["train"]["steps"]
        folder.record(trial.name, "started", attempt=1)
        write_result(
            folder, trial.name, steps, loss=3 - 0.125 * (number // 2) + 0.5 * (number % 2), parameters=10**number
        )
        lines = [{"step": step, "loss": 5 / step, "tokens_per_second": 100.0 * step} for step in range(1, 4)]
        path = folder.workdir(trial.name) / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
        folder.record(trial.name, "ended", attempt=1, exit_code=0, seconds=60.0 * (number + 1))
    return summarize("<b>name</b>", sweep, trials, folder, lambda config, what: COUNTS[what])


def test_numbers_of_trials_and_groups(report):
    first = report["trials"][0]
    assert first["status"] == "finished" and first["metric"] == 3.0 and first["metrics"]["heldout.loss"] == 3.0
    assert first["tokens_per_second"] == 250.0, "the median, without the first line, which has compiled"
    assert first["memory"] == 2**30 and first["memory_of"] == "host" and first["seconds"] == 60.0
    assert first["curve"]["loss"] == [[1, 5.0], [2, 2.5], [3, 5 / 3]]
    assert first["flops"] == pytest.approx(1e11, rel=0.1)
    assert report["trials"][-1]["status"] == "waiting" and report["trials"][-1]["metric"] is None
    group = next(group for group in report["groups"] if group["group"] == first["group"])
    values = [trial["metric"] for trial in report["trials"] if trial["group"] == first["group"]]
    assert group["count"] == 2 and group["mean"] == pytest.approx(np.mean(values))
    assert group["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert [row["mean"] for row in report["groups"]] == sorted(row["mean"] for row in report["groups"])


def test_long_curves_are_thinned_to_means():
    points = thinned([(step, float(step)) for step in range(1, 1201)])
    assert len(points) == POINTS and points[-1] == [1200, (1197 + 1198 + 1199 + 1200) / 4]


def test_the_ladder_finds_the_minima_and_their_law():
    """Losses made of parabolas whose minima lie at budget^0.5."""
    loss = lambda size, budget: 2 + 1e3 / budget**0.25 + 0.1 * np.log(size / budget**0.5) ** 2  # noqa: E731
    records = [
        {"family": "a", "budget": budget, "parameters": size, "metric": loss(size, budget)}
        for budget in (1e12, 1e14)
        for size in budget**0.5 * np.array([0.25, 0.5, 1.1, 2, 4])
    ]
    (found,) = ladder(records)
    assert [rung["parameters"] for rung in found["rungs"]] == pytest.approx([1e6, 1e7], rel=1e-6)
    assert found["parameters"]["exponent"] == pytest.approx(0.5, abs=1e-6)
    assert found["parameters"]["scale"] == pytest.approx(1.0, rel=1e-4)
    assert not parabola([(1e6, 3.0), (2e6, 2.5), (4e6, 2.2)])["minimum"], "sizes that do not enclose it"
    assert parabola([(1e6, 3.0), (2e6, 2.5)])["coefficients"] is None


def test_a_page_carries_its_data_as_data(report):
    text = page(report)
    assert EVIL not in text and "<img" not in text and "<b>name" not in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text), "the page needs no network"
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(data) == json.loads(json.dumps(report))


def test_what_suites_found_comes_with_the_page(report, tmp_path):
    """The mean over the seeds of a group; a trial without a file, and one that has not ended, are left out."""
    folder = Folder(tmp_path)
    for trial in report["trials"]:
        where = folder.path / trial["workdir"] / "evaluation"
        where.mkdir(parents=True)
        (where / "heldout.json").write_text('{"loss": 1.0}')
    assert evaluation(report, folder) == ""
    grid = lambda value: Grid(["<i>"], [512], [[value]], "depth", "tokens", "accuracy")  # noqa: E731
    for number, trial in enumerate(report["trials"][1:]):
        found = Result({"accuracy": number / 8}, {"accuracy by length": grid(number / 8)})
        save(folder.path / trial["workdir"] / "evaluation", "passkey", found, 7, {})
    text = evaluation(report, folder)
    first, second, *_ = report["trials"]
    assert first["group"] != second["group"] and text.count("<svg") == 1 and "<i>" not in text and EVIL not in text
    rows = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", text))
    expected = {}
    for number, trial in enumerate(report["trials"][1:-1]):
        expected.setdefault(trial["group"], []).append(number / 8)
    for group, values in expected.items():
        name = html.escape(group) + (f" (mean of {len(values)})" if len(values) > 1 else "")
        assert float(rows[name]) == pytest.approx(np.mean(values), rel=1e-3)
    assert len(rows) == len(expected) and text in page(report, text)
    (folder.path / first["workdir"] / "evaluation" / "ruler.json").write_text("{")
    assert "ruler.json" in evaluation(report, folder) and "<svg" not in evaluation(report, folder)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 360)])
def test_in_a_browser(report, browser, tmp_path, scheme, width):
    """The table sorts both ways, nothing overflows, nothing complains, and no text of a config is run."""
    found = Result({f"accuracy_at_{512 << i}": 0.5 for i in range(12)}, {"by length": Grid([0], [512], [[0.5]])})
    (tmp_path / "report.html").write_text(page(report, sections({"passkey": {EVIL: found}})))
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    complaints = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    outside = []
    tab.on("request", lambda request: outside.append(request.url))
    tab.goto(f"file://{tmp_path / 'report.html'}")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.evaluate(overflow) <= 0
    assert tab.locator("#curves polyline.curve").count() == len(report["trials"]) - 1
    cells = lambda: tab.locator("#trials tbody td:nth-child(3)").all_inner_texts()  # noqa: E731
    known = lambda texts: [float(text) for text in texts if text != "–"]  # noqa: E731
    assert known(cells()) == sorted(known(cells())), "the best first"
    tab.locator("#trials th button", has_text="heldout.loss").click()
    assert known(cells()) == sorted(known(cells()), reverse=True) and cells()[-1] == "–", "unknown ones last"
    tab.locator("#trials th button", has_text="trial").click()
    names = tab.locator("#trials tbody td:nth-child(1)").all_inner_texts()
    assert names[0] < names[-1] and tab.locator("#trials th").first.get_attribute("aria-sort") == "ascending"
    tab.locator("#legend button").first.click()
    assert tab.locator("#trials tbody tr").count() == len(report["trials"]) / 2
    colors = tab.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    assert tab.evaluate(overflow) <= 0 and not complaints, complaints
    assert all(url.startswith(("file:", "data:")) for url in outside)
    tab.close()
