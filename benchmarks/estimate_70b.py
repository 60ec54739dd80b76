"""What LLaMA-2 70B on 64 GPUs would take: an estimate on paper, nothing of it measured.

    python benchmarks/estimate_70b.py

Memory is what `plan` predicts. Time is counted FLOPs over an assumed share of the GPUs' peak, plus bytes over an
assumed share of their bandwidth; every assumption is in `ASSUMED` and goes into the result file. Nothing overlaps with
anything else, and communication of mask learning is part of the assumed utilisation.
"""

from __future__ import annotations

import math
from typing import Any

from bench.results import arguments, write_result

if __name__ == "__main__":
    GIVEN = arguments(__doc__)

from bench.models import llama

from megatron_prune.decision.target import NM
from megatron_prune.jobs.plan import GIB, Job, plan
from megatron_prune.model.families import family_of, get_family
from megatron_prune.model.sizes import ModelConfig
from megatron_prune.option_groups import Parallelism, Training
from megatron_prune.training.throughput import PEAK_TFLOPS, TERA, flops_per_token

LLAMA2_70B = llama(8192, 28672, 80, 64, 8)
GPUS, TENSOR, BATCH, LENGTH, STEPS = 64, 8, 256, 4096, 2000
"""GPUs, tensor-parallel size, and the paper's windows a step, tokens a window and steps."""
CALIBRATION = 128 * 4096
"""Tokens for a one-shot method."""
ASSUMED = {
    "peak_tflops": PEAK_TFLOPS[r"H100|H200|GH200"],
    "bandwidth_tb_s": 3.35,
    "share_of_bandwidth": 0.6,
    "mfu": 0.4,
    "mfu_low": 0.067,
    "one_shot_mfu": 0.3,
    "fp64_tflops": 67.0,
    "fp64_share": 0.3,
    "network_gb_s": 40.0,
}
"""mfu: of dense training with Megatron, without the pipeline's bubble, which is added. mfu_low: what 1,280 A100 hours,
said of the paper's 7B run, come to. network: into each GPU, from other nodes."""
MASK_BYTES = 44
"""Read or written for each weight, 2:4, in a micro-batch. Forward: float32 logits 6, weight 2, masked weight 2.
Backward: the gradient of the masked weight 2, weight 2, logits 6, their gradient 6, which is added to a step's: 18."""
COLUMNS = ["layout", "recompute", "GiB a GPU", "s a step", "s a step, low", "hours", "hours, low"]


def prunable(model: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of the matrices that get a mask."""
    return [map.shape for map in get_family(model.family).weights(model) if map.prunable]


def job(model: ModelConfig, stages: int, recompute: bool) -> Job:
    """Mask learning of all prunable weights in one layout."""
    layout = Parallelism(tensor_model_parallel_size=TENSOR, pipeline_model_parallel_size=stages, sequence_parallel=True)
    sizes: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": BATCH, "seq_length": LENGTH}
    training = Training(**sizes, use_distributed_optimizer=True, recompute=recompute)
    return Job(model, layout, training, NM(2, 4), GPUS // TENSOR // stages)


def step_seconds(work: Job, mfu: float) -> float:
    """Matrix products, with the pipeline's bubble and recomputation, and the bytes of the mask kernels."""
    microbatches = BATCH // work.replicas
    flops = BATCH * LENGTH * flops_per_token(work.model, LENGTH) * (4 / 3 if work.training.recompute else 1)
    products = flops / (GPUS * ASSUMED["peak_tflops"] * TERA * mfu) * (1 + (work.stages - 1) / microbatches)
    here = sum(map(math.prod, prunable(work.model))) / (TENSOR * work.stages)
    rate = ASSUMED["bandwidth_tb_s"] * TERA * ASSUMED["share_of_bandwidth"]
    return products + microbatches * here * MASK_BYTES / rate


def sparsegpt_seconds(model: ModelConfig) -> dict[str, float]:
    """Of every part of one-shot SparseGPT: each GPU runs whole layers on its share of the windows, solves its share of
    the rows, and makes every factor of a Hessian itself.
    """
    matrices = prunable(model)
    widths = [shape[1] for shape in matrices]
    weights = sum(map(math.prod, matrices))
    products = TERA * ASSUMED["peak_tflops"] * ASSUMED["one_shot_mfu"]
    solver = TERA * ASSUMED["fp64_tflops"] * ASSUMED["fp64_share"]
    sent = 2 * weights + 2 * 8 * sum(width**2 for width in widths)
    return {
        "two forward passes": 2 * CALIBRATION / GPUS * 2 * weights / products,
        "Hessians": CALIBRATION / GPUS * sum(width**2 for width in widths) / products,
        "factors, float64": 4 / 3 * sum(width**3 for width in widths) / solver,
        "solving the rows": sum(rows * width**2 for rows, width in matrices) / GPUS / solver,
        "weights and Hessians over the network": sent / (1e9 * ASSUMED["network_gb_s"]),
    }


def row(work: Job) -> list[Any]:
    """Layout, the largest process's memory, and times."""
    memory = max(stage.total for stage in plan(work)) / GIB
    times = [step_seconds(work, ASSUMED[key]) for key in ("mfu", "mfu_low")]
    name = f"tensor {TENSOR} x pipeline {work.stages} x {work.replicas} replicas"
    recompute = "yes" if work.training.recompute else "no"
    return [name, recompute, memory, *times, *(STEPS * each / 3600 for each in times)]


def protocol(one_shot: dict[str, float]) -> str:
    """What was assumed, and what is not in the table."""
    a, parts = ASSUMED, ", ".join(f"{name} {seconds:.0f} s" for name, seconds in one_shot.items())
    return (
        f"ON PAPER, nothing measured. LLaMA-2 70B, {GPUS} GPUs of 80 GB; masks learned in {STEPS} steps of "
        f"{BATCH} x {LENGTH} tokens, distributed optimizer, sequence parallel; memory from `plan`. Assumed: "
        f"{a['peak_tflops']:.0f} TFLOP/s peak at {a['mfu']:.0%} utilisation (low: {a['mfu_low']:.1%}, what the paper's "
        f"hours for 7B come to) plus the pipeline's bubble; masks: {MASK_BYTES} bytes a weight and micro-batch at "
        f"{a['share_of_bandwidth']:.0%} of {a['bandwidth_tb_s']} TB/s; recomputation a third more. "
        f"One-shot SparseGPT, {CALIBRATION} tokens: {sum(one_shot.values()) / 60:.0f} minutes ({parts}), at "
        f"{a['one_shot_mfu']:.0%} of peak, float64 {a['fp64_share']:.0%} of {a['fp64_tflops']:.0f} TFLOP/s, "
        f"{a['network_gb_s']:.0f} GB/s into each GPU."
    )


if __name__ == "__main__":
    model = family_of(LLAMA2_70B).from_hf(LLAMA2_70B)
    rows = [row(job(model, stages, recompute)) for stages in (8, 4, 2) for recompute in (False, True)]
    one_shot = sparsegpt_seconds(model)
    about: dict[str, Any] = {"one_shot_seconds": one_shot, "assumed": ASSUMED, "device": "No hardware was used"}
    write_result("estimate_70b", GIVEN, COLUMNS, rows, protocol(one_shot), **about)
