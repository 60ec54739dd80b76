"""What of a Hugging Face directory comes along to checkpoints and exports, and what does not: told once, at import.

Weights, config.json, tokenizer, chat templates, the generation config and licences come along. Everything else stays
where it is, and so do the keys of config.json that name code, kernels or files of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prune.data.tokenizer_files import tokenizer_files
from megatron_prune.errors import one_line, shown
from megatron_prune.foreign import names
from megatron_prune.model import pruning
from megatron_prune.model.blocks import KEY
from megatron_prune.model.family import NOT_CARRIED
from megatron_prune.model.stored import weight_files

_LIMIT = 400
"""Characters of the line."""


def told(directory: Path, hf_config: Mapping[str, Any], configs: Sequence[str], buffers: Sequence[str]) -> str | None:
    """One line about what does not come along; None when everything does.

    `configs`: the files that the model's sizes come from; `buffers`: tensors that carry no weights of the model.
    """
    files, keys = left_files(directory, configs), left_keys(hf_config)
    parts = [names(files, 8)] if files else []
    if keys:
        own = "auto_map" in keys and KEY not in hf_config
        code = ": the model is transformers' own, its code stays here" if own else ""
        parts.append(f"of {configs[0]} {', '.join(keys)}{code}")
    if buffers:
        parts.append(f"{len(buffers)} tensors that no weight of the model is in, such as {shown(buffers[0])}")
    return one_line(f"not carried along from {directory}: {'; '.join(parts)}", _LIMIT) if parts else None


def left_files(directory: Path, configs: Sequence[str]) -> list[str]:
    """Files and folders (their names end with /) that stay behind, hidden ones aside."""
    taken = {file.relative_to(directory) for file in tokenizer_files(directory)}
    taken |= {Path(name) for name in (*weight_files(directory), *configs, pruning.FILE)}
    return [
        path.name + ("/" if path.is_dir() else "")
        for path in sorted(directory.iterdir())
        if not path.name.startswith(".") and not _comes_along(path, directory, taken)
    ]


def _comes_along(path: Path, directory: Path, taken: set[Path]) -> bool:
    """Whether a file, or everything in a folder, is among the `taken`."""
    if path.is_dir():
        return all(file.relative_to(directory) in taken for file in path.rglob("*") if not file.is_dir())
    return path.relative_to(directory) in taken


def left_keys(hf_config: Mapping[str, Any]) -> list[str]:
    """Keys of config.json that an export's does not have."""
    return [key for key in NOT_CARRIED if hf_config.get(key) is not None]
