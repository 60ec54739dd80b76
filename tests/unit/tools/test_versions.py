"""docs/install.md: its tables are what pyproject.toml, backend.py and the pins say, and its extras exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tools import versions

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_tables_are_current(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert versions.main(["--check"]) == 0
    (tmp_path / "install.md").write_text(PAGE.replace("0.19.*", "0.18.*"), encoding="utf-8")
    monkeypatch.setattr(versions, "PAGE", tmp_path / "install.md")
    assert versions.main(["--check"]) == 1
    assert versions.main([]) == 0 and (tmp_path / "install.md").read_text(encoding="utf-8") == PAGE


def test_each_python_has_a_row_with_versions_that_pip_may_take() -> None:
    rows = dict(re.findall(r"^\| (3\.\d+) \| ([^|]+) \|", PAGE, re.MULTILINE))
    classified = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert set(rows) == classified
    lines = [line.removeprefix("megatron-core") for line in PROJECT["dependencies"] if line.startswith("megatron-core")]
    older, newer = (SpecifierSet(line.partition(";")[0]) for line in lines)
    assert "< '3.12'" in lines[0] and ">= '3.12'" in lines[1]
    for python, cell in rows.items():
        limits = older if python == "3.11" else newer
        named = cell.replace(".*", ".2").split(" or ")
        assert all(limits.contains(version) for version in named)
        assert {f"0.{minor}.2" for minor in range(40) if limits.contains(f"0.{minor}.2")} == set(named)


@pytest.mark.parametrize(
    ("limits", "said"),
    [(">=2.9,<2.12", "2.9 or later, below 2.12"), ("<6,>=5.6", "5.6 or later, below 6"), ("==1.0", "1.0")],
)
def test_limits_in_words(limits: str, said: str) -> None:
    assert versions.words(SpecifierSet(limits)) == said


def test_every_extra_is_on_the_page_and_no_other() -> None:
    told = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert told == set(PROJECT["optional-dependencies"])
    assert set(re.findall(r"'\.\[(\w+)\]'", PAGE)) - {"NAME"} <= told
