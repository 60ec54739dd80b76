"""The `plan` verb: memory of each process of a mask-learning run, predicted from sizes alone; nothing is loaded.

Weights, mask logits, gradients and optimizer state are counted tensor by tensor and exact. Activations are what
autograd keeps of one micro-batch between forward and backward, counted operation by operation as in Korthikanti et al.
2022 (arXiv:2205.05198, section 4), whose figures are for another layer (GELU, dropout, stored attention scores). For a
gated layer without Transformer Engine, in elements of e bytes, with s tokens, b windows, h hidden, f ffn, q and k
channels of all query heads and groups, t tensor-parallel processes, and h' = h / t with sequence parallelism, else h:

    norms                 2 x s b h' x 4 bytes       the input in float32
    inputs of qkv, fc1    2 x s b h' x e
    attention             s b (3 q + 3 k) / t x e    the fused qkv, rotated q and k, the output
    MLP                   5 x s b f / t x e          gate and up (2 f), activation, up + 0, their product
    masked weights        prunable weights / t x e   mask * weight, one copy for each micro-batch

Stage p of P pipeline stages holds min(P - p, micro-batches) micro-batches at once (1F1B; Narayanan et al. 2021,
arXiv:2104.04473). Not counted: temporaries inside an operation, buffers of communication, the allocator's gaps and what
CUDA itself takes; keep a tenth of the GPU free for them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_prune.config import Parallelism, PlanConfig, Training
from megatron_prune.errors import UserError
from megatron_prune.files import read_json, write_json
from megatron_prune.log import say
from megatron_prune.methods.target import NM, parse_target
from megatron_prune.model.families import family_of, get_family
from megatron_prune.model.family import ModelConfig, WeightMap, dimensions, rotary_channels

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32 = 4
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one process of a pipeline stage."""

    weights: int
    mask_logits: int
    gradients: int
    """float32, of everything that is trained."""
    optimizer: int
    """Adam's two moments in float32, and float32 masters of trained weights in another type."""
    masked_weights: int
    activations: int
    loss: int
    """Probabilities over the vocabulary and the final norm, on the last stage."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def run(config: PlanConfig) -> None:
    """Print the memory of each pipeline stage's processes; the largest is what a GPU needs."""
    target = parse_target(config.target)
    if not isinstance(target, NM):
        raise UserError(f"--target {target} was given; plan knows learned masks, allowed: N:M such as 2:4")
    model = read_config(config.input)
    layout = config.parallelism
    replicas = layout.data_parallel_size(config.processes)
    stages = plan(model, layout, config.training, target, replicas, bool(config.method_options.get("train_weights")))
    _print(model, layout, replicas, stages)
    if config.output is not None:
        write_json(config.output, {"processes": config.processes, "stages": [asdict(stage) for stage in stages]})


def read_config(path: Path) -> ModelConfig:
    """The sizes of a Megatron checkpoint or of a Hugging Face directory, of which config.json is enough."""
    if (path / "megatron_prune.json").is_file():
        return ModelConfig.from_dict(read_json(path / "megatron_prune.json", "a checkpoint")["model"])
    found = read_json(path / "config.json", "a model")
    return family_of(found).from_hf(found)


def plan(
    model: ModelConfig, layout: Parallelism, training: Training, target: NM, replicas: int, train_weights: bool = False
) -> list[Memory]:
    """Memory of a process of each pipeline stage, first stage first."""
    _check(model, layout)
    count = training.num_microbatches(replicas)
    stages = layout.pipeline_model_parallel_size
    return [
        _stage(model, layout, training, target, train_weights, stage, min(stages - stage, count))
        for stage in range(stages)
    ]


def _check(model: ModelConfig, layout: Parallelism) -> None:
    if model.dtype not in DTYPE_BYTES:
        raise UserError(f"the model is {model.dtype}; models are trained as {' or '.join(DTYPE_BYTES)}: import it so")
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    for what, size, parts in (
        ("query groups", model.num_query_groups, tensor),
        ("ffn channels", model.ffn_hidden_size, tensor),
        ("layers", model.num_layers, stages),
    ):
        if size % parts:
            raise UserError(f"{size} {what} cannot be shared by {parts} processes; allowed: a divisor of {size}")


def _stage(
    model: ModelConfig,
    layout: Parallelism,
    training: Training,
    target: NM,
    train_weights: bool,
    stage: int,
    in_flight: int,
) -> Memory:
    tensor, element = layout.tensor_model_parallel_size, DTYPE_BYTES[model.dtype]
    maps = _maps_of(model, layout, stage)
    prunable = sum(_local_size(map, tensor) for map in maps if map.prunable)
    logits = prunable // target.m * math.comb(target.m, target.n)
    trained = logits + (prunable if train_weights else 0)
    masters = prunable * FLOAT32 if train_weights and element != FLOAT32 else 0
    last = stage == layout.pipeline_model_parallel_size - 1
    layers, loss = _activations(model, layout, training, stage)
    masked = prunable * element
    if training.recompute:
        one_layer, one_masked = (size // _layers_per_stage(model, layout) for size in (layers, masked))
        layers, masked = _inputs_of_layers(model, layout, training) + one_layer, one_masked
        loss = max(0, loss - one_layer - one_masked)  # the loss is done with before a layer is recomputed
    return Memory(
        weights=sum(_local_size(map, tensor) for map in maps) * element,
        mask_logits=logits * FLOAT32,
        gradients=trained * FLOAT32,
        optimizer=2 * trained * FLOAT32 + masters,
        masked_weights=masked * in_flight,
        activations=layers * in_flight,
        loss=loss if last else 0,
    )


def _layers_per_stage(model: ModelConfig, layout: Parallelism) -> int:
    return model.num_layers // layout.pipeline_model_parallel_size


def _maps_of(model: ModelConfig, layout: Parallelism, stage: int) -> list[WeightMap]:
    """The weights of a stage; a tied output layer is a second copy of the embedding when they are apart."""
    last = layout.pipeline_model_parallel_size - 1
    found = []
    for map in get_family(model.family).weights(model):
        if map.layer is not None:
            where = map.layer // _layers_per_stage(model, layout)
        else:
            where = 0 if map.megatron.startswith("embedding") else last
        copied = model.tie_word_embeddings and map.megatron == "embedding.word_embeddings.weight"
        if where == stage or (copied and stage == last):
            found.append(map)
    return found


def _local_size(map: WeightMap, tensor: int) -> int:
    """Elements of a weight on one of `tensor` processes; vocabulary rows are padded to a multiple."""
    rows, *rest = map.shape
    rows = -(-rows // tensor) * tensor if map.pad_rows else rows
    size = math.prod((rows, *rest))
    return size if map.shard_dim is None else size // tensor


def _tokens(layout: Parallelism, training: Training) -> int:
    """Tokens of a micro-batch on one process, outside the sequence-parallel parts."""
    return training.seq_length * training.micro_batch_size // layout.context_parallel_size


def _inputs_of_layers(model: ModelConfig, layout: Parallelism, training: Training) -> int:
    """Bytes of a stage's layer inputs: all that recomputation keeps."""
    share = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    size = _tokens(layout, training) * model.hidden_size // share * DTYPE_BYTES[model.dtype]
    return size * _layers_per_stage(model, layout)


def _activations(model: ModelConfig, layout: Parallelism, training: Training, stage: int) -> tuple[int, int]:
    """Bytes kept of one micro-batch: of a stage's layers, and of the final norm and the loss."""
    size, element = dimensions(model), DTYPE_BYTES[model.dtype]
    tensor = layout.tensor_model_parallel_size
    tokens = _tokens(layout, training)
    hidden = tokens * model.hidden_size // (tensor if layout.sequence_parallel else 1)
    norm = hidden * (FLOAT32 if model.normalization == "RMSNorm" else element)
    query, key_value = tokens * size["query"] // tensor, tokens * size["key_value"] // tensor
    attention = 3 * (query + key_value) * element + tokens * model.num_attention_heads // tensor * FLOAT32
    if model.qk_layernorm:
        attention += (query + key_value) * FLOAT32
    if model.position_embedding == "rope":
        attention += 4 * training.seq_length * rotary_channels(model) * element
    mlp = _mlp_tensors(model) * tokens * model.ffn_hidden_size // tensor * element
    layer = 2 * norm + 2 * hidden * element + attention + mlp
    # The first layer's first norm has no input that asks for a gradient: the embedding is frozen.
    first = norm if stage == 0 and not training.recompute else 0
    vocabulary = -(-model.vocab_size // tensor)
    return _layers_per_stage(model, layout) * layer - first, norm + tokens * vocabulary * FLOAT32


def _mlp_tensors(model: ModelConfig) -> int:
    """Tensors as wide as the MLP that are kept: see the module's docstring; without a gate the input and output."""
    if model.gated:
        return 5
    return 3 if model.activation == "relu2" else 2


def _print(model: ModelConfig, layout: Parallelism, replicas: int, stages: list[Memory]) -> None:
    say(
        f"{model.family}, {model.num_layers} layers of {model.hidden_size}, {model.dtype}; tensor "
        f"{layout.tensor_model_parallel_size} x pipeline {len(stages)} x context {layout.context_parallel_size} x "
        f"{replicas} replicas. GiB on each process:"
    )
    names = [field.name for field in fields(Memory)] + ["total"]
    say("  " + "".join([f"{'stage':<16}"] + [f"{number:>9}" for number in range(len(stages))]))
    for name in names:
        values = "".join(f"{getattr(stage, name) / GIB:>9.2f}" for stage in stages)
        say(f"  {name.replace('_', ' '):<16}{values}")
