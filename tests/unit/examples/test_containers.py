"""The CPU image's constraints: everything that its environment installs has one version, which the package allows."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
EXTRAS = ("dev", "quickstart", "eval")
"""Those that tools/setup_env.sh installs."""
IMAGE_PYTHON = "3.12"


def pinned() -> dict[str, str]:
    """Version of each package in docker/constraints.txt."""
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def stated() -> list[Requirement]:
    """The requirements of the package and its extras, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name in EXTRAS for line in extras[name]]
    found = [Requirement(line) for line in lines]
    return [item for item in found if not item.marker or item.marker.evaluate({"python_version": IMAGE_PYTHON})]


def needed(requirement: Requirement) -> list[Requirement]:
    """What an installed package needs itself, here. Left out: PyTorch, whose needs differ from build to build, and what
    is not installed with this Python.
    """
    if requirement.name == "torch" or (requirement.marker and not requirement.marker.evaluate()):
        return []
    found = [Requirement(line) for line in importlib.metadata.requires(requirement.name) or []]
    extras = requirement.extras or {""}
    return [item for item in found if not item.marker or any(item.marker.evaluate({"extra": e}) for e in extras)]


def test_every_package_of_the_cpu_image_is_pinned() -> None:
    versions, open_, seen = pinned(), stated(), set()
    for requirement in open_:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        if name not in seen:
            seen.add(name)
            open_ += needed(requirement)
    assert sorted(seen - set(versions)) == []
