"""report.html: one page that needs no network, drawn in the browser from the data inside it."""

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def page(report: Mapping[str, Any], evaluation: str = "") -> str:
    """The page of a report, as `lcx.sweeps.summary` makes it; evaluation: HTML of what suites found, as it is.

    Whatever stands in the report is shown as text: as JSON it cannot end the element that it lies in, and the page's
    script puts it into the document as text alone.
    """
    folder = files("lcx.sweeps") / "page_files"
    template = (folder / "page.html").read_text()
    parts = {"STYLE": (folder / "page.css").read_text(), "SCRIPT": (folder / "page.js").read_text()}
    parts |= {"TITLE": html.escape(f"{report['name']}: a sweep"), "DATA": script_safe(report)}
    parts["EVALUATION"] = evaluation
    return re.sub(r"@([A-Z]+)@", lambda place: parts[place[1]], template)


def script_safe(value: Any) -> str:
    """JSON without the characters that mean something in HTML."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
