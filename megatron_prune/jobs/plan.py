"""Memory of each process of a mask-learning run, predicted from sizes alone; nothing is loaded.

Weights, mask logits, gradients and optimizer state are counted tensor by tensor and exact. With the distributed
optimizer the data-parallel and context-parallel processes share the state of what they train: each has an equal part of
megatron-core's gradient buffers, which are padded, every tensor to 64 elements and a buffer to a multiple of 128 and of
the number of processes. Which of them has less because padding is in its part is not said.

Activations are what autograd keeps of one micro-batch between forward and backward, counted operation by operation as
in Korthikanti et al. 2022 (arXiv:2205.05198, section 4), whose figures are for another layer (GELU, dropout, stored
attention scores). For a gated layer without Transformer Engine, in elements of e bytes, with b windows of s tokens, of
which each of c context-parallel processes has n = s / c, h hidden, f ffn, q and k channels of all query heads and
groups, t tensor-parallel processes, and h' = h / t with sequence parallelism, else h:

    norms                 2 x n b h' x 4 bytes       the input in float32; 4 with norms after attention and MLP
    inputs of qkv, fc1    2 x n b h' x e
    attention, c = 1      s b (3 q + 3 k) / t x e    the fused qkv, rotated q and k, the output
    attention, c > 1      n b (2 q + 2 c k) / t x e  rotated q and the output, k and v of all processes
    latent attention      n b H (5 d + v) / t x e    H heads, queries, keys and values as wide as the widest, d, output
                          + n b' (r + l) x (4 + e)   what queries (r), keys and values (l) are made from, and its norms
    attention's mask      n s x e                    with c > 1, sinks or a sliding window below s
    MLP                   5 x n b f / t x e          gate and up (2 f), activation, up + 0, their product; 7 with limits
    masked weights        prunable weights / t x e   mask * weight, one copy for each micro-batch

Experts are taken to get equally many tokens, T = n b k' e' / t of a micro-batch on each process, k' experts a token and
e' processes that share an expert; who gets more takes more. A layer of E experts keeps, in place of the MLP's rows:

    tokens and outputs    2 x T h x e              what enters the experts, and what they give before their gates
    experts               5 x T f / e' x e
    router                n b / t x (9 E + 24 k')  logits, gates, who goes where
    shared experts        as an MLP, and their output with a gate

With `--mask-draw step` there is one copy of the masked weights for a whole step, with recomputation too, and from the
first backward pass on a float32 sum of their gradients. Both are counted at each pass of the schedule.

A linear all of which stays dense (2:4,dense=down_proj) has no logits and no masked weight, and its input is not kept
where it does not train (among experts it counts as if it were), nor is anything below the first linear of the first
stage that learns. One of which a part stays dense (values among queries and keys) has logits of all its rows, and so
have all experts of a layer of which one is masked.
Where tiles learn to stay dense (2:4@0.75), every process has the logits of all tiles of the model, their moments and
their gradients, in float64; with `--hard` the masked weight is kept beside the one that has dense tiles.

A teacher adds its weights, unless it is the model itself with its masks left out, and its logits beside the student's,
each in its own type, with four float32 numbers a token; the next-token loss a float32 tensor of the logits' size, with
a teacher or without. A loss of hidden states keeps the outputs of both models' layers in
float32. In a pipeline what a teacher has said of all micro-batches of a step waits for the student: the outputs of its
layers, and on the last stage those of its final norm.

Before its first backward pass, stage p of P runs P - p - 1 micro-batches forward, and with v interleaved chunks on each
stage 2 (P - p - 1) + (v - 1) P passes of one chunk, or all that the step has; then one forward and one backward in turn
(Narayanan et al. 2021, arXiv:2104.04473, section 2.2). What is held at once is counted along that schedule. Not
counted: temporaries inside an operation, buffers of communication, the allocator's gaps and what CUDA itself takes;
keep a tenth of the GPU free for them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_prune.config import PruneConfig
from megatron_prune.decision.run_folder import is_run, weights_of
from megatron_prune.decision.target import NM, parse_target
from megatron_prune.decision.tiles import Grid
from megatron_prune.errors import UserError
from megatron_prune.foreign import read_json
from megatron_prune.methods.base import DATA, check_learnable, get_method
from megatron_prune.methods.fit import check_shards, check_target
from megatron_prune.model.blocks import Block
from megatron_prune.model.description import is_checkpoint, read_description
from megatron_prune.model.families import family_of, get_family
from megatron_prune.model.family import WeightMap, masked
from megatron_prune.model.given import wrong
from megatron_prune.model.length import fitting
from megatron_prune.model.sizes import ModelConfig, channels_with_sink, dimensions, rotary_channels
from megatron_prune.option_groups import Parallelism, Training
from megatron_prune.training.weighting import Weighting, check_way, teaches_itself

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of an element of a model; one in float16 is imported as bfloat16."""
FLOAT32 = 4
GIB = 2**30


PROJ, FC2 = "self_attention.linear_proj", "mlp.linear_fc2"
"""The last linears of a layer's halves."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one process of a pipeline stage."""

    weights: int
    mask_logits: int
    gradients: int
    """float32, of everything that is trained."""
    optimizer: int
    """Adam's two moments in float32, and float32 masters of trained weights in another type; shared, with padding."""
    masked_weights: int
    masked_gradients: int
    """float32 sums of a step's micro-batches, where masks are drawn once for all of them."""
    activations: int
    loss: int
    """Probabilities over the vocabulary and the final norm, on the last stage."""
    teacher: int
    """Weights of a second model to learn from, and in a pipeline what waits for the student of what a teacher said."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def read_config(path: Path) -> ModelConfig:
    """The sizes of a Megatron checkpoint or of a Hugging Face directory, of which config.json is enough."""
    if is_checkpoint(path):
        return read_description(path).config
    if not (path / "config.json").exists():
        raise wrong(path, "model")
    found = read_json(path / "config.json", "a model")
    return family_of(found).from_hf(found)


@dataclass(frozen=True)
class Lesson:
    """What is learned from a teacher."""

    model: ModelConfig | None
    """The teacher, in the type that it has while it teaches; None: the model itself, with its masks left out."""
    weighting: Weighting


@dataclass(frozen=True)
class Job:
    """What is trained, how, and on how many processes."""

    model: ModelConfig
    layout: Parallelism
    training: Training
    target: NM
    replicas: int
    """Of the model: data-parallel processes."""
    train_weights: bool = False
    narrow_logits: bool = False
    """They are bfloat16, with float32 masters."""
    one_draw: bool = False
    """Masks are drawn once for all micro-batches of a step."""
    train_norms: bool = False
    """Beside the weights."""
    lesson: Lesson | None = None
    hard: bool = False
    """Masks, and tiles that may stay dense, are sampled whole."""

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return DTYPE_BYTES[self.model.dtype]

    @property
    def tensor(self) -> int:
        """Tensor-parallel processes."""
        return self.layout.tensor_model_parallel_size

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.layout.pipeline_model_parallel_size

    @property
    def chunks(self) -> int:
        """Pieces of the stack of layers on each stage."""
        return self.layout.virtual_pipeline_model_parallel_size or 1

    @property
    def layers(self) -> int:
        """Layers of a chunk."""
        return self.model.num_layers // (self.stages * self.chunks)

    @property
    def sharers(self) -> int:
        """Processes that share optimizer state: data-parallel and context-parallel ones, or none."""
        together = self.replicas * self.layout.context_parallel_size
        return together if self.training.use_distributed_optimizer else 1

    @property
    def own_replicas(self) -> bool:
        """Whether experts have other replicas than the rest of the model."""
        return self.layout.expert_model_parallel_size > 1 or self.expert_tensor != self.tensor

    @property
    def expert_sharers(self) -> int:
        """As `sharers`, of the optimizer state of experts."""
        if not self.own_replicas or not self.training.use_distributed_optimizer:
            return self.sharers
        processes = self.replicas * self.layout.context_parallel_size * self.tensor
        return processes // (self.expert_tensor * self.layout.expert_model_parallel_size)

    @property
    def expert_tensor(self) -> int:
        """Processes that share an expert."""
        return self.layout.expert_tensor_parallel_size or self.tensor

    @property
    def experts(self) -> int:
        """Of a layer, on one process."""
        return (self.model.num_moe_experts or 0) // self.layout.expert_model_parallel_size

    @cached_property
    def masked(self) -> frozenset[tuple[Any, ...]]:
        """Linears that have mask logits, as `WeightMap.alike` names them."""
        return masked(get_family(self.model.family).weights(self.model), self.target.leaves)

    @cached_property
    def learning(self) -> dict[int | None, frozenset[str]]:
        """Linears of each decoder layer that learn a mask or train, such as `mlp.linear_fc2`."""
        found: dict[int | None, set[str]] = {}
        for map in get_family(self.model.family).weights(self.model):
            if map.prunable and (self.train_weights or map.alike in self.masked):
                found.setdefault(map.layer, set()).add(map.megatron.split(".", 3)[-1].removesuffix(".weight"))
        return {layer: frozenset(names) for layer, names in found.items()}

    def local_size(self, map: WeightMap) -> int:
        """Elements of a weight on one of the processes that have a part of it; vocabulary rows are padded."""
        parts = self.tensor if map.expert is None else self.expert_tensor
        rows, *rest = map.shape
        rows = -(-rows // parts) * parts if map.pad_rows else rows
        size = math.prod((rows, *rest))
        return size if map.shard_dim is None else size // parts

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one process, outside the sequence-parallel parts."""
        return self.training.seq_length * self.training.micro_batch_size // self.layout.context_parallel_size

    @property
    def hidden(self) -> int:
        """Elements of the residual stream of a micro-batch on one process."""
        return self.tokens * self.model.hidden_size // (self.tensor if self.layout.sequence_parallel else 1)


def asked_pattern(config: PruneConfig) -> NM:
    """The pattern of options that learn masks; UserError for others."""
    method, target = get_method(config.method, **config.method_options), parse_target(config.target)
    if not isinstance(target, NM):
        raise UserError(f"--target {target} was given; plan knows learned masks, allowed: N:M such as 2:4")
    check_learnable(target)
    target.check_named()
    if DATA not in method.needs:
        raise UserError(f"--method {method.name} was given; plan knows learned masks, allowed: maskllm")
    return target


def job_of(config: PruneConfig, processes: int) -> Job:
    """What `prune` with these options would be on that many processes; UserError when it learns no masks."""
    target = asked_pattern(config)
    model = read_config(config.input)
    check_way(config.losses, config.training, config.parallelism)
    return Job(
        model,
        config.parallelism,
        fitting(config.training, model),
        target,
        config.parallelism.data_parallel_size(processes),
        bool(config.method_options.get("train_weights")),
        config.method_options.get("logits_dtype") == "bfloat16",
        config.method_options.get("mask_draw") == "step",
        bool(config.method_options.get("train_norms")),
        _lesson(config, model),
        bool(config.method_options.get("hard")),
    )


def _lesson(config: PruneConfig, model: ModelConfig) -> Lesson | None:
    losses = config.losses
    if losses.teacher is None:
        return None
    weighting = Weighting.of(losses)
    if teaches_itself(losses, config.input, model.dtype, not config.method_options.get("train_weights")):
        return Lesson(None, weighting)
    teacher = read_config(weights_of(losses.teacher) if is_run(losses.teacher) else losses.teacher)
    return Lesson(replace(teacher, dtype=losses.teacher_dtype or teacher.dtype), weighting)


def plan(job: Job) -> list[Memory]:
    """Memory of a process of each pipeline stage, first stage first."""
    _check(job)
    return [_stage(job, stage) for stage in range(job.stages)]


def _check(job: Job) -> None:
    model, layout = job.model, job.layout
    _check_experts(job)
    if layout.virtual_pipeline_model_parallel_size and job.stages == 1:
        raise UserError(
            "--virtual-pipeline-model-parallel-size was given; it needs --pipeline-model-parallel-size above 1"
        )
    halves = 2 * layout.context_parallel_size if layout.context_parallel_size > 1 else 1
    blocks = dict.fromkeys(model.block(layer) for layer in range(model.num_layers))
    for what, size, parts in (
        *(("query groups", block.num_query_groups, job.tensor) for block in blocks),
        *(
            ("ffn channels", block.ffn_hidden_size, job.expert_tensor if block.num_moe_experts else job.tensor)
            for block in blocks
        ),
        ("layers", model.num_layers, job.stages * job.chunks),
        ("tokens of a window", job.training.seq_length, halves * (job.tensor if layout.sequence_parallel else 1)),
        ("micro-batches", job.training.num_microbatches(job.replicas), job.stages if job.chunks > 1 else 1),
    ):
        if size % parts:
            raise UserError(f"{size} {what} were given; this layout needs a multiple of {parts}")
    model.check_length(job.training.seq_length)
    check_target(model, job.target)
    check_shards(model, job.target, job.tensor, job.layout.expert_tensor_parallel_size)


def _check_experts(job: Job) -> None:
    experts, shares = job.model.num_moe_experts or 0, job.layout.expert_model_parallel_size
    if not experts and (shares > 1 or job.layout.expert_tensor_parallel_size is not None):
        raise UserError(
            f"a {job.model.family} model has no experts: drop --expert-model-parallel-size and "
            "--expert-tensor-parallel-size"
        )
    if not experts:
        return
    job.model.check_expert_parts(job.expert_tensor)
    processes = job.replicas * job.layout.context_parallel_size * job.tensor
    for what, size, parts in (
        ("experts", experts, shares),
        ("processes of a pipeline stage", processes, shares * job.expert_tensor),
    ):
        if size % parts:
            raise UserError(f"{size} {what} were given; this layout needs a multiple of {parts}")
    if job.tensor > 1 and not job.layout.sequence_parallel:
        raise UserError("--tensor-model-parallel-size was given with a model that has experts: add --sequence-parallel")
    if shares * job.expert_tensor > job.tensor and not job.one_draw:
        raise UserError(
            f"--expert-model-parallel-size {shares} was given: an expert sees several micro-batches at a time; add "
            "--mask-draw step"
        )


def _stage(job: Job, stage: int) -> Memory:
    maps = _maps_of(job, stage)
    parts = [([map for map in maps if map.expert is None], job.sharers)]
    parts.append(([map for map in maps if map.expert is not None], job.expert_sharers))
    if not job.own_replicas:
        parts = [(maps, job.sharers)]
    state = Counter[str]()
    for some, sharers in parts:
        state.update(_state(job, some, sharers))
    state.update(_tiles(job))
    kept = _kept(job, stage, _layers(job, stage, maps))
    return Memory(weights=_weights(job, maps), teacher=_teacher(job, stage), **state, **kept)


def _weights(job: Job, maps: list[WeightMap]) -> int:
    return sum(job.local_size(map) * (FLOAT32 if map.always_float32 else job.element) for map in maps)


def _teacher(job: Job, stage: int) -> int:
    """Bytes of a second model, and of what waits of a step in a pipeline."""
    lesson = job.lesson
    if lesson is None:
        return 0
    theirs = replace(job, model=lesson.model or job.model)
    weights = _weights(theirs, _maps_of(theirs, stage)) if lesson.model else 0
    if job.stages == 1:
        return weights
    outputs = bool(lesson.weighting.distillation) and stage == job.stages - 1
    layers = job.layers if lesson.weighting.hidden else 0
    waiting = job.training.num_microbatches(job.replicas) * (outputs + layers)
    return weights + waiting * theirs.hidden * theirs.element


def _state(job: Job, maps: list[WeightMap], sharers: int) -> dict[str, int]:
    """Bytes of what is learned, of weights that have the same replicas."""
    prunable = _prunable(job, maps)
    learned = _prunable(job, [map for map in maps if map.alike in job.masked])
    logits = [[size // job.target.m * math.comb(job.target.m, job.target.n) for size in sizes] for sizes in learned]
    none: list[list[int]] = [[] for _ in prunable]
    weights = _add(prunable, _norms(job, maps) if job.train_norms else none) if job.train_weights else none
    masters = FLOAT32 if job.element != FLOAT32 else 0
    buffers = _buffers(job, logits, weights, sharers)
    masters *= _buffers(job, logits if job.narrow_logits else none, weights, sharers) // sharers
    return {
        "mask_logits": sum(map(sum, logits)) * (2 if job.narrow_logits else FLOAT32),
        "gradients": buffers * FLOAT32,
        "optimizer": buffers // sharers * 2 * FLOAT32 + masters,
    }


def _tiles(job: Job) -> dict[str, int]:
    """Bytes of what is learned of tiles: each matrix has room for as many as the one that has most."""
    if job.target.share == 1:
        return {}
    maps = get_family(job.model.family).weights(job.model)
    grids = [Grid.of(shape, job.target) for map in maps if map.prunable for shape in map.row_shapes]
    tiles = len(grids) * max(grid.down * grid.across for grid in grids)
    return {"mask_logits": tiles * FLOAT32, "gradients": tiles * 2 * FLOAT32, "optimizer": tiles * 2 * FLOAT32}


def _maps_of(job: Job, stage: int) -> list[WeightMap]:
    """The weights of a stage; a tied output layer is a second copy of the embedding when they are apart."""
    last = job.stages - 1
    found = []
    for map in get_family(job.model.family).weights(job.model):
        if map.layer is not None:
            where = map.layer // job.layers % job.stages
        else:
            where = 0 if map.megatron.startswith("embedding") else last
        copied = job.model.tie_word_embeddings and map.megatron == "embedding.word_embeddings.weight"
        elsewhere = map.expert is not None and map.expert >= job.experts
        if not elsewhere and (where == stage or (copied and stage == last)):
            found.append(map)
    return found


def _prunable(job: Job, maps: list[WeightMap]) -> list[list[int]]:
    """Elements of each prunable weight of a stage on one process, chunk by chunk."""
    sizes: list[list[int]] = [[] for _ in range(job.chunks)]
    for map in maps:
        if map.prunable and map.layer is not None:
            sizes[map.layer // job.layers // job.stages].append(job.local_size(map))
    return sizes


def _norms(job: Job, maps: list[WeightMap]) -> list[list[int]]:
    """Elements of each parameter of a stage's norms, chunk by chunk; the final norm is the last one's."""
    sizes: list[list[int]] = [[] for _ in range(job.chunks)]
    for map in maps:
        if "layernorm" in map.megatron:
            chunk = job.chunks - 1 if map.layer is None else map.layer // job.layers // job.stages
            sizes[chunk].append(job.local_size(map))
    return sizes


def _add(some: list[list[int]], more: list[list[int]]) -> list[list[int]]:
    """The sizes of both, chunk by chunk."""
    return [a + b for a, b in zip(some, more, strict=True)]


def _buffers(job: Job, logits: list[list[int]], weights: list[list[int]], sharers: int) -> int:
    """Elements of megatron-core's gradient buffers: one for each chunk and type of parameter."""
    together = job.narrow_logits or job.element == FLOAT32
    buffers = _add(logits, weights) if together else [*logits, *weights]
    return sum(_buffer(job, sizes, sharers) for sizes in buffers)


def _buffer(job: Job, sizes: list[int], sharers: int) -> int:
    """Elements of one such buffer, with the padding that lets it be shared."""
    if not job.training.use_distributed_optimizer:
        return sum(sizes)
    return _up(sum(_up(size, 64) for size in sizes), math.lcm(sharers, 128))


def _up(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def held(stage: int, stages: int, chunks: int, microbatches: int) -> list[tuple[int, ...]]:
    """Micro-batches that each chunk of a pipeline stage holds after each of its passes in a step."""
    groups = range(0, microbatches, stages)
    order = [
        chunk for first in groups for chunk in range(chunks) for _ in range(first, min(first + stages, microbatches))
    ]
    ahead = stages - stage - 1
    warmup = ahead if chunks == 1 else 2 * ahead + (chunks - 1) * stages
    counts, found = [0] * chunks, []
    backward = [chunks - 1 - chunk for chunk in order]
    for number in range(len(order) + warmup + 1):
        if warmup < number <= warmup + len(order):
            counts[backward[number - warmup - 1]] -= 1
            found.append(tuple(counts))
        if number < len(order):
            counts[order[number]] += 1
            found.append(tuple(counts))
    return found


def _layers(job: Job, stage: int, maps: list[WeightMap]) -> list[list[tuple[int, int]]]:
    """Of each layer of each chunk of a stage: bytes kept of one micro-batch, and bytes of the masked weights."""
    one = 2 if job.hard and job.target.share != 1 and not job.one_draw else 1
    masked: Counter[int] = Counter()
    for map in maps:
        if map.layer is not None and map.alike in job.masked:
            # Of a linear with rows that stay dense there is a copy without them, too.
            copies = one + (not job.one_draw and any(job.target.leaves(name) for name in map.hf))
            masked[map.layer] += job.local_size(map) * job.element * copies
    starts = range(stage * job.layers, job.model.num_layers, job.stages * job.layers)
    return [[(_layer(job, number), masked[number]) for number in range(i, i + job.layers)] for i in starts]


def _kept(job: Job, stage: int, layers: list[list[tuple[int, int]]]) -> dict[str, int]:
    """What autograd keeps when it is most; `layers` as from `_layers`."""
    # After four rounds of all stages the same moments come again.
    microbatches = min(job.training.num_microbatches(job.replicas), 4 * job.stages)
    moments = held(stage, job.stages, job.chunks, microbatches)
    states = (
        _at(job, stage, layers, moment) | _of_a_step(job, layers, moments[: n + 1]) for n, moment in enumerate(moments)
    )
    return max(states, key=lambda found: sum(found.values()))


def _of_a_step(job: Job, layers: list[list[tuple[int, int]]], moments: list[tuple[int, ...]]) -> dict[str, int]:
    """Masked weights of a step's one draw and the sum of their gradients, after the last of these `moments`."""
    if not job.one_draw:
        return {"masked_gradients": 0}
    masked = [sum(masked for _kept, masked in chunk) for chunk in layers]
    run = [any(counts[chunk] for counts in moments) for chunk in range(job.chunks)]
    turned = [
        any(after[chunk] < before[chunk] for before, after in itertools.pairwise(moments))
        for chunk in range(job.chunks)
    ]
    return {
        "masked_weights": sum(size for size, yes in zip(masked, run, strict=True) if yes),
        "masked_gradients": sum(size for size, yes in zip(masked, turned, strict=True) if yes) // job.element * FLOAT32,
    }


def _at(job: Job, stage: int, layers: list[list[tuple[int, int]]], counts: tuple[int, ...]) -> dict[str, int]:
    """What is kept while each chunk of a stage holds `counts` micro-batches."""
    loss = _loss(job) * counts[-1] if stage == job.stages - 1 else 0
    if job.training.recompute:
        width = job.hidden * job.element
        inputs = sum(counts) * job.layers * width
        # By the time that a layer is recomputed the inputs of those above it are gone, and so is the loss.
        moments = [
            (kept - width * above, masked) for chunk in layers for above, (kept, masked) in enumerate(chunk[::-1])
        ]
        layer, masked = max(moments, key=sum)
        return {"masked_weights": masked, "activations": inputs + layer, "loss": max(0, loss - layer - masked)}
    pairs = [
        (count * kept, count * masked) for count, chunk in zip(counts, layers, strict=True) for kept, masked in chunk
    ]
    activations, weights = (sum(values) for values in zip(*pairs, strict=True))
    return {"masked_weights": weights, "activations": activations, "loss": loss}


def _norm(job: Job) -> int:
    """Bytes kept of one micro-batch by a norm: its input, and for a gain that trains what it multiplies."""
    multiplied = FLOAT32 if job.model.norm_rounds_last else job.element
    gain = job.train_norms and not job.model.centred_norm
    return _norm_input(job) + (job.hidden * multiplied if gain else 0)


def _norm_input(job: Job) -> int:
    return job.hidden * (job.element if job.model.centred_norm else FLOAT32)


def _layer(job: Job, layer: int) -> int:
    """Bytes kept of one micro-batch by a decoder layer: by what asks for a gradient, and as inputs of what learns."""
    model, block, learns = job.model, job.model.block(layer), job.learning.get(layer, frozenset())
    heads = job.tokens * block.num_attention_heads * model.kv_channels // job.tensor
    wide = job.tokens * block.ffn_hidden_size // job.tensor
    if block.num_moe_experts:
        mlp, own = _experts(job, block), 0
    else:
        mlp, own = _mlp_tensors(model) * wide * job.element, wide * job.element
    # Of each half: its last linear, that one's input, what is kept inside, and what of that for the last weight alone.
    halves = [(PROJ, heads, _attention(job, layer), 0), (FC2, wide, mlp, own)]
    kept = 2 * job.hidden * FLOAT32 if job.lesson and job.lesson.weighting.hidden else 0
    # What is embedded asks for none; what comes from another stage or chunk does.
    asks = layer >= job.layers or any(job.learning.get(below) for below in range(layer))
    for last, width, inside, own in halves:
        if not width:
            continue
        first = any(name.split(".")[0] == last.split(".")[0] for name in learns - {last})
        kept += _norm(job) - (0 if asks else _norm_input(job)) + (job.hidden * job.element if first else 0)
        asks |= first
        if asks:
            kept += inside - (0 if last in learns else own)
        elif last in learns:
            kept += width * job.element
        asks |= last in learns
        kept += _norm(job) if model.post_layernorm and asks else 0
    return kept


def _experts(job: Job, block: Block) -> int:
    """Bytes kept of one micro-batch by a layer's experts and its router, where tokens spread evenly."""
    model, each = job.model, job.tokens // job.tensor
    sent = each * (model.moe_router_topk or 1) * job.expert_tensor
    inner = _mlp_tensors(model) * block.ffn_hidden_size // job.expert_tensor
    kept = sent * (2 * model.hidden_size + inner) * job.element
    kept += each * (9 * block.num_moe_experts + 24 * (model.moe_router_topk or 1))
    if model.shared_width:
        kept += _mlp_tensors(model) * job.tokens * model.shared_width // job.tensor * job.element
        kept += job.hidden * job.element if model.moe_shared_expert_gate else 0
    return kept


def _attention(job: Job, layer: int) -> int:
    model, size, context = job.model, dimensions(job.model, layer), job.layout.context_parallel_size
    heads = model.block(layer).num_attention_heads
    if not heads:
        return 0
    if model.kv_lora_rank is not None:
        return _latent_attention(job, layer)
    length = job.training.seq_length
    query, key_value = (job.tokens * size[name] // job.tensor for name in ("query", "key_value"))
    kept = 3 * (query + key_value) if context == 1 else 2 * (query + key_value * context)
    if model.attention_sinks:  # queries, keys, values and output wider by a sink's channels, and the output without
        kept = 2 * (query + key_value * context) * channels_with_sink(size["head"]) // size["head"] + query
    if model.position_embedding == "rope":
        kept += 4 * length // context * rotary_channels(model)
    if context > 1 or model.attention_sinks or (model.window(layer) or length) < length:
        kept += length // context * length
    wide = job.tokens * heads // job.tensor  # of the softmax, for each query
    if model.qk_layernorm:
        wide += query + key_value
    return kept * job.element + wide * FLOAT32


def _latent_attention(job: Job, layer: int) -> int:
    """As `_attention`: queries, keys and values of one width, the output and its first channels, and what they are made
    from before and after its norm.
    """
    model, size, context = job.model, dimensions(job.model, layer), job.layout.context_parallel_size
    heads, length = model.block(layer).num_attention_heads // job.tensor, job.training.seq_length
    widest = max(model.query_channels, model.kv_channels)
    padded = model.query_channels > model.kv_channels
    value = widest if padded else size["up_head"]
    kept = job.tokens * heads * (2 * widest + (widest + value) * context + (model.kv_channels if padded else 0))
    kept += 2 * length // context * model.rotated_keys
    each = job.tokens // (job.tensor if job.layout.sequence_parallel else 1)
    kept += each * (size["query_rank"] + size["latent"])
    narrow = size["latent_rope"] if job.element == FLOAT32 else size["latent"]
    if context > 1:
        kept += length // context * length
    return kept * job.element + (job.tokens * heads + each * (size["query_rank"] + narrow)) * FLOAT32


def _mlp_tensors(model: ModelConfig) -> int:
    """Tensors as wide as the MLP that are kept: see the module's docstring; without a gate two, of which the squared
    ReLU keeps what the ReLU gave, others their input, and fc2 the output.
    """
    if model.gated:
        return 5 if model.activation_func_clamp_value is None else 7
    return 2


def _loss(job: Job) -> int:
    """Bytes kept of one micro-batch by the final norm and the losses of the logits."""
    weighting = job.lesson.weighting if job.lesson else Weighting()
    words = -(-job.model.vocab_size // job.tensor)
    each = words * FLOAT32 if weighting.lm or not weighting.distillation else 0
    if job.lesson and weighting.distillation:
        theirs = replace(job, model=job.lesson.model or job.model)
        each += words * (job.element + theirs.element) + 4 * FLOAT32
    return _norm(job) + job.tokens * each


def told(job: Job, stages: list[Memory]) -> list[str]:
    """The memory of each stage's processes as a table."""
    model, interleaved = job.model, f" of {job.chunks} interleaved chunks" if job.chunks > 1 else ""
    dtype = "float16, imported as bfloat16" if model.dtype == "float16" else model.dtype
    shares, each = job.layout.expert_model_parallel_size, job.layout.expert_tensor_parallel_size
    experts = f" x experts {shares}{f', each over {each},' if each else ''}" if model.num_moe_experts else ""
    head = (
        f"{model.family}, {model.num_layers} layers of {model.hidden_size}, {dtype}; tensor {job.tensor} x "
        f"pipeline {job.stages}{interleaved} x context {job.layout.context_parallel_size} x {job.replicas} replicas"
        f"{experts}{', distributed optimizer' if job.training.use_distributed_optimizer else ''}. "
        "GiB on each process, without what CUDA itself takes:"
    )
    lines = [head, "  " + "".join([f"{'stage':<16}"] + [f"{number:>9}" for number in range(len(stages))])]
    for name in [field.name for field in fields(Memory)] + ["total"]:
        values = "".join(f"{getattr(stage, name) / GIB:>9.2f}" for stage in stages)
        lines.append(f"  {name.replace('_', ' '):<16}{values}")
    return lines
