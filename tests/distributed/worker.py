"""Runs several verbs, one after the other, in the processes of one torchrun: `worker.py COMMANDS.json`.

The command ["control"] makes mask noise depend on the layout from then on, ["unreduced"] leaves gradients of unit masks
to each rank; ["gradients", ...] is `save_gradients`, ["recovery_gradients", ...] `save_recovery_gradients`.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip
import torch.distributed as dist

from megatron_prune.__main__ import main

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.distributed.controls import draw_noise_by_local_position, leave_unit_gradients_unreduced
from tests.distributed.gradients import save_gradients, save_recovery_gradients

GRADIENTS = {"gradients": save_gradients, "recovery_gradients": save_recovery_gradients}

CONTROLS = {"control": draw_noise_by_local_position, "unreduced": leave_unit_gradients_unreduced}


def run(commands: list[list[str]]) -> int:
    """Exit status of the first verb that failed, else 0."""
    backend.connect(timedelta(minutes=5))
    for command in commands:
        if command[0] in CONTROLS:
            CONTROLS[command[0]]()
            continue
        if command[0] in GRADIENTS:
            GRADIENTS[command[0]](*command[1:])
            continue
        status = main(command)
        if status:
            return status
        dist.barrier()
    backend.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text())))
