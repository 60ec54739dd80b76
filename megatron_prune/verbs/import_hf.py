"""The `import` verb: a Hugging Face checkpoint becomes a Megatron checkpoint, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_prune.option_groups import Dtype, Parallelism
from megatron_prune.options import REQUIRED, Options, group, option
from megatron_prune.verbs import Verb, deliver


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Options):
    """A Hugging Face checkpoint -> a Megatron checkpoint"""

    basic: ClassVar[tuple[str, ...]] = (
        "dtype",
        "mask",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "SmolLM2-135M dense",
        "SmolLM2-135M sparse --mask masks.npz",
    )

    input: str = option(REQUIRED, "Hugging Face directory or hub id (safetensors), or a directory of export's fms form")
    output: Path = option(REQUIRED, "Megatron checkpoint to write; must not exist")
    dtype: Dtype | None = option(None, "type of the weights; left out: the source's own")
    mask: Path | None = option(None, "mask .npz (Hugging Face weight names) applied to the weights")
    parallelism: Parallelism = group(Parallelism)


VERB = Verb("import", ImportConfig, "Hugging Face checkpoint -> Megatron checkpoint", 20)


def run(config: ImportConfig) -> Path:
    """Import `config.input` and write `config.output`."""
    from megatron_prune.jobs.import_hf import import_hf, open_hf

    reader, lacking = open_hf(config.input, config.dtype)
    deliver(lacking)
    made = import_hf(reader, config.output, config.parallelism, config.dtype, config.mask, source=config.input)
    deliver([made])
    return config.output
