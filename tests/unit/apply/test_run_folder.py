"""What a run folder says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.decision.run_folder import RunDescription, read_run, write_run


@pytest.mark.parametrize("state", ["learning", "searching", "training", "decided", "trained"])
def test_every_state_that_is_written_is_read(tmp_path: Path, state: str) -> None:
    write_run(tmp_path, RunDescription("model", "darwinlm", "parameters=1K", state))
    assert read_run(tmp_path).state == state
