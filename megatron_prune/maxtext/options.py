"""The configuration of each verb of `python -m megatron_prune.maxtext`: fields are flags and YAML keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.options import REQUIRED, Options, option


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Options):
    """A Hugging Face directory -> a model for MaxText"""

    input: Path = option(REQUIRED, "Hugging Face directory (safetensors) of a model of LLaMA's shape")
    output: Path = option(REQUIRED, "folder to write; must not exist")
    masks: Path | None = option(None, "mask .npz: which weights are removed and stay zero; left out: none")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """A model for MaxText, as it is or trained -> a Hugging Face directory"""

    input: Path = option(REQUIRED, "model for MaxText: the folder from convert or export --format maxtext")
    output: Path = option(REQUIRED, "Hugging Face directory to write; must not exist")
    checkpoint: Path | None = option(None, "run that has trained it, or one step of it; left out: the model as it is")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Options):
    """Whether every removed weight is +0.0; exit status 1 when one is not"""

    input: Path = option(REQUIRED, "model for MaxText with masks")
    checkpoint: Path | None = option(None, "run that has trained it, or one step of it; left out: the model as it is")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """MaxText's trainer with removed weights held at zero; the same command goes on after an interruption"""

    input: str = option(REQUIRED, "model for MaxText: the folder from convert or export --format maxtext")
    output: str = option(REQUIRED, "run folder (or gs://...): MaxText writes OUTPUT/checkpoints and goes on from there")
    data: tuple[str, ...] = option((), "[WEIGHT] PREFIX ... from `megatron-prune preprocess`; left out: synthetic data")
    data_cache: Path | None = option(None, "local folder for the order of the data; left out: in the user's cache")
    steps: int = option(REQUIRED, "optimizer steps, over all continuations", at_least=1)
    seq_length: int = option(2048, "tokens in a training window", at_least=2)
    save_interval: int = option(100, "optimizer steps between checkpoints; the last step is always saved", at_least=1)
    seed: int = option(0, "of the order of the data", at_least=0)
    keep_zeros: bool = option(True, "removed weights stay zero, by the masks beside the model")
    settings: tuple[str, ...] = option((), "more of MaxText's settings, KEY=VALUE ...: learning_rate=1e-4 ...")
