"""What tests read from run folders and do to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_prune.log import read_metrics


def curve(run: Path, key: str = "loss") -> list[float]:
    """The values of a metric, step by step."""
    return [record[key] for record in read_metrics(run) if key in record]


def reopened(run: Path, copy: Path, last: int) -> Path:
    """A copy of a whole run that looks as if it had died behind the checkpoint of step `last`."""
    shutil.copytree(run, copy)
    about = json.loads((copy / "run.json").read_text())
    state = "training" if about["state"] == "trained" else "learning"
    (copy / "run.json").write_text(json.dumps(about | {"state": state}))
    for result in ("decision", "weights"):
        shutil.rmtree(copy / result, ignore_errors=True)
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > last:
            shutil.rmtree(folder)
    return copy
