"""Gradients that are reduced while the backward pass goes on: the same bits, and really begun before it is over."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import TIMEOUT_S, environment, must_pass
from tests.models import tiny_llama

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).with_name("overlapped.py")
TRAINING = dict(seq_length=32, global_batch_size=8, train_iters=10, lr=1e-3)


@dataclass(frozen=True)
class Case:
    """What is trained in which layout."""

    name: str
    kind: str
    processes: int = 2
    layout: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
CASES = [
    Case("masks", "masks"),
    Case("masks_recomputed", "masks", training={"recompute": True}),
    Case("masks_and_weights", "masks_and_weights"),
    Case("masks_shared_optimizer", "masks", training={"use_distributed_optimizer": True}),
    Case("one_draw", "one_draw"),
    Case("one_draw_recomputed", "one_draw", training={"recompute": True}),
    Case("weights", "weights"),
    Case("lora", "lora"),
    Case("masks_interleaved", "masks", 4, INTERLEAVED),
    Case("one_draw_interleaved", "one_draw", 4, INTERLEAVED),
    Case("masks_split", "masks", 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case run."""
    root = tmp_path_factory.mktemp("overlap")
    tiny_llama(root / "hf", hidden_size=32, intermediate_size=64, num_hidden_layers=4, vocab_size=64)
    fields = ("kind", "processes", "layout")
    cases = [
        {name: getattr(case, name) for name in fields}
        | {"model": str(root / "hf"), "training": TRAINING | case.training}
        for case in CASES
    ]
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(WORKER), str(root)]
    must_pass(
        subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(0), check=False)
    )
    return root


def results(root: Path, case: Case) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Without and with early reductions, of each process."""
    place = [other for other in CASES if other.processes == case.processes].index(case)
    return [json.loads((root / f"{case.processes}_{rank}.json").read_text())[place] for rank in range(case.processes)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_early_reductions_change_no_bit(root: Path, case: Case) -> None:
    for late, early in results(root, case):
        assert early["losses"] == late["losses"]
        assert early["parameters"] == late["parameters"]
        # A norm adds up shares of the gradients, which end elsewhere where there are several buckets.
        shared = case.training.get("use_distributed_optimizer")
        assert early["norms"] == (pytest.approx(late["norms"], rel=1e-6) if shared else late["norms"])
        assert len(set(late["losses"])) == len(late["losses"]), "it learns"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reductions_begin_during_the_backward_pass(root: Path, case: Case) -> None:
    for rank, (late, early) in enumerate(results(root, case)):
        assert late["early"] == 0 and late["begun"] >= 1
        assert early["early"] == early["begun"], f"process {rank}: once each, and none waited for the end"
        first_stage = rank < case.processes // case.layout.get("pipeline_model_parallel_size", 1)
        assert early["begun"] > (2 if first_stage else 0), "several buckets"
