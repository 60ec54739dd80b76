"""The house has one direction: the contracts of pyproject.toml hold, and an import that points up breaks them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package with its contracts."""
    shutil.copytree(ROOT / "megatron_prune", tmp_path / "megatron_prune", ignore=shutil.ignore_patterns("*.so"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def test_every_import_points_down() -> None:
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("kernels/selection.py", "from megatron_prune.decision import target", "megatron_prune.kernels"),
        ("model/build.py", "def late() -> None:\n    import megatron_prune.jobs.prune", "megatron_prune.model"),
        ("verbs/trim.py", "from megatron_prune.verbs import prune  # noqa", ""),
        ("new_room.py", "", "megatron_prune.new_room"),
    ],
)
def test_an_import_that_points_up_is_found(house: Path, file: str, line: str, told: str) -> None:
    """Also inside a function; so is a module that nobody gave a place. Siblings may import each other one way."""
    path = house / "megatron_prune" / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n\n{line}\n")
    found = lint(house)
    assert (found.returncode != 0) == bool(told) and told in found.stdout


def test_the_contracts_cover_everything_and_ignore_nothing() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers, cycles = settings["contracts"]
    assert layers["exhaustive"] and cycles["type"] == "acyclic_siblings"
    assert not any(key.startswith(("ignore", "exclude")) for contract in (settings, layers, cycles) for key in contract)
