"""Trains with and without early reduction of gradients: `overlapped.py FOLDER` -> FOLDER/PROCESSES_RANK.json.

FOLDER/cases.json is a list of cases. Of each run these are written down: losses, gradient norms, a checksum of all
parameters, and of the last step how many reductions were begun before the backward pass was over, of how many.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_prune.decision.source import open_model
from megatron_prune.model.layout import layout_of
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Parallelism, Training
from megatron_prune.training import loop
from megatron_prune.training.lora import Adapters, add_adapters
from tests.distributed.measure import Words

STEPS = 4
BUCKET = 2000
"""Parameters: a few buckets in a model of some ten thousand."""


class Reductions:
    """Counts reductions of buckets that are begun, and those of them that are begun before `Trainer._finish`."""

    def __init__(self) -> None:
        self.begun = self.early = 0
        self.in_backward = True
        start, finish = _ParamAndGradBucketGroup.start_grad_sync, loop.Trainer._finish

        def started(group: Any, *args: Any, **kwargs: Any) -> None:
            free = group.grad_reduce_handle is None
            start(group, *args, **kwargs)
            self.begun += free
            self.early += free and self.in_backward

        def finished(trainer: loop.Trainer, *chunks: Any, **more: Any) -> None:
            self.in_backward = False
            finish(trainer, *chunks, **more)
            self.in_backward = True

        _ParamAndGradBucketGroup.start_grad_sync = started
        loop.Trainer._finish = finished  # type: ignore[method-assign]


def train(model: PrunableModel, training: Training, kind: str, counted: Reductions) -> dict[str, Any]:
    """Four steps; `kind`: masks, masks_and_weights, one_draw (masks that are drawn once a step), weights, lora."""
    draw = MaskDraw(2, 4, seed=1, regularization=1e-6, recompute=training.recompute, per_step=kind == "one_draw")
    if kind == "lora":
        add_adapters(model, Adapters(16, 16.0, 0.0, 0, keep_zeros=True), ("linear_qkv", "linear_fc2"))
    elif kind != "weights":
        for chunk in model.chunks:
            chunk.requires_grad_(False)
        model.learn_masks(draw)
        for linear in model.linears():
            linear.module.weight.requires_grad_(kind == "masks_and_weights")

    def on_microbatch(step: int, number: int) -> None:
        draw.step, draw.microbatch = step, number

    trainer = loop.Trainer(model, training, Words(training.seq_length), on_microbatch=on_microbatch)
    results = []
    for step in range(STEPS):
        counted.begun = counted.early = 0
        results.append(trainer.step(step))
    parameters = hashlib.sha256()
    for chunk in model.chunks:
        for _name, parameter in sorted(chunk.named_parameters()):
            parameters.update(parameter.detach().float().numpy().tobytes())
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "parameters": parameters.hexdigest(),
        "begun": counted.begun,
        "early": counted.early,
    }


def both(case: dict[str, Any], counted: Reductions) -> list[dict[str, Any]]:
    """A case without and with early reductions."""
    found = []
    for early in (False, True):
        layout = layout_of(Parallelism(**case["layout"]))
        training = Training(**case["training"], overlap_grad_reduce=early)
        with backend.running(layout, 0):
            extra = loop.RECOMPUTE if training.recompute else {}
            model = open_model(Path(case["model"])).load(layout, **extra)
            found.append(train(model, training, case["kind"], counted))
    return found


def run(rank: int, processes: int, cases: list[dict[str, Any]], folder: Path) -> None:
    """All cases of a number of processes, as one of them."""
    store = dist.FileStore(str(folder / f"{processes}.store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    loop.DistributedDataParallelConfig = partial(loop.DistributedDataParallelConfig, bucket_size=BUCKET)
    counted = Reductions()
    results = [both(case, counted) for case in cases]
    (folder / f"{processes}_{rank}.json").write_text(json.dumps(results))
    backend.shutdown()


def main(folder: Path) -> None:
    """The cases in `folder`, those of one number of processes one after another in the same processes."""
    cases = json.loads((folder / "cases.json").read_text())
    for processes in sorted({case["processes"] for case in cases}):
        mine = [case for case in cases if case["processes"] == processes]
        multiprocessing.start_processes(run, (processes, mine, folder), nprocs=processes, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
