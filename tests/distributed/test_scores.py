"""Scores of windows that are split over data-parallel processes, of which there may be more than windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import TIMEOUT_S, environment, must_pass
from tests.models import tiny_model
from tests.reference import UNEVEN

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCORES = Path(__file__).with_name("scores.py")
SIZES = UNEVEN | {"num_hidden_layers": 2, "max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each number of processes has found."""
    folder = tmp_path_factory.mktemp("scores")
    command = [sys.executable, str(SCORES), str(tiny_model(folder / "model", "llama", **SIZES)), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), check=False)
    must_pass(result)
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_splitting_the_windows_changes_no_score(folder: Path, processes: int) -> None:
    alone, split = (load_file(folder / f"{count}.safetensors") for count in (1, processes))
    assert alone.keys() == split.keys() and len(alone) > 100
    for name, scores in alone.items():
        torch.testing.assert_close(split[name], scores, rtol=1e-9, atol=1e-12, msg=name)
