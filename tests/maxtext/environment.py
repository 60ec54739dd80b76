"""The other environment: MaxText on Python 3.12 (tools/setup_maxtext.sh), in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_prune.errors import UserError
from megatron_prune.exporting.maxtext import maxtext_python

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")


def python() -> Path:
    """Its python; skips the test where there is none."""
    try:
        return maxtext_python()
    except UserError as error:
        pytest.skip(f"no environment for MaxText: {error}")


def run(folder: Path, calls: list[list[object]]) -> list[str]:
    """Make calls (see worker.py) one after the other in one process, and return what each of them said or returned."""
    (folder / "calls.json").write_text(json.dumps([[str(word) for word in call] for call in calls]))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [str(python()), str(WORKER), str(folder / "calls.json"), str(folder / "answers.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "answers.json").read_text())
