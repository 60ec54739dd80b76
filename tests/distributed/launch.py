"""Start verbs as a user does, on one process or on several through torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT_S = 600
SECONDS_A_VERB = 60
"""Of a launch of many; a machine that is busy with other things takes ten times as long as one that is not."""
MOST_PROCESSES = 4
"""Of any layout below."""


@dataclass(frozen=True)
class Layout:
    """A layout of the test matrix, as flags."""

    name: str
    processes: int
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    context: int = 1
    virtual: int | None = None
    expert: int = 1
    expert_tensor: int | None = None

    def flags(self) -> list[str]:
        """Command-line flags of the layout."""
        flags = ["--tensor-model-parallel-size", str(self.tensor), "--pipeline-model-parallel-size", str(self.pipeline)]
        flags += ["--context-parallel-size", str(self.context)]
        flags += ["--virtual-pipeline-model-parallel-size", str(self.virtual)] if self.virtual else []
        flags += ["--expert-model-parallel-size", str(self.expert)] if self.expert > 1 else []
        flags += ["--expert-tensor-parallel-size", str(self.expert_tensor)] if self.expert_tensor else []
        return flags + (["--sequence-parallel"] if self.sequence_parallel else [])


def folder_name(method: str, target: str, options: Sequence[str]) -> str:
    """Of the run of a method, a target and flags of the method."""
    return "_".join([method, target.translate(str.maketrans(":,=%", "----")), *(each.strip("-") for each in options)])


ONE = Layout("one", 1)
TP2 = Layout("tp2", 2, tensor=2)
TP2_SP = Layout("tp2sp", 2, tensor=2, sequence_parallel=True)
TP3 = Layout("tp3", 3, tensor=3)
PP2 = Layout("pp2", 2, pipeline=2)
DP2 = Layout("dp2", 2)
TP2_PP2_SP = Layout("tp2pp2sp", 4, tensor=2, pipeline=2, sequence_parallel=True)
EP2 = Layout("ep2", 2, expert=2)
EP2_TP2_SP = Layout("ep2tp2sp", 2, tensor=2, sequence_parallel=True, expert=2, expert_tensor=1)
EP2_ETP2_SP = Layout("ep2etp2sp", 4, tensor=2, sequence_parallel=True, expert=2)
TP2_SP_ETP1 = Layout("tp2spetp1", 2, tensor=2, sequence_parallel=True, expert_tensor=1)
ETP2 = Layout("etp2", 2, expert_tensor=2)
EP2_PP2 = Layout("ep2pp2", 4, pipeline=2, expert=2)
EP4 = Layout("ep4", 4, expert=4)
PP2_VPP2_CP2 = Layout("pp2vpp2cp2", 4, pipeline=2, context=2, virtual=2)


def with_nightly(values: Iterable[Any], usual: Callable[[Any], bool]) -> list[Any]:
    """Parameters of a test, each a tuple where it has several; those that are not usual are marked `nightly`."""
    found = []
    for value in values:
        several = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*several, marks=() if usual(value) else pytest.mark.nightly))
    return found


def picked(request: pytest.FixtureRequest, values: Iterable[Any], usual: Callable[[Any], bool]) -> list[Any]:
    """What a fixture makes of these: all with --nightly, else the usual ones."""
    return [value for value in values if request.config.getoption("--nightly") or usual(value)]


def environment(gpus: int | None = None) -> dict[str, str]:
    """What a started process finds: one thread, and the CPU where `gpus` (those there are) do not do for every layout.

    All layouts then run on the same kind of device: they are compared with each other.
    """
    there = torch.cuda.device_count() if gpus is None else gpus
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    return one | {"MEGATRON_PRUNE_DEVICE": "cpu"} if there < MOST_PROCESSES else one


def launch(
    processes: int, commands: Sequence[Sequence[str]], folder: Path, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the verbs on `processes` processes, one start-up for all of them; stdout and stderr are captured.

    `timeout`: seconds for all of it; None: as many as so many verbs may take.
    """
    timeout = timeout or max(TIMEOUT_S, SECONDS_A_VERB * len(commands))
    folder.mkdir(parents=True, exist_ok=True)
    task = folder / f"commands-{processes}-{len(list(folder.iterdir()))}.json"
    task.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*torchrun, str(WORKER), str(task)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        check=False,
    )


def must_pass(result: subprocess.CompletedProcess[str]) -> None:
    """Fail the test with the run's own output when it failed."""
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
