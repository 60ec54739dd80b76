"""Which Python tools/setup_env.sh takes: the newest of those that are there, wherever they are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NEEDED = "bash cat sha256sum cut dirname rm mkdir cp chmod grep sed".split()
PYTHON = """#!/bin/bash
# Stands for a Python {version}: says which it is, makes an environment of itself, installs nothing.
case "$1 $2" in
    -c*) [ "$3" = {version} ] ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    --version*) echo "Python {version}.0" ;;
esac
"""


def python(path: Path, version: str) -> None:
    """A command that answers as a Python of this version does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON.format(version=version))
    path.chmod(0o755)


def made(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What the script says in a copy of the project where no other Python is in reach."""
    project, commands = tmp_path / "project", tmp_path / "bin"
    (project / "tools").mkdir(parents=True, exist_ok=True)
    for name in ("setup_env.sh", "find_python.sh"):
        shutil.copy(ROOT / "tools" / name, project / "tools")
    (project / "pyproject.toml").touch()
    commands.mkdir(exist_ok=True)
    for name in NEEDED:
        found = shutil.which(name)
        assert found is not None
        if not (commands / name).exists():
            (commands / name).symlink_to(found)
    environment = {"PATH": str(commands), "HOME": str(tmp_path / "home")}
    command = [str(commands / "bash"), str(project / "tools" / "setup_env.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"bin/python3.11": "3.11"}, "3.11"),
        ({"bin/python3.12": "3.12"}, "3.12"),
        ({"bin/python3": "3.12"}, "3.12"),
        ({"bin/python3.11": "3.11", "bin/python3": "3.14", "home/.pyenv/versions/3.12.4/bin/python": "3.12"}, "3.12"),
        (
            {"bin/python3.11": "3.11", "bin/python3.12": "3.12", "home/.pyenv/versions/3.13.0/bin/python": "3.13"},
            "3.13",
        ),
        ({"bin/python3.13": "2.7", "bin/python3.11": "3.11"}, "3.11"),  # a shim of pyenv's that is not chosen
    ],
)
def test_the_newest_python_is_taken(tmp_path: Path, there: dict[str, str], taken: str) -> None:
    for place, version in there.items():
        python(tmp_path / place, version)
    done = made(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Python {taken}.0" in done.stdout and (tmp_path / "project" / ".venv" / "stamp").is_file()
    assert not made(tmp_path).stdout  # up to date


def test_a_version_that_is_asked_for(tmp_path: Path) -> None:
    python(tmp_path / "bin" / "python3.12", "3.12")
    python(tmp_path / "bin" / "python3.11", "3.11")
    assert "Python 3.11.0" in made(tmp_path, "3.11").stdout
    assert (tmp_path / "project" / ".venv-3.11").is_dir() and not (tmp_path / "project" / ".venv").exists()


def test_none_is_one_line(tmp_path: Path) -> None:
    python(tmp_path / "bin" / "python3", "3.10")
    nothing, old = made(tmp_path), made(tmp_path, "3.11")
    assert (nothing.returncode, old.returncode) == (2, 3)
    for done in (nothing, old):
        assert len(done.stderr.splitlines()) == 1 and "install one and run this again" in done.stderr
