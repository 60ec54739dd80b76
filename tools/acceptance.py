"""What the checks of `gpu_check.py` share: verdicts, a place to work with its models, and verbs that must succeed."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_prune.__main__ import main
from megatron_prune.log import read_metrics

GIB = 2**30
STOCK = "the a model weight mask layer keeps removes learns row column group pattern of in and with every".split()


class Skip(Exception):
    """This check says nothing here; why."""


class Found(NamedTuple):
    """What a check measured, and what it may be."""

    passed: bool
    value: Any
    limit: Any


class Check(NamedTuple):
    """One line of the result."""

    name: str
    work: Callable[[Any], Found]
    gpu_only: str = ""
    """Why a CPU has nothing to check here."""


def within(values: Mapping[str, float], limits: Mapping[str, float]) -> Found:
    """All values at most their limits; NaN is above any."""
    return Found(all(values[name] <= limit for name, limit in limits.items()), dict(values), dict(limits))


@dataclass(frozen=True)
class Sizes:
    """Of a random LLaMA with the tokenizer of bytes; with experts, of a Qwen3-MoE of which a token meets two."""

    hidden: int
    layers: int
    heads: int
    groups: int
    ffn: int
    """Of each expert, where there are any."""
    dtype: str = "bfloat16"
    experts: int = 0


BILLION = Sizes(2048, 16, 32, 8, 8192)
SMALL = Sizes(512, 4, 8, 2, 1536)
TINY = Sizes(64, 2, 4, 2, 128, "float32")


class Place:
    """A folder, a device, and the models that checks work with, made when one asks for them."""

    def __init__(self, folder: Path, device: str, large: Sizes, small: Sizes) -> None:
        self.folder, self.device, self.large, self.small = folder, torch.device(device), large, small
        self.on_gpu = self.device.type == "cuda"
        self.length, self.batch = (2048, 4) if self.on_gpu else (32, 2)
        """Tokens of a window, windows of a step."""
        self.made: set[str] = set()
        """What is in the folder; all processes know the same."""

    def path(self, name: str) -> Path:
        """Of something in the folder."""
        return self.folder / name

    def forget(self) -> None:
        """Give back memory, and count its peak from here on."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def verb(self, *words: object, **options: object) -> None:
        """Run a verb in this process; `options` as flags. RuntimeError when it does not succeed."""
        argv = [*map(str, words), *flags(**options)]
        print("$", *argv, flush=True)
        status = main(argv)
        sys.stdout.flush()
        if dist.is_initialized():  # one process's words to the others are on the disk now
            dist.barrier()
        if status:
            raise RuntimeError(f"{argv[0]} ended with status {status}: {last_line(self.path('log.txt'))}")

    @functools.cached_property
    def text(self) -> Path:
        """Documents of words in a seeded order, one a line."""
        path, documents = self.path("text.jsonl"), 400 if self.on_gpu else 60
        by_one(lambda: write_text(path, documents))
        return path

    def model(self, name: str, sizes: Sizes, seed: int = 0) -> Path:
        """A Hugging Face directory."""
        path = self.path(name)
        if name not in self.made:
            by_one(lambda: write_model(path, sizes, self.device, seed))
        self.made.add(name)
        return path

    @functools.cached_property
    def large_hf(self) -> Path:
        """The large model."""
        return self.model("large_hf", self.large)

    @functools.cached_property
    def large_checkpoint(self) -> Path:
        """The large model as a Megatron checkpoint."""
        return self.imported(self.large_hf)

    @functools.cached_property
    def large_run(self) -> Path:
        """The large model, pruned to 2:4 by SparseGPT."""
        self.verb(
            "prune",
            input=self.large_checkpoint,
            output=self.path("large_run"),
            method="sparsegpt",
            target="2:4",
            calibration=self.text,
            calibration_samples=8,
            calibration_seq_length=self.length,
        )
        return self.path("large_run")

    @functools.cached_property
    def large_sparse(self) -> Path:
        """The pruned large model as a checkpoint."""
        self.verb("trim", input=self.large_run, output=self.path("large_sparse"))
        return self.path("large_sparse")

    @functools.cached_property
    def large_sparse_hf(self) -> Path:
        """The pruned large model as transformers has it."""
        self.verb("export", input=self.large_sparse, output=self.path("large_sparse_hf"))
        return self.path("large_sparse_hf")

    @functools.cached_property
    def small_hf(self) -> Path:
        """The small model."""
        return self.model("small_hf", self.small)

    def imported(self, hf: Path) -> Path:
        """A Hugging Face directory as a Megatron checkpoint."""
        path = self.path(f"{hf.name}_checkpoint")
        if path.name not in self.made:
            self.verb("import", input=hf, output=path)
        self.made.add(path.name)
        return path

    def learning(self, steps: int, **more: object) -> dict[str, object]:
        """Options of a run that trains."""
        return {
            "data": self.text,
            "seq_length": self.length,
            "global_batch_size": self.batch,
            "train_iters": steps,
            "save_interval": steps,
            **more,
        }


def flags(**options: object) -> list[str]:
    """`seq_length=256` as `--seq-length 256`, True as `--x`; None and False are left out."""
    words: list[str] = []
    for key, value in options.items():
        if value is True:
            words.append(f"--{key.replace('_', '-')}")
        elif value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words


def by_one(work: Callable[[], object]) -> None:
    """Let one process write what all of them read."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        work()
    if dist.is_initialized():
        dist.barrier()


def write_text(path: Path, documents: int, seed: int = 0) -> None:
    """Documents of words in a seeded order."""
    generator = random.Random(seed)
    lines = [json.dumps({"text": " ".join(generator.choices(STOCK, k=600))}) for _ in range(documents)]
    path.write_text("".join(f"{line}\n" for line in lines))


def byte_tokenizer(path: Path) -> Path:
    """Save a byte-level tokenizer of 257 tokens (one per byte, and an end-of-text) into ``path``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<end>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


def write_model(path: Path, sizes: Sizes, device: torch.device, seed: int) -> None:
    """A random model, made on `device`, with a tokenizer of 256 bytes and an end."""
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = {"num_experts": sizes.experts, "num_experts_per_tok": 2, "moe_intermediate_size": sizes.ffn}
    config = AutoConfig.for_model(
        "qwen3_moe" if sizes.experts else "llama",
        **(experts | {"head_dim": sizes.hidden // sizes.heads} if sizes.experts else {}),
        vocab_size=257,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=256,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, sizes.dtype))
    model.save_pretrained(path)
    byte_tokenizer(path)


def metrics(run: Path) -> list[dict[str, float]]:
    """The steps of a run's metrics."""
    return [record for record in read_metrics(run) if "loss" in record]


def losses(run: Path) -> list[float]:
    """Loss of each step."""
    return [record["loss"] for record in metrics(run)]


def furthest(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two curves; infinite where one is shorter."""
    if len(found) != len(expected) or not expected:
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def last_line(log: Path) -> str:
    """What was said last."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][-300:] if lines else "nothing was said"


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[Callable[[str], None]]:
    """While active, what this process and those it starts print goes to a file; what is yielded prints as before."""
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    with log.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)

    def say(line: str) -> None:
        os.write(kept[0], f"{line}\n".encode())

    try:
        yield say
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def run(check: Check, place: Place) -> dict[str, Any]:
    """One line of the result: `name, pass, value, limit, seconds`, and why where nothing was measured."""
    began, more = time.perf_counter(), {}
    try:
        if check.gpu_only and not place.on_gpu:
            raise Skip(check.gpu_only)
        found = check.work(place)
        verdict, value, limit = bool(found.passed), found.value, found.limit
    except Skip as reason:
        verdict, value, limit, more = None, None, None, {"skipped": str(reason)}
    except Exception as error:  # noqa: BLE001  (whatever it is, the other checks are run)
        verdict, value, limit, more = False, None, None, {"error": f"{type(error).__name__}: {error}"[:600]}
    place.forget()
    seconds = round(time.perf_counter() - began, 2)
    return {"name": check.name, "pass": verdict, "value": plain(value), "limit": limit, "seconds": seconds, **more}


def plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
