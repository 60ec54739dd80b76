"""What `plan` predicts, against the sizes of the real objects: exact for state, within a bound for activations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.config import Parallelism, Training
from megatron_prune.methods.target import NM
from megatron_prune.plan import Memory, plan, read_config
from tests.distributed.launch import TIMEOUT_S, must_pass
from tests.models import tiny_llama

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 0.03
"""Of activations, masked weights and loss together; measured: index tensors and the norms' inverse roots, below 1%."""
MEASURE = Path(__file__).with_name("measure.py")
TRAINING = dict(seq_length=64, micro_batch_size=2, global_batch_size=8, train_iters=2)


@dataclass(frozen=True)
class Case:
    """A run whose memory is predicted."""

    name: str
    model: str = "float32"
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    train_weights: bool = False

    @property
    def processes(self) -> int:
        """Processes it runs on."""
        return self.tensor * self.pipeline

    def layout(self) -> Parallelism:
        """As `plan` takes it."""
        return Parallelism(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            sequence_parallel=self.sequence_parallel,
        )

    def training(self) -> dict[str, Any]:
        """Fields of `Training`."""
        return {**TRAINING, "recompute": self.recompute}


CASES = [
    Case("one"),
    Case("bf16", "bfloat16"),
    Case("bf16_weights", "bfloat16", train_weights=True),
    Case("recomputed", "bfloat16", recompute=True),
    Case("tp2_pp2", "tied", tensor=2, pipeline=2),
    Case("tp2_pp2_sp", "tied", tensor=2, pipeline=2, sequence_parallel=True),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and the measured cases as PROCESSES/RANK.json."""
    root = tmp_path_factory.mktemp("plan")
    shape = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=4, vocab_size=201)
    tiny_llama(root / "float32", **shape)
    tiny_llama(root / "bfloat16", dtype=torch.bfloat16, **shape)
    tiny_llama(root / "tied", tie_word_embeddings=True, **shape)
    for processes in (1, 4):
        folder = root / str(processes)
        folder.mkdir()
        cases = [
            {**vars(case), "model": str(root / case.model), "training": case.training()} for case in _of(processes)
        ]
        (folder / "cases.json").write_text(json.dumps(cases))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        must_pass(
            subprocess.run(
                [*torchrun, str(MEASURE), str(folder / "cases.json"), str(folder)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    return root


def _of(processes: int) -> list[Case]:
    return [case for case in CASES if case.processes == processes]


def measured(root: Path, case: Case, rank: int) -> dict[str, int]:
    """What was measured on one process."""
    folder = root / str(case.processes)
    found: dict[str, int] = json.loads((folder / f"{rank}.json").read_text())[_of(case.processes).index(case)]
    return found


def predicted(root: Path, case: Case) -> list[Memory]:
    """What `plan` says, by stage."""
    model = read_config(root / case.model)
    return plan(model, case.layout(), Training(**case.training()), NM(2, 4), 1, case.train_weights)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_state_is_exact(root: Path, case: Case) -> None:
    stages = predicted(root, case)
    for rank in range(case.processes):
        found, said = measured(root, case, rank), stages[rank // case.tensor]
        for name in ("weights", "mask_logits", "gradients", "optimizer"):
            assert getattr(said, name) == found[name], f"{name} on process {rank}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_activations_are_within_the_bound(root: Path, case: Case) -> None:
    stages = predicted(root, case)
    for rank in range(case.processes):
        said = stages[rank // case.tensor]
        total = said.masked_weights + said.activations + said.loss
        assert total == pytest.approx(measured(root, case, rank)["kept"], rel=TOLERANCE), f"process {rank}"


def test_the_verb_prints_and_writes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((root / "bfloat16" / "config.json").read_text())
    recipe = tmp_path / "learn.yaml"
    recipe.write_text("method: maskllm\ntarget: 2:4\nscale_start: 100\nseq_length: 64\nglobal_batch_size: 8\n")
    output = tmp_path / "plan.json"
    command = ["plan", "--config", str(recipe), "--input", str(tmp_path), "--processes", "2", "--output", str(output)]
    assert main([*command, "--pipeline-model-parallel-size", "2"]) == 0
    assert len(json.loads(output.read_text())["stages"]) == 2
    assert "total" in capsys.readouterr().out
    assert main([*command, "--pipeline-model-parallel-size", "3"]) == 2
    assert "multiple of 3" in capsys.readouterr().err
    assert main([*command, "--target", "0.5"]) == 2
    assert "allowed: N:M" in capsys.readouterr().err
