"""What pyproject.toml cannot say: README.md as the package index shows it. All else of the packaging is there."""

import runpy
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools.links import long_description, repository  # noqa: E402

version = runpy.run_path(str(ROOT / "megatron_prune" / "version.py"))["VERSION"]
readme = (ROOT / "README.md").read_text(encoding="utf-8")
setup(
    long_description=long_description(readme, repository(), f"v{version}"),
    long_description_content_type="text/markdown",
)
