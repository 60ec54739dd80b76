"""Step counts of optimizers that count by group, as Transformer Engine's Adam does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch
import torch.distributed as dist
from torch.nn import Parameter

from megatron_prune.training.state import Slot, _fill, _steps
from tests.distributed.launch import environment


class CountingByGroup:
    """Adam of Transformer Engine 2.9: a group counts its steps only where it has parameters on this rank."""

    def __init__(self, *groups: list[Parameter]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": group} for group in groups]
        self.state: dict[Parameter, dict[str, Any]] = {p: {} for group in groups for p in group}

    def step(self) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1


def slots(adam: CountingByGroup) -> dict[Parameter, Slot]:
    return {p: Slot(adam, p) for group in adam.param_groups for p in group["params"]}


def test_the_first_group_may_be_empty_here() -> None:
    adam = CountingByGroup([], [Parameter(torch.ones(2))])
    for _ in range(3):
        adam.step()
    with backend.running(backend.Layout()):
        assert _steps(slots(adam)) == 3
        assert _steps({}) == 0


def test_torchs_adam_counts_by_parameter() -> None:
    weights = [Parameter(torch.ones(2)) for _ in range(2)]
    adam = torch.optim.AdamW([{"params": [weights[0]]}, {"params": [weights[1]]}])
    for weight in weights:
        weight.grad = torch.ones(2)
    with backend.running(backend.Layout()):
        assert _steps({weight: Slot(adam, weight) for weight in weights}) == 0
        adam.step()
        adam.step()
        assert _steps({weight: Slot(adam, weight) for weight in weights}) == 2


def test_a_loaded_count_is_every_groups() -> None:
    weight = Parameter(torch.ones(2))
    adam = CountingByGroup([], [weight])
    _fill(Slot(adam, weight), {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}, 7)
    adam.step()
    assert adam.param_groups[1]["step"] == 8


def count_on_two() -> None:
    """Run by each of two processes: the first, which writes what is the same for all, has none of the parameters."""
    dist.init_process_group("gloo")
    adam = CountingByGroup([Parameter(torch.ones(2))] if dist.get_rank() else [])
    for _ in range(5):
        adam.step()
    assert _steps(slots(adam)) == 5, (dist.get_rank(), _steps(slots(adam)))
    dist.destroy_process_group()


def test_a_rank_without_parameters_knows_the_count(tmp_path: Path) -> None:
    program = tmp_path / "count.py"
    program.write_text("from tests.unit.training.test_state import count_on_two\ncount_on_two()\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [*launcher, str(program)], env=environment() | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
