"""Fills the tables of docs/install.md: versions that may be installed, and those of environments that are made here.

python tools/versions.py            rewrites the tables
python tools/versions.py --check    exit status 1 when they are not what pyproject.toml, backend.py and the pins say
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "install.md"
BLOCK = re.compile(r"(<!-- versions: (\w+) -->\n).*?(<!-- end of versions -->)", re.DOTALL)
PYTHONS = [f"3.{minor}" for minor in range(8, 30)]


def read(root: Path, name: str) -> str:
    """Text of a file of the repository."""
    return (root / name).read_text(encoding="utf-8")


def cores(root: Path) -> list[str]:
    """The versions of megatron-core that the package adapts, oldest first, as backend.py has them."""
    tree = ast.parse(read(root, "megatron_prune/backend.py"))
    (found,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUPPORTED_CORE"
    ]
    return list(ast.literal_eval(found))


def stated(root: Path, name: str, python: str) -> SpecifierSet:
    """What pyproject.toml asks of a package with this Python; of the extra `gpu` too."""
    project = tomllib.loads(read(root, "pyproject.toml"))["project"]
    lines = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["gpu"]]]
    (found,) = [
        line.specifier
        for line in lines
        if line.name == name and (line.marker is None or line.marker.evaluate({"python_version": python}))
    ]
    return found


def words(limits: SpecifierSet) -> str:
    """`2.9 or later, below 2.12`."""
    order = {">=": "{} or later", "<": "below {}", "==": "{}"}
    parts = sorted(limits, key=lambda part: list(order).index(part.operator))
    return ", ".join(order[part.operator].format(part.version) for part in parts)


def allowed(root: Path) -> str:
    """Python by Python, what goes with it."""
    wanted = SpecifierSet(tomllib.loads(read(root, "pyproject.toml"))["project"]["requires-python"])
    rows = ["| Python | megatron-core | PyTorch | transformers | Transformer Engine (GPUs) |", "| --- " * 5 + "|"]
    for python in (one for one in PYTHONS if wanted.contains(one)):
        limits = stated(root, "megatron-core", python)
        core = " or ".join(f"{one}.*" for one in cores(root) if limits.contains(f"{one}.0"))
        others = [words(stated(root, name, python)) for name in ("torch", "transformers", "transformer-engine")]
        rows.append(f"| {python} | {core} | {' | '.join(others)} |")
    return "\n".join(rows)


def pin(text: str, name: str) -> str:
    """The version of a package in a list of pins, or in a command that installs it."""
    (found,) = set(re.findall(rf"(?<![\w-]){re.escape(name)}==([\w.]+)", text))
    return str(found)


def pinned(root: Path) -> str:
    """What each environment that the repository makes consists of."""
    constraints, maxtext = read(root, "docker/constraints.txt"), read(root, "tools/maxtext_requirements.txt")
    cpu, gpu, tpu = (read(root, f"docker/Dockerfile{end}") for end in (".cpu", "", ".tpu"))
    python = re.compile(r"FROM python:(\d+\.\d+)")
    base = re.search(r"ARG BASE=(\S+)", gpu)
    inside = [re.search(pattern, text) for pattern, text in ((python, cpu), (python, tpu))]
    assert base is not None and inside[0] is not None and inside[1] is not None
    core = f"megatron-core {pin(constraints, 'megatron-core')}, transformers {pin(constraints, 'transformers')}"
    torch = pin(constraints, "torch")
    return "\n".join(
        [
            "| environment | made by | what is in it |",
            "| --- | --- | --- |",
            f"| CPUs | `docker/Dockerfile.cpu` | Python {inside[0][1]}, PyTorch {torch}, {core} |",
            f"| NVIDIA GPUs | `docker/Dockerfile` | `{base[1]}`, megatron-core {pin(gpu, 'megatron-core')} |",
            f"| MaxText | `tools/setup_maxtext.sh`, `docker/Dockerfile.tpu` | Python {inside[1][1]}, "
            f"MaxText {pin(maxtext, 'maxtext')}, JAX {pin(maxtext, 'jax')}, no PyTorch |",
        ]
    )


TABLES: dict[str, Callable[[Path], str]] = {"allowed": allowed, "pinned": pinned}


def main(arguments: list[str]) -> int:
    """Rewrite the page, or only compare."""
    text = PAGE.read_text(encoding="utf-8")
    filled = BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]](ROOT)}\n\n{block[3]}", text)
    if arguments != ["--check"]:
        PAGE.write_text(filled, encoding="utf-8")
        return 0
    if filled != text:
        print("docs/install.md: not what the limits and pins say; run python tools/versions.py", file=sys.stderr)
    return int(filled != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
