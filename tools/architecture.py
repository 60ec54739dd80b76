"""Draws the layers in docs/architecture.md from the contract in pyproject.toml and the rooms' own first lines.

python tools/architecture.py            rewrites the picture
python tools/architecture.py --check    exit status 1 when it is not what the contract says
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(<!-- layers -->\n).*?(<!-- end of layers -->)", re.DOTALL)


def layers(root: Path) -> list[list[str]]:
    """Rooms of each layer, the highest first."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (found,) = [contract for contract in contracts if contract["type"] == "layers"]
    return [[room.strip() for room in re.split(r"[|:]", layer)] for layer in found["layers"]]


def says(root: Path, room: str) -> str:
    """First sentence of a room's docstring."""
    package = root / "megatron_prune"
    file = package / room / "__init__.py" if (package / room).is_dir() else package / f"{room}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", first)[0]


def picture(root: Path) -> str:
    """A table, one row a layer: imports point down it."""
    lines = ["| layer | room | what it is |", "| --: | --- | --- |"]
    for number, rooms in enumerate(layers(root), start=1):
        for room in rooms:
            name = f"`{room}/`" if (root / "megatron_prune" / room).is_dir() else f"`{room}.py`"
            lines.append(f"| {number} | {name} | {says(root, room).replace('|', chr(92) + '|')} |")
    return "\n".join(["", *lines, "", ""])


def main(arguments: list[str]) -> int:
    """Rewrite the page, or only compare."""
    text = PAGE.read_text(encoding="utf-8")
    drawn = BLOCK.sub(lambda block: block[1] + picture(ROOT) + block[2], text)
    if arguments != ["--check"]:
        PAGE.write_text(drawn, encoding="utf-8")
        return 0
    if drawn != text:
        print("docs/architecture.md: not what the contract says; run python tools/architecture.py", file=sys.stderr)
    return int(drawn != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
