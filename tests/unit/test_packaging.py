"""What people install: a wheel, and an sdist that makes one, work outside of the source tree."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import megatron_prune
from megatron_prune.version import VERSION
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = ["kernels/csrc/gumbel.c", "reporting/page.html.j2", "py.typed", "__init__.pyi", "evaluation/tasks"]
"""Files that are not Python: lost, a kernel, a page, types or tasks are missing."""


def run(*words: str | Path, cwd: Path) -> str:
    """Standard output of a command that succeeds; nothing of this repository is on its path."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is made from it and not from the source tree."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.mark.slow
def test_the_index_takes_both(built: Path) -> None:
    """Metadata that it reads, and a page that it can show."""
    pytest.importorskip("twine", reason="twine is not installed (pip install 'megatron-prune[dev]')")
    files = sorted(built.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    told = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files, cwd=built)
    assert told.count("PASSED") == 2 and "WARNING" not in told


@pytest.mark.slow
def test_the_index_page_has_no_link_that_leads_nowhere(built: Path) -> None:
    """It is README.md, whose relative links mean nothing there; what they lead to is named."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (about,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(about))
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload(decode=True)
    assert isinstance(page, bytes)
    text, readme = page.decode(), (ROOT / "README.md").read_text()
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []
    named = re.findall(r"(?<!!)\[[^\]]*\]\(((?!https)[^)#]+)", readme)
    assert "docs/commands.md" in named and [path for path in named if path not in text] == []
    assert [line for line in readme.splitlines() if "](" not in line and line not in text.splitlines()] == []


@pytest.mark.slow
def test_the_sdist_has_what_a_packager_runs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "tests/run.sh",
        "tests/unit/test_packaging.py",
        "docs/masks.md",
        "tools/setup_env.sh",
        "mkdocs.yml",
        "CHANGELOG.md",
        "SECURITY.md",
    ):
        assert name in names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "runs"))]


@pytest.mark.slow
def test_a_wheel_works_outside_of_the_source_tree(built: Path, tmp_path: Path) -> None:
    """In an environment of its own that sees this one's libraries, but not this one's editable installation."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert all(any(f"megatron_prune/{part}" in name for name in names) for part in EXPECTED)
    (about,) = [name for name in names if name.endswith("dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        told = archive.read(about).decode()
    for line in (f"Version: {VERSION}", "License-Expression: Apache-2.0", "Provides-Extra: all", "Keywords: pruning"):
        assert f"\n{line}" in told
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "tools"))]

    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    (site,) = tmp_path.glob("env/lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", "env/bin/python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    tiny_llama(tmp_path / "hf")
    command = tmp_path / "env" / "bin" / "megatron-prune"
    where = run("env/bin/python", "-c", "import megatron_prune; print(megatron_prune.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    assert "maskllm" in run(command, "methods", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path).split() == ["megatron-prune", VERSION]
    run(command, "import", "--input", "hf", "--output", "model", cwd=tmp_path)
    what = ("--method", "magnitude", "--target", "2:4")
    run(command, "prune", "--input", "model", "--output", "run", *what, cwd=tmp_path)
    run(command, "trim", "--input", "run", "--output", "sparse", cwd=tmp_path)
    run(command, "verify", "--input", "sparse", "--target", "2:4", cwd=tmp_path)
    run(command, "report", "--inputs", "run", "--output", "report.html", cwd=tmp_path)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_place_says_the_same_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == VERSION == megatron_prune.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"] and "version" not in project and cited["license"] == project["license"]
