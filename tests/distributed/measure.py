"""Sizes of the real objects of mask-learning runs: `measure.py CASES.json FOLDER` -> FOLDER/PROCESSES_RANK.json.

A case is a model directory, a number of processes, fields of `Parallelism` and of `Training`, whether weights and norms
are trained, whether masks are drawn once a step, and what is learned from which teacher. Each runs one step, and these
bytes are written down: parameters, mask logits, gradient buffers and their padding, optimizer state, a teacher's
parameters and what it has said of a step, and the largest sum of what autograd and masks of a step kept at one time,
each storage counted once and parameters not at all. The processes are
forked from this one, which has imported everything: that costs most here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import parse_target
from megatron_prune.model.layout import layout_of
from megatron_prune.model.masked_linear import MaskDraw, MaskedLinear, StepWeight
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Parallelism, Training
from megatron_prune.training.loop import RECOMPUTE, Trainer
from megatron_prune.training.recovery import RecoveryLoss
from megatron_prune.training.weighting import Weighting


class Words:
    """Random tokens; the same on every rank."""

    def __init__(self, length: int) -> None:
        self.length = length

    def sample(self, index: int) -> Tensor:
        """`[length + 1]` token ids."""
        return torch.randint(0, 64, (self.length + 1,), generator=torch.Generator().manual_seed(index))


class Kept:
    """The most bytes that autograd keeps at one time."""

    def __init__(self, model: torch.nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.model = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.linears = [module for module in model.modules() if isinstance(module, MaskedLinear)]
        self.users: dict[int, int] = {}
        self.now = self.peak = 0
        add = StepWeight._add

        def added(shared: StepWeight, weight: Tensor) -> None:
            add(shared, weight)
            self.look()

        StepWeight._add = added  # type: ignore[method-assign]

    def look(self) -> None:
        """Note what is kept now: by autograd, and of masks that are drawn once a step."""
        shared = [linear.shared for linear in self.linears if linear.shared is not None]
        tensors = [tensor for each in shared for tensor in (each.weight, each.gradient) if tensor is not None]
        self.peak = max(self.peak, self.now + sum(tensor.nbytes for tensor in tensors))

    def pack(self, tensor: Tensor) -> Any:
        """Called by autograd for each tensor it keeps."""
        storage = tensor.untyped_storage()
        shared = (linear.shared.weight for linear in self.linears if linear.shared is not None)
        if storage.data_ptr() in self.model or any(storage.data_ptr() == one.data_ptr() for one in shared):
            return tensor
        return _Hold(self, tensor, storage.data_ptr(), storage.nbytes())

    @staticmethod
    def unpack(held: Any) -> Tensor:
        """Called by autograd when it needs the tensor."""
        return held.tensor if isinstance(held, _Hold) else held


class _Hold:
    def __init__(self, kept: Kept, tensor: Tensor, key: int, size: int) -> None:
        self.kept, self.tensor, self.key, self.size = kept, tensor, key, size
        kept.users[key] = kept.users.get(key, 0) + 1
        if kept.users[key] == 1:
            kept.now += size
            kept.look()

    def __del__(self) -> None:
        self.kept.users[self.key] -= 1
        if self.kept.users[self.key] == 0:
            self.kept.now -= self.size


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Bytes of one case on this rank."""
    layout, training = layout_of(Parallelism(**case["layout"])), Training(**case["training"])
    with backend.running(layout, 0):
        extra = RECOMPUTE if training.recompute else {}
        model = open_model(Path(case["model"])).load(layout, **extra)
        chunks = torch.nn.ModuleList(model.chunks)
        chunks.requires_grad_(False)
        draw = MaskDraw(2, 4, seed=0, logits_dtype=getattr(torch, case["logits"]), per_step=case["one_draw"])
        model.learn_masks(draw, parse_target(case["target"]).leaves)
        for linear in model.linears():
            linear.module.weight.requires_grad_(case["train_weights"])
        for name, parameter in chunks.named_parameters():
            if case["train_norms"] and "layernorm" in name:
                parameter.requires_grad_()
        objective, teacher = None, model
        if case["weighting"]:
            if case["teacher"]:
                teacher = open_model(Path(case["teacher"])).load(layout)
            count = training.num_microbatches(layout.data)
            objective = Waiting(model, Weighting(**case["weighting"]), teacher, count, draw)
        trainer = Trainer(model, training, Words(training.seq_length), objective=objective)
        kept = Kept(chunks)
        if teacher is not model:
            kept.model |= {tensor.untyped_storage().data_ptr() for tensor in teacher.chunks[0].parameters()}
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            trainer.step(0)
        named = dict(chunks.named_parameters())
        logits = sum(p.nbytes for name, p in named.items() if name.endswith("mask_logits"))
        buffers = [buffer for chunk in trainer.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        biases = [buffer.nbytes for name, buffer in chunks.named_buffers() if name.endswith("router.expert_bias")]
        return {
            "weights": sum(p.nbytes for p in named.values()) - logits + sum(biases),
            "mask_logits": logits,
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "padding": 4 * sum(buffer.numel - sum(p.numel() for p in buffer.params) for buffer in buffers),
            "optimizer": _optimizer_bytes(trainer.optimizer),
            "teacher": _teacher_bytes(objective, teacher, model),
            "kept": kept.peak,
        }


class Waiting(RecoveryLoss):
    """Counts what a teacher has said of a step when the student begins it."""

    most = 0

    def begin(self, batches: Iterator[Tensor], count: int) -> None:
        """As the base class."""
        super().begin(batches, count)
        assert self.teacher is not None
        queues = [self.teacher.final, *self.teacher.outputs.values()]
        self.most = sum(tensor.nbytes for queue in queues for tensor in queue)


def _teacher_bytes(objective: Waiting | None, teacher: PrunableModel, model: PrunableModel) -> int:
    """Of a second model, and of what waited."""
    parameters = teacher.chunks[0].parameters() if teacher is not model else ()
    return sum(parameter.nbytes for parameter in parameters) + (objective.most if objective else 0)


def _optimizer_bytes(optimizer: Any) -> int:
    """Moments and float32 masters, without the step counters that torch keeps for each tensor."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        states = part.optimizer.state.values()
        total += sum(t.nbytes for state in states for name, t in state.items() if name != "step")
        for name in ("fp32_from_float16_groups", "shard_fp32_from_float16_groups"):
            total += sum(t.nbytes for group in getattr(part, name, []) for t in group)
    return total


def run(rank: int, processes: int, cases: list[dict[str, Any]], folder: Path) -> None:
    """Measure all cases of a number of processes as one of them."""
    store = dist.FileStore(str(folder / f"{processes}.store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    results = [measure(case) for case in cases]
    (folder / f"{processes}_{rank}.json").write_text(json.dumps(results))
    backend.shutdown()


def main(cases: list[dict[str, Any]], folder: Path) -> None:
    """Measure every case, those of one number of processes one after another in the same processes."""
    for processes in sorted({case["processes"] for case in cases}):
        mine = [case for case in cases if case["processes"] == processes]
        arguments = (processes, mine, folder)
        multiprocessing.start_processes(run, arguments, nprocs=processes, start_method="fork")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
