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
