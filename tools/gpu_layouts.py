"""The checks of several GPUs, every layout against data parallelism alone (`torchrun ... gpu_check.py --layouts`).

All processes run the same verbs. On eight processes a layout is the one that is named; on fewer, as on a CPU, it is the
largest of its kind that there are processes for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch.distributed as dist

from .acceptance import Check, Found, Place, Sizes, furthest, losses, within
from .kill_test import masks, other_bits

LARGE = Sizes(2048, 16, 32, 8, 8192)
SMALL = Sizes(64, 4, 8, 8, 128, "float32")
"""On GPUs and on a CPU; eight processes of a tensor-parallel layout can share either."""
EXPERTS = {True: Sizes(1024, 8, 16, 8, 512, experts=16), False: Sizes(32, 2, 4, 2, 16, "float32", experts=8)}
"""The same with experts."""
STEPS = 6


def tolerance(place: Place) -> float:
    """Largest relative difference of a loss: bfloat16 on a GPU, where sums over ranks are rounded in another order."""
    return 1e-2 if place.on_gpu else 1e-5


def tensor(size: int) -> dict[str, object]:
    """Flags of tensor and sequence parallelism."""
    return {"tensor_model_parallel_size": size, "sequence_parallel": True}


def mixed(world: int) -> dict[str, object]:
    """Tensor, pipeline and context parallelism of two each, as far as there are processes."""
    found: dict[str, object] = {"pipeline_model_parallel_size": 2}
    found |= tensor(2) if world >= 4 else {}
    return found | ({"context_parallel_size": 2} if world >= 8 else {})


def learn(place: Place, name: str, layout: dict[str, object], model: Path | None = None, **more: object) -> Path:
    """Masks of the large model, or another one, learned for STEPS steps in a layout."""
    run = place.path(name)
    if name not in place.made or "resume" in more:
        given = place.learning(STEPS, save_interval=3, **more)
        given |= {"global_batch_size": dist.get_world_size(), "distributed_timeout_minutes": 3}
        place.verb(
            "prune", input=model or place.large_hf, output=run, method="maskllm", target="2:4", **given, **layout
        )
    place.made.add(name)
    return run


def stop(place: Place, name: str, layout: dict[str, object]) -> Path:
    """The same, stopped after its first step."""
    run = learn(place, name, layout, time_limit=1e-9)
    if len(losses(run)) != 1:
        raise RuntimeError("the run was to stop after its first step")
    return run


def compared(place: Place, run: Path, alone: Path | None = None) -> Found:
    """A run against the one of data parallelism alone."""
    alone = alone or learn(place, "data_parallel", {})
    found = {"loss": furthest(losses(run), losses(alone)), "mask bits": other_bits(masks(run), masks(alone))}
    return within(found, {"loss": tolerance(place), "mask bits": tolerance(place)})


def tensor_parallel(place: Place) -> Found:
    """All processes share each layer, with sequence parallelism."""
    return compared(place, learn(place, "tensor", tensor(dist.get_world_size())))


def mixed_parallel(place: Place) -> Found:
    """Tensor, pipeline and context parallelism at once."""
    return compared(place, learn(place, "mixed", mixed(dist.get_world_size())))


def expert_parallel(place: Place) -> Found:
    """Experts spread over all processes, which are replicas for the rest of the model."""
    model = place.model("experts_hf", EXPERTS[place.on_gpu])
    layouts = {"experts_alone": {}, "experts_spread": {"expert_model_parallel_size": dist.get_world_size()}}
    alone, run = (learn(place, name, given, model, mask_draw="step") for name, given in layouts.items())
    return compared(place, run, alone)


def moved(place: Place) -> Found:
    """A run stopped with all processes sharing each layer goes on with half of them."""
    world = dist.get_world_size()
    stop(place, "moved", tensor(world))
    half = tensor(world // 2) if world > 2 else {}
    return compared(place, learn(place, "moved", half, resume=True))


def distributed_optimizer(place: Place) -> Found:
    """Optimizer state shared by all replicas, stopped and resumed."""
    more: dict[str, object] = {"use_distributed_optimizer": True}
    stop(place, "distributed", more)
    return compared(place, learn(place, "distributed", more, resume=True))


def fsdp(place: Place) -> Found:
    """Every parameter sharded over all processes, against the other engine's replicas."""
    given: dict[str, Any] = place.learning(3, lr=1e-4, input=place.large_hf, distributed_timeout_minutes=3)
    given |= {"global_batch_size": dist.get_world_size()}
    runs = {engine: place.path(f"{engine}_engine") for engine in ("megatron", "fsdp")}
    for engine, run in runs.items():
        place.verb("train", **given, output=run, engine=engine)
    return within({"loss": furthest(losses(runs["fsdp"]), losses(runs["megatron"]))}, {"loss": tolerance(place)})


def connect() -> None:
    """Join the processes of torchrun; SystemExit where there are none."""
    from datetime import timedelta

    if backend.launch() is None:
        raise SystemExit("gpu_check: --layouts is run by torchrun --nproc-per-node 8 (or 4, or 2)")
    backend.connect(timedelta(minutes=3))
    if dist.get_world_size() not in (2, 4, 8):
        raise SystemExit(f"gpu_check: --layouts takes 2, 4 or 8 processes and {dist.get_world_size()} were started")


CHECKS = [
    Check("tensor_parallel", tensor_parallel),
    Check("mixed_parallel", mixed_parallel),
    Check("expert_parallel", expert_parallel),
    Check("moved", moved),
    Check("distributed_optimizer", distributed_optimizer),
    Check("fsdp", fsdp),
]
