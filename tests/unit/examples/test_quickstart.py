"""The quickstart's helpers: wiki markup to text, the split by article, and the verdict."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "quickstart"


def helper(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MARKUP = """{{Infobox|a={{b|c}}}}<!-- hidden -->
'''Anarchism''' is a [[political philosophy|philosophy]] of [[state|states]],<ref name="x">C</ref> in ''use''.

[[File:a.jpg|thumb|A [[caption]]]]
== History ==
* First [http://example.com item] &amp; more
{| class="wikitable"
| cell
|}
Last<br/> line<ref name="y" />.
== See also ==
* [[Nothing]]
[[Category:Things]]
"""


def test_plain_text() -> None:
    assert helper("fetch_text").plain_text(MARKUP).splitlines() == [
        "Anarchism is a philosophy of states, in use.",
        "History",
        "First item & more",
        "Last line.",
    ]


def test_no_held_out_article_is_trained_on() -> None:
    pages = [(f"title {number}", "text") for number in range(20)]
    train, held_out = helper("fetch_text").split(pages)
    assert [title for title, _ in held_out] == ["title 7", "title 15"]
    assert len(train) == 18 and not {title for title, _ in train} & {title for title, _ in held_out}


@pytest.mark.parametrize(
    ("learned", "recovered", "status"),
    [(50.0, 40.0, 0), (100.0, 40.0, 1), (150.0, 40.0, 1), (50.0, 50.0, 1), (50.0, float("nan"), 1)],
)
def test_verdict(
    tmp_path: Path, learned: float, recovered: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"dense": 20.0, "prior": 100.0, "learned": learned, "recovered": recovered, "exported": recovered}
    for row, value in values.items():
        (tmp_path / f"{row}.json").write_text(json.dumps({"perplexity": value}))
    assert helper("summary").main(tmp_path) == status
    assert "100.00" in capsys.readouterr().out
