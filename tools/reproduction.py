"""Writes docs/reproduction.md: published numbers beside those of committed result files, or why there is none.

    python tools/reproduction.py            rewrites docs/reproduction.md from docs/reproduction.yaml
    python tools/reproduction.py --check    exit status 1 when it is not what the files say

A number of ours is never typed: it is looked up by file, row and column; a row that is not found, or found twice, is an
error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# Published against reproduced

Made by `python tools/reproduction.py` from [reproduction.yaml](reproduction.yaml) and the result files it names; no
number of ours is typed by hand. "Not run" says what it would take. P1 is the perplexity protocol of
`benchmarks/bench/study.py`.
"""


def page(methods: list[dict[str, Any]], root: Path) -> str:
    """The whole page."""
    return "\n".join([HEADER, *(section(method, root) for method in methods)])


def section(method: dict[str, Any], root: Path) -> str:
    """Heading, sources and table of one method."""
    lines = ["| what | published | ours | command |", "| --- | --- | --- | --- |"]
    for row in method["rows"]:
        ours = found(row["ours"], root) if "ours" in row else f"not run: needs {row['needs']}"
        command = row["command"]
        shown = command if command.startswith("see ") else f"`{command}`"
        lines.append(f"| {row['what']} | {row['published']} | {ours} | {shown} |")
    return "\n".join([f"## {method['method']}", "", f"{method['paper']}.", "", *lines, ""])


def found(where: dict[str, Any], root: Path) -> str:
    """The cell of the newest result file of that name, with a link to the file."""
    files = sorted((root / "benchmarks" / "results").glob(f"{where['file']}_[0-9]*.json"))
    if not files:
        raise SystemExit(f"reproduction: no result file benchmarks/results/{where['file']}_DATE.json")
    result = json.loads(files[-1].read_text(encoding="utf-8"))
    columns = result["columns"]
    unknown = {*where["row"], where["column"]} - set(columns)
    if unknown:
        raise SystemExit(f"reproduction: {files[-1].name} has no columns {sorted(unknown)}")
    rows = [row for row in result["rows"] if all(row[columns.index(k)] == v for k, v in where["row"].items())]
    if len(rows) != 1:
        raise SystemExit(f"reproduction: {files[-1].name} has {len(rows)} rows with {where['row']}, not one")
    value = rows[0][columns.index(where["column"])]
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
    return f"[{shown}](../{files[-1].relative_to(root).as_posix()})"


def main(arguments: list[str]) -> int:
    """Write or check the page."""
    source = (ROOT / "docs" / "reproduction.yaml").read_text(encoding="utf-8")
    made = page(yaml.safe_load(source), ROOT)
    target = ROOT / "docs" / "reproduction.md"
    if arguments == ["--check"]:
        if not target.is_file() or target.read_text(encoding="utf-8") != made:
            print("docs/reproduction.md is not what the result files say: run tools/reproduction.py", file=sys.stderr)
            return 1
        return 0
    target.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
