"""Fills the tables of README.md and of docs/ from committed result files, so that no number is typed by hand.

    python tools/readme_table.py            rewrites them
    python tools/readme_table.py --check    exit status 1 when they are not what the result files say

A table stands between two comments; the pattern may match several dated files, the last by name counts:

    <!-- table: benchmarks/results/quality_*.json -->
    <!-- end of table -->

A table of choices takes single rows of several files, as a YAML list says: what a row is for, what it needs, the
method, the file, the columns by which its row is found, and the columns that are shown:

    <!-- choice: docs/choosing.yaml -->
    <!-- end of choice -->

A result file that has a table is JSON with `columns` (list of str) and `rows` (list of lists), `hardware`,
`date` and `protocol`, which are printed below the table.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
CHOICE = re.compile(r"(<!-- choice: (\S+) -->\n).*?(<!-- end of choice -->)", re.DOTALL)
NOTHING = "*No result file is committed yet.*"


def documents(root: Path) -> list[Path]:
    """All that may have tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(text: str, root: Path, folder: Path | None = None) -> str:
    """`text` of a document in `folder`, `root` when left out, with each table made anew from the files under `root`."""
    text = BLOCK.sub(lambda block: block[1] + newest_table(root, block[2], folder or root) + "\n" + block[3], text)
    return CHOICE.sub(lambda block: block[1] + choices(root, block[2], folder or root) + "\n" + block[3], text)


def newest_table(root: Path, pattern: str, folder: Path) -> str:
    """The table of the last file, by name, that matches."""
    files = sorted(root.glob(pattern))
    if not files:
        return NOTHING
    return table(json.loads(files[-1].read_text(encoding="utf-8")), Path(os.path.relpath(files[-1], folder)))


def table(result: dict[str, Any], source: Path) -> str:
    """Markdown of one result file; `source` is its place, seen from the document."""
    lines = [result["columns"], ["---"] * len(result["columns"]), *result["rows"]]
    if any(len(line) != len(result["columns"]) for line in lines):
        raise ValueError(f"{source}: a row has not as many cells as there are columns")
    made = ["| " + " | ".join(cell(value) for value in line) + " |" for line in lines]
    below = f"{result['protocol']} {result['hardware']}, {result['date']}; [{source.name}]({source.as_posix()})."
    return "\n".join(["", *made, "", below, ""])


def choices(root: Path, named: str, folder: Path) -> str:
    """Markdown of a list of choices, each with what was measured of it."""
    lines = [["goal", "needs", "method", "measured", "file"], ["---"] * 5]
    for choice in yaml.safe_load((root / named).read_text(encoding="utf-8")):
        file = sorted((root / "benchmarks" / "results").glob(choice["file"]))[-1]
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]
        found = [row for row in rows if all(row[key] == value for key, value in choice["row"].items())]
        if not found:
            raise ValueError(f"{named}: {file.name} has no row {choice['row']}")
        measured = ", ".join(f"{name} {cell(found[0][name])}" for name in choice["show"])
        method = f"`{choice['method']}`" if choice["method"] else ""
        link = f"[{file.name}]({Path(os.path.relpath(file, folder)).as_posix()})"
        lines.append([choice["goal"], choice["needs"], method, measured, link])
    return "\n".join(["", *("| " + " | ".join(line) + " |" for line in lines), ""])


def cell(value: Any) -> str:
    """Numbers to four figures, nothing for None, text as it is."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def main(arguments: list[str]) -> int:
    wrong = []
    for document in documents(ROOT):
        text = document.read_text(encoding="utf-8")
        filled = fill(text, ROOT, document.parent)
        if filled != text:
            wrong.append(document)
            if arguments != ["--check"]:
                document.write_text(filled, encoding="utf-8")
    if not wrong or arguments != ["--check"]:
        return 0
    names = ", ".join(document.relative_to(ROOT).as_posix() for document in wrong)
    print(f"{names}: not what the result files say; run python tools/readme_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
