"""What 2:4 sparsity brings an exported Hugging Face model on this machine.

The model runs as transformers runs it (eager), first dense, then with every pruned weight in PyTorch's compressed 2:4
form (torch.sparse.to_sparse_semi_structured). Prefill (the prompt in one pass) and decode (one token at a time, from
the cache) are timed apart: long prompts are bound by arithmetic, single tokens by memory and by launches. Where the
processor has no 2:4 kernels, one line says so and only the dense figures are taken.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from megatron_prune.config import BenchConfig, ExportConfig
from megatron_prune.decision.masks import prunable_shapes
from megatron_prune.decision.run_folder import is_run
from megatron_prune.decision.target import NM, parse_any_target
from megatron_prune.errors import UserError
from megatron_prune.evaluation.regions import runs, split
from megatron_prune.evaluation.verify import projections
from megatron_prune.exporting.export import export
from megatron_prune.exporting.padding import in_transformers
from megatron_prune.log import device_names, environment, progress, say
from megatron_prune.model.checkpoint import compute_dtype
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import is_checkpoint
from megatron_prune.model.families import get_family
from megatron_prune.model.pruning import read_pruning

PROMPT = 512
"""Tokens of a prompt where none are given and the model reads as many, with those that follow."""
KERNELS_FROM = (8, 0)
"""First compute capability of NVIDIA GPUs that multiplies 2:4 matrices."""


@dataclass(frozen=True)
class Figures:
    """One model at one batch size; the best of the repeats."""

    batch_size: int
    prefill_s: float
    """Seconds for the whole batch of prompts."""
    prefill_tokens_per_s: float
    decode_s_per_token: float
    """Seconds for one new token of every sequence of the batch."""
    decode_tokens_per_s: float
    peak_bytes: int
    """Memory at its highest: the GPU allocator's, or on a CPU the process's so far."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Figures of `config.input`, dense and, where there are kernels, in 2:4 form; UserError when it is not 2:4."""
    if backend.world_size() > 1:
        raise UserError(f"{backend.world_size()} processes were started; bench takes one process and one device")
    with _exported(config) as directory:
        return _bench(*_open(config, directory))


def _bench(config: BenchConfig, reader: HFReader, target: NM) -> dict[str, Any]:
    missing = missing_kernels()
    if not runs(target):
        missing = f"{target.tiles} tiles take one of their own; those of tile=64xall and tile=allx64 do not"
    if missing:
        say(f"no 2:4 kernels here ({missing}): dense figures only")
    return {
        "benchmark": f"dense against {target.title}, transformers, eager",
        "input": config.input,
        "dtype": config.dtype or reader.model_config.dtype,
        "prompt_length": config.prompt_length,
        "new_tokens": config.new_tokens,
        "repeats": config.repeats,
        "environment": environment(),
        "no_sparse_kernels": missing,
        **_measure(config, reader, target, sparse=missing is None),
    }


def missing_kernels() -> str | None:
    """Why this machine cannot multiply 2:4 matrices faster; None where it can."""
    if not backend.has_cuda() or torch.version.cuda is None:
        return f"{device_names()[0]}: an NVIDIA GPU of compute capability 8.0 or newer has them"
    capability = torch.cuda.get_device_capability()
    if capability < KERNELS_FROM:
        return f"{device_names()[0]} has compute capability {capability[0]}.{capability[1]}, they begin with 8.0"
    return None


# --- the model ---


@contextlib.contextmanager
def _exported(config: BenchConfig) -> Iterator[str]:
    """The Hugging Face directory of a model; of a run or a checkpoint one that is gone again behind the block."""
    if not is_checkpoint(config.path) and not is_run(config.path):
        yield config.input
        return
    with tempfile.TemporaryDirectory(prefix="megatron_prune_") as folder:
        export(ExportConfig(input=config.path, output=Path(folder) / "hf"))
        yield str(Path(folder) / "hf")


def _open(config: BenchConfig, directory: str) -> tuple[BenchConfig, HFReader, NM]:
    """The model, found to be 2:4 where it was pruned and long enough, with the length of prompts settled, and what it
    was pruned to; UserError otherwise.
    """
    reader = HFReader(directory)
    longest = reader.model_config.max_position_embeddings
    length = config.prompt_length or max(1, min(PROMPT, longest - config.new_tokens))
    wanted = length + config.new_tokens
    if wanted > longest:
        raise UserError(
            f"--prompt-length and --new-tokens make {wanted} tokens and the model reads at most {longest}: use less"
        )
    if config.prompt_length is None and length < PROMPT:
        say(f"prompts of {length} tokens, {config.new_tokens} follow: the model reads {longest}")
    recorded = read_pruning(reader.directory).get("target")
    target = parse_any_target(recorded) if recorded else None
    if not isinstance(target, NM) or (target.n, target.m) != (2, 4):
        target = NM(2, 4)
    weights = ((name, reader.read(name)) for name in prunable_shapes(reader.model_config))
    counts = projections(weights, reader.model_config, target)
    broken = sum(count.broken_groups for count in counts.values())
    if broken:
        groups = sum(count.size for count in counts.values()) // 4
        raise UserError(
            f"{config.input} is not {target.title}: {broken} of {groups} groups hold more than 2 of 4 weights; give a "
            "model that was pruned with --target 2:4"
        )
    return replace(config, prompt_length=length), reader, target


def _load(config: BenchConfig, reader: HFReader) -> Any:
    dtype = compute_dtype(config.dtype or reader.model_config.dtype)
    model = in_transformers(reader, dtype)
    return torch.nn.Module.to(model, backend.device()).eval().requires_grad_(False)


def sparsify(model: Any, reader: HFReader, target: NM) -> int:
    """Replace every pruned weight of a transformers model on a GPU by its compressed form, or by that and what of it
    stayed dense; the number of weights.
    """
    family = get_family(reader.model_config.family)
    names = [name for name in prunable_shapes(reader.model_config) if not target.leaves(name)]
    for name in names:
        path, _, field = name.rpartition(".")
        module = model.get_submodule(path)
        rows = family.as_rows(getattr(module, field)).contiguous()
        try:
            if target.share == 1:
                packed = to_sparse_semi_structured(rows)
                setattr(module, field, torch.nn.Parameter(family.as_rows(packed), requires_grad=False))
            else:
                model.set_submodule(path, split(rows, module.bias, target, to_sparse_semi_structured))
        except RuntimeError as error:
            raise UserError(f"PyTorch's 2:4 kernels do not take {name}: {error}; try another --dtype") from error
    return len(names)


# --- the measurement ---


def _measure(config: BenchConfig, reader: HFReader, target: NM, sparse: bool) -> dict[str, Any]:
    """Figures of the dense model and, with `sparse`, of the compressed one, with what tells them apart."""
    model = _load(config, reader)
    result: dict[str, Any] = {"dense_bytes": _weight_bytes(model)}
    with progress("bench", len(config.batch_sizes) * (2 if sparse else 1), "measurements") as advance:
        result["dense"] = _figures(config, model, advance)
        if sparse:
            before = _first_logits(model, config)
            sparsify(model, reader, target)
            result["sparse_bytes"] = _weight_bytes(model)
            result["sparse"] = _figures(config, model, advance)
            difference = (_first_logits(model, config) - before).abs().max()
            result["largest_logit_difference"] = float(difference)
            result["largest_logit"] = float(before.abs().max())
    return result


def _weight_bytes(model: Any) -> int:
    """What the model holds: the GPU allocator's figure, on a CPU the parameters' sizes."""
    if backend.has_cuda():
        return torch.cuda.memory_allocated()
    return sum(parameter.nbytes for parameter in model.parameters())


def _prompts(config: BenchConfig, model: Any, batch_size: int) -> Tensor:
    """`[batch_size, prompt_length]` random token ids, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    assert config.prompt_length is not None, "settled when the model was opened"
    shape = (batch_size, config.prompt_length)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(backend.device())


@torch.inference_mode()
def _first_logits(model: Any, config: BenchConfig) -> Tensor:
    return model(_prompts(config, model, 1), logits_to_keep=1).logits.float()


def _figures(config: BenchConfig, model: Any, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    found = []
    for batch_size in config.batch_sizes:
        found.append(asdict(_time(config, model, batch_size)))
        advance(1)
    return found


@torch.inference_mode()
def _time(config: BenchConfig, model: Any, batch_size: int) -> Figures:
    """The best of the repeats, after one that does not count."""
    from transformers import DynamicCache

    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    prompts = _prompts(config, model, batch_size)
    if backend.has_cuda():
        torch.cuda.reset_peak_memory_stats()
    prefill = decode = math.inf
    for repeat in range(config.repeats + 1):
        cache = {name: DynamicCache(config=model.config)}
        began = _now()
        output = model(prompts, **cache, use_cache=True, logits_to_keep=1)
        middle = _now()
        for _ in range(config.new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, **cache, use_cache=True, logits_to_keep=1)
        ended = _now()
        if repeat:
            prefill, decode = min(prefill, middle - began), min(decode, (ended - middle) / config.new_tokens)
    tokens = prompts.numel()
    return Figures(batch_size, prefill, tokens / prefill, decode, batch_size / decode, _peak_bytes())


def _now() -> float:
    """Seconds, once the GPU has done all it was given."""
    if backend.has_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    if backend.has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
