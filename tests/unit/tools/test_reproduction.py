"""docs/reproduction.md is made of result files, and a number that none of them has is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import reproduction

RESULT = {"columns": ["method", "kept", "perplexity"], "rows": [["x", "2:4", 55.123456], ["x", "4:8", 5], ["y", "", 1]]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one kind of result, of two days."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "quality_2026-01-01.json").write_text("{}")
    (folder / "quality_2026-01-02.json").write_text(json.dumps(RESULT))
    (folder / "quality_of_others_2026-01-03.json").write_text("{}")
    return tmp_path


def test_the_page_is_what_the_files_say() -> None:
    assert reproduction.main(["--check"]) == 0


def test_a_cell_of_the_newest_file(root: Path) -> None:
    found = reproduction.found({"file": "quality", "row": {"method": "x", "kept": "2:4"}, "column": "perplexity"}, root)
    assert found == "[55.123](../benchmarks/results/quality_2026-01-02.json)"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"file": "quality", "row": {"method": "z"}, "column": "perplexity"}, "0 rows"),
        ({"file": "quality", "row": {"method": "x"}, "column": "perplexity"}, "2 rows"),
        ({"file": "quality", "row": {"tool": "x"}, "column": "perplexity"}, "no columns"),
        ({"file": "speed", "row": {"method": "x"}, "column": "perplexity"}, "no result file"),
    ],
)
def test_a_number_that_was_not_measured_is_an_error(root: Path, where: dict[str, Any], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        reproduction.found(where, root)


def test_what_was_not_run_says_what_it_needs(root: Path) -> None:
    row = {"what": "big", "published": 1.5, "needs": "8 GPUs", "command": "see README.md"}
    made = reproduction.section({"method": "M", "paper": "P", "rows": [row]}, root)
    assert "| big | 1.5 | not run: needs 8 GPUs | see README.md |" in made
