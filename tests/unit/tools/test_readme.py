"""README.md and the guide: their tables come from result files, their commands exist, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.__main__ import VERBS
from megatron_prune.methods.base import methods
from megatron_prune.options import entries, flag
from tools import readme_table

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
RESULT = {"columns": ["row", "P1"], "rows": [["dense", 24.1951], ["magnitude", 1729.7], ["other", None]]}
ABOUT = {"hardware": "2 cores", "date": "2026-01-02", "protocol": "Windows of 1024."}


def test_every_page_of_the_guide_is_reached_from_the_readme() -> None:
    linked = re.findall(r"\]\((docs/[^)]+\.md)\)", (ROOT / "README.md").read_text())
    assert set(linked) == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}


def test_tables_are_what_the_result_files_say() -> None:
    done = subprocess.run(
        [sys.executable, "tools/readme_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_picture_of_the_layers_is_the_contracts() -> None:
    done = subprocess.run(
        [sys.executable, "tools/architecture.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_newest_file_counts(tmp_path: Path) -> None:
    text = "a\n<!-- table: results/x_*.json -->\nold\n<!-- end of table -->\nb\n"
    assert readme_table.NOTHING in readme_table.fill(text, tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x_1.json").write_text("{}")
    (tmp_path / "results" / "x_2.json").write_text(json.dumps(RESULT | ABOUT))
    filled = readme_table.fill(text, tmp_path)
    assert "| row | P1 |\n| --- | --- |\n| dense | 24.2 |\n| magnitude | 1730 |\n| other |  |\n" in filled
    assert "Windows of 1024. 2 cores, 2026-01-02; [x_2.json](results/x_2.json)." in filled
    assert "old" not in filled and filled.startswith("a\n") and filled.endswith("b\n")
    assert readme_table.fill(filled, tmp_path) == filled
    below = readme_table.fill(text, tmp_path, tmp_path / "docs")
    assert "[x_2.json](../results/x_2.json)." in below


def test_a_ragged_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cells"):
        readme_table.table(RESULT | ABOUT | {"rows": [["dense"]]}, Path("x.json"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_verbs_and_flags_that_exist(document: str) -> None:
    text = (ROOT / document).read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:torchrun .* -m megatron_prune|megatron-prune) (\S+)(.*)$", text, re.MULTILINE)
    for verb, rest in commands:
        if verb.startswith("-") or verb.isupper():
            continue
        known = {flag(option.key) for option in entries(VERBS[verb].config)} | {"--config"}
        given = set(re.findall(r"(--[a-z][\w-]*)", rest.split(" #")[0]))
        knobs = [knob.name for info in methods() if info.name in rest.split() for knob in info.hyperparameters]
        hyper = {flag(form) for name in knobs for form in (name, f"no_{name}")}
        assert given - known - hyper == set(), f"{verb}: {given - known}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_scripts_exist(document: str) -> None:
    text, folder = (ROOT / document).read_text(), (ROOT / document).parent
    targets = [folder / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    targets += [ROOT / target for target in re.findall(r"^(?:bash )?([\w./]+/run\.sh)", text, re.MULTILINE)]
    assert [target for target in targets if not target.exists()] == []
    titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles


@pytest.mark.parametrize("script", ["examples/quickstart/run.sh", "tests/run.sh", "tools/setup_env.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


def test_quickstart_never_overwrites(tmp_path: Path) -> None:
    """The script, copied to a folder of its own that holds results, stops before it does anything."""
    copy = tmp_path / "examples" / "quickstart" / "run.sh"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((ROOT / "examples" / "quickstart" / "run.sh").read_bytes())
    (tmp_path / "runs" / "quickstart" / "results").mkdir(parents=True)
    done = subprocess.run(["bash", str(copy)], capture_output=True, text=True)
    assert done.returncode == 2 and "--fresh" in done.stderr
    assert subprocess.run(["bash", str(copy), "--frsh"], capture_output=True, text=True).returncode == 2
