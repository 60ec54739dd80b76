"""Writes megatron_prune/__init__.pyi, the types of the Python API, from the verbs' options; `--check` only compares."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import megatron_prune
from megatron_prune.api import NAMES, function

STUB = Path(__file__).parent.parent / "megatron_prune" / "__init__.pyi"
HEAD = '''"""Types of the Python API; written by tools/api_stub.py from the options of the verbs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_prune.errors import UserError as UserError
from megatron_prune.in_memory import prune_model as prune_model

__version__: str

'''


def kind(annotation: Any) -> str:
    """What may be given for an option of this type."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(kind(part) for part in arguments))
    if get_origin(annotation) is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if get_origin(annotation) is tuple:
        return f"Sequence[{kind(arguments[0])}]"
    if annotation is types.NoneType:
        return "None"
    return "str | Path" if annotation is Path else annotation.__name__


def parameter(found: inspect.Parameter) -> str:
    """One parameter of a signature."""
    if found.kind is found.VAR_KEYWORD:
        return f"**{found.name}: Any"
    words = kind(found.annotation)
    if found.name == "target":
        words = words.replace("str", "str | Mapping[str, int]")
    default = "" if found.default is found.empty else f" = {found.default!r}"
    return f"{found.name}: {words}{default}"


def stub() -> str:
    """The whole file."""
    parts = [HEAD]
    for name in NAMES:
        found = list(inspect.signature(function(name)).parameters.values())
        needed = [parameter(p) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
        rest = [parameter(p) for p in found if p.kind is not p.POSITIONAL_OR_KEYWORD]
        star = ["*"] if rest and not rest[0].startswith("**") else []
        lines = "".join(f"    {line},\n" for line in [*needed, *star, *rest])
        parts.append(f"def {name}(\n{lines}) -> Any: ...\n".replace("Any,\n)", "Any\n)"))
    parts.append(f"\n__all__ = {megatron_prune.__all__!r}\n")
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "-q", "--stdin-filename", str(STUB), "-"],
        input="".join(parts),
        capture_output=True,
        text=True,
        check=True,
    )
    return formatted.stdout


def main() -> int:
    """Write the stub; with `--check` say whether it is what would be written."""
    if "--check" not in sys.argv[1:]:
        STUB.write_text(stub(), encoding="utf-8")
        return 0
    if STUB.read_text(encoding="utf-8") != stub():
        print(f"{STUB} is out of date: run python tools/api_stub.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
