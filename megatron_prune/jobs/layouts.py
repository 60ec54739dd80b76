"""Layouts of a mask-learning run that fit on given GPUs, the fastest first by a simple model of time.

Seconds of an optimizer step; only their order means something, for the rates are assumed (`RATES`, about an H100's) and
nothing overlaps. With n tokens of a micro-batch, h hidden, e bytes, t tensor-parallel processes, P stages, v chunks and
m micro-batches of each of d replicas:

    products    FLOPs of the step / (GPUs x products), a third more with recomputation, times the pipeline's bubble
                1 + (P - 1) / (m v)                           (Narayanan et al. 2021, arXiv:2104.04473, section 2.2)
    masks       m x (8 + 24 logits) bytes a prunable weight on the GPU / memory; logits a weight: C(M, N) / M. Read or
                written: float32 logits and two bytes each of weight and masked weight; back, the gradient, the weight,
                the logits, and their gradient, which is added to a step's
    tensor      m x layers / P x 4 all-reduces of n h e bytes, 6 with recomputation (Shoeybi et al. 2019,
                arXiv:1909.08053, section 3), each 2 (t - 1) / t of them over a link of the node, or the network
    pipeline    m x v x 2 sends of n h e bytes over the network, where P > 1
    experts     m x layers with experts / P x 4 exchanges, 6 with recomputation, of n h e k' / t bytes, k' experts a
                token, which E processes share: (E - 1) / E of them over a link of the node where t E processes fit
                there, else the network
    replicas    2 (d - 1) / d of the logits' float32 gradients over the network, once; of experts those of d / E
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_prune.config import PruneConfig
from megatron_prune.errors import UserError
from megatron_prune.jobs.plan import GIB, Job, Memory, asked_pattern, job_of, plan, read_config
from megatron_prune.methods.fit import check_target
from megatron_prune.model.families import get_family
from megatron_prune.model.length import fitting
from megatron_prune.options import entries, flag, given
from megatron_prune.training.throughput import flops_per_token

RATES = {"products": 4e14, "memory": 2e12, "link": 3e11, "network": 4e10}
"""FLOP/s of matrix products, and bytes/s of the GPU's memory, between the GPUs of a node, and between nodes."""
FREE = 0.1
"""Share of a GPU that stays free for what `plan` does not count."""
SHOWN = 8
PORT = 29500


@dataclass(frozen=True)
class Layout:
    """A layout that fits, what it takes and about how long."""

    config: PruneConfig
    """As asked, in this layout."""
    job: Job
    stages: list[Memory]
    seconds: dict[str, float]
    """Of a step, by what takes them."""

    @property
    def bytes(self) -> int:
        """Of the fullest process."""
        return max(stage.total for stage in self.stages)

    @property
    def step(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())


def layouts(config: PruneConfig, gpus: int, gpu_memory: float, node: int) -> list[Layout]:
    """Those that fit, fastest first; what was given of the layout beside tensor, pipeline and data parallel stays.

    `gpu_memory`: GB of a GPU; `node`: GPUs of a machine. UserError, with the smallest, where none fits.
    """
    config = replace(config, training=fitting(config.training, read_config(config.input)))  # said once, not of each
    found = list(_possible(config, gpus, node))
    if not found:
        raise UserError(
            f"no layout of {gpus} GPUs divides this model and batch; give another number of GPUs, or a "
            "--global-batch-size that it divides"
        )
    room = gpu_memory * 1e9 * (1 - FREE)
    these = sorted((each for each in found if each.bytes <= room), key=lambda each: (each.step, each.bytes))
    if not these:
        least = min(found, key=lambda each: each.bytes)
        raise UserError(
            f"--gpu-memory {gpu_memory:g}: no layout of {gpus} GPUs fits; the smallest, {_name(least)}, takes "
            f"{least.bytes / GIB:.1f} GiB and a tenth stays free: give more GPUs, or shorter windows"
        )
    return these


def _possible(config: PruneConfig, gpus: int, node: int) -> Iterator[Layout]:
    asked, training = config.parallelism, config.training
    model = read_config(config.input)
    check_target(model, asked_pattern(config))  # what no layout would change is refused at once
    experts = model.num_moe_experts
    free = experts is not None and asked.expert_model_parallel_size == 1
    shares = _divisors(math.gcd(experts, gpus)) if free and experts else [asked.expert_model_parallel_size]
    for tensor in _divisors(math.gcd(gpus, node)):
        for pipeline in _divisors(gpus // tensor):
            for recompute, expert in itertools.product(sorted({True, training.recompute}), shares):
                changes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
                changes |= {"expert_model_parallel_size": expert}
                try:
                    layout = replace(asked, **changes, sequence_parallel=tensor > 1)
                    replicas = layout.data_parallel_size(gpus)
                    trained = replace(training, recompute=recompute, use_distributed_optimizer=replicas > 1)
                    chosen = replace(config, parallelism=layout, training=trained)
                    job = job_of(chosen, gpus)
                    yield Layout(chosen, job, plan(job), seconds(job, node))
                except UserError:  # it does not divide the model, its experts or the batch
                    continue


def _divisors(count: int) -> list[int]:
    return [number for number in range(1, count + 1) if count % number == 0]


def seconds(job: Job, node: int) -> dict[str, float]:
    """Of a step, by what takes them; `node`: GPUs of a machine."""
    model, training = job.model, job.training
    microbatches = training.num_microbatches(job.replicas)
    gpus = job.replicas * job.tensor * job.stages * job.layout.context_parallel_size
    flops = training.global_batch_size * training.seq_length * flops_per_token(model, training.seq_length)
    bubble = 1 + (job.stages - 1) / (microbatches * job.chunks)
    again = 4 / 3 if training.recompute else 1
    weights = _prunable(job)
    logits = math.comb(job.target.m, job.target.n) / job.target.m
    draws = 1 if job.one_draw else microbatches
    stream = job.tokens * model.hidden_size * job.element
    reduced = 2 * (job.tensor - 1) / job.tensor * stream * model.num_layers / job.stages
    within = RATES["link" if job.tensor <= node else "network"]
    of_experts, share = _prunable(job, True), job.layout.expert_model_parallel_size
    copies = job.replicas // share
    summed = (job.replicas - 1) / job.replicas * (weights - of_experts) + (copies - 1) / max(1, copies) * of_experts
    exchanged = (share - 1) / share * stream * (model.moe_router_topk or 0) / job.tensor
    exchanged *= sum(map(model.has_experts, range(model.num_layers))) / job.stages
    near = RATES["link" if job.tensor * share <= node else "network"]
    again_or_not = 6 if training.recompute else 4
    return {
        "products": flops / (gpus * RATES["products"]) * again * bubble,
        "masks": draws * weights * (8 + 24 * logits) / RATES["memory"],
        "tensor": microbatches * reduced * again_or_not / within,
        "pipeline": microbatches * job.chunks * 2 * stream / RATES["network"] if job.stages > 1 else 0.0,
        "experts": microbatches * exchanged * again_or_not / near,
        "replicas": 2 * summed * logits * 4 / RATES["network"],
    }


def _prunable(job: Job, of_experts: bool = False) -> int:
    """Weights on a process of the first stage that get a mask, of all stages about as many; or those of its experts."""
    maps = [map for map in get_family(job.model.family).weights(job.model) if map.alike in job.masked]
    own = [map for map in maps if (not of_experts if map.expert is None else map.expert < job.experts)]
    return sum(map(job.local_size, own)) // job.stages


def _name(layout: Layout) -> str:
    job = layout.job
    again = ", recompute" if job.training.recompute else ""
    experts = f" x experts {job.layout.expert_model_parallel_size}" if job.model.num_moe_experts else ""
    return f"tensor {job.tensor} x pipeline {job.stages}{experts} x {job.replicas} replicas{again}"


def record(layout: Layout) -> dict[str, Any]:
    """A layout as JSON."""
    job = layout.job
    sizes = {"tensor": job.tensor, "pipeline": job.stages, "replicas": job.replicas}
    sizes |= {"experts": job.layout.expert_model_parallel_size} if job.model.num_moe_experts else {}
    return {**sizes, "recompute": job.training.recompute, "bytes": layout.bytes, "estimated_seconds": layout.seconds}


def told(found: list[Layout], gpus: int, node: int) -> list[str]:
    """The layouts as a table, and how the first is started."""
    fastest = found[0].step
    lines = [f"{len(found)} layouts fit; time of a step by a model, not measured, the fastest, {fastest:.3g} s, as 1:"]
    mixture = found[0].job.model.num_moe_experts is not None
    titles = f"{'tensor':>6} {'pipeline':>8}" + (f" {'experts':>8}" if mixture else "")
    lines.append(f"  {titles} {'replicas':>8} {'recompute':>9} {'GiB':>7} {'time':>6}")
    for each in found[:SHOWN]:
        job = each.job
        again = "yes" if job.training.recompute else "no"
        shares = f" {job.layout.expert_model_parallel_size:>8}" if mixture else ""
        sizes = f"{job.tensor:>6} {job.stages:>8}{shares} {job.replicas:>8} {again:>9}"
        lines.append(f"  {sizes} {each.bytes / GIB:>7.1f} {each.step / fastest:>6.2f}")
    return [*lines, "the first of them:", f"  {command(found[0].config, gpus, node)}"]


def command(config: PruneConfig, gpus: int, node: int) -> str:
    """What starts `prune` with these options on so many GPUs; of several machines, on each of them."""
    here = min(gpus, node)
    machines = f"--nnodes {gpus // here} --rdzv-backend c10d --rdzv-endpoint NODE0:{PORT} " if gpus > here else ""
    known = {entry.key for entry in entries(PruneConfig)}
    needed = {entry.key: str(getattr(config, entry.key)) for entry in entries(PruneConfig) if entry.required}
    needed = {key: value for key, value in needed.items() if key != "output"} | given(config)
    words = [word for key, value in needed.items() if key in known for word in _words(key, value)]
    for key, value in (("--data", "TEXT"), ("--output", "RUN")):
        words += [] if key in words else [key, value]
    return f"torchrun {machines}--nproc-per-node {here} -m megatron_prune prune {shlex.join(words)}"


def _words(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for name, part in value.items() for word in _words(name, part)]
    if isinstance(value, bool):
        return [flag(key) if value else f"--no-{flag(key)[2:]}"]
    if isinstance(value, list | tuple):
        return [flag(key), *map(str, value)]
    return [] if value is None else [flag(key), str(value)]
