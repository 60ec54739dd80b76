"""docs/troubleshooting.md quotes messages as the code writes them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ROWS = re.findall(r"^\| `(.+?)` \| (.+) \| (.+) \|$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
HOLE = "\0"


@cache
def texts() -> str:
    """Every text in the code, one a line, with a mark where a value is put in."""
    found: list[str] = []
    for path in sorted((ROOT / "megatron_prune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("\n", " "))
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values))
    return "\n".join(found)


def test_the_page_has_the_cases() -> None:
    assert len(ROWS) > 30
    assert len({message for message, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize("message", [message for message, _, _ in ROWS])
def test_messages_exist(message: str) -> None:
    parts = [part for part in (piece.strip() for piece in message.split("...")) if len(part) > 3]
    assert max(map(len, parts)) > 12, "too little is quoted to be found"
    missing = [part for part in parts if part not in texts()]
    assert not missing, f"the code never says {missing}"
