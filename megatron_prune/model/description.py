"""What a model checkpoint says about itself; read without megatron-core, and without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from megatron_prune.data.tokenizer_files import DESCRIPTION
from megatron_prune.errors import UserError
from megatron_prune.files import write_json
from megatron_prune.foreign import read_format, strict
from megatron_prune.model import given
from megatron_prune.model.families import get_family
from megatron_prune.model.family import check_config
from megatron_prune.model.sizes import ModelConfig
from megatron_prune.model.summary import Zeros

FORMAT = 1
ZEROS = "zeros"
"""Key of what is recorded of a checkpoint itself: its prunable weights that are zero, and all of them."""


@with_config(strict())
class _File(TypedDict):
    """What is in the file."""

    format: Literal[1]
    model: ModelConfig
    source: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """The description file of a checkpoint folder."""

    config: ModelConfig
    source: dict[str, Any] = field(default_factory=dict)
    """Where the weights came from and what was done to them, newest last."""

    def zeros(self) -> Zeros | None:
        """Of the weights when they were written; None where an earlier version wrote them."""
        found = self.source.get(ZEROS)
        if not isinstance(found, list) or len(found) != 2 or any(type(count) is not int for count in found):
            return None
        return Zeros(*found)

    def write(self, folder: Path) -> None:
        """Make `folder` a checkpoint's."""
        write_json(folder / DESCRIPTION, {"format": FORMAT, "model": self.config.to_dict(), "source": self.source})


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of our model checkpoints."""
    return (path / DESCRIPTION).is_file()


def read_description(path: Path) -> Description:
    """What a checkpoint folder holds; UserError when it is none."""
    if not is_checkpoint(path):
        raise given.wrong(path, "checkpoint")
    what = "a megatron_prune checkpoint (import makes one from a Hugging Face model)"
    about = read_format(path / DESCRIPTION, what, FORMAT, _File, plain=True)
    return Description(checked_config(about["model"], path / DESCRIPTION), about["source"])


def checked_config(values: Mapping[str, Any], file: Path) -> ModelConfig:
    """The model of a description, its numbers as they stand there; UserError for sizes that make no model."""
    try:
        config = ModelConfig.from_dict(values)
        family = get_family(config.family)
        check_config(config, family)
        family.check_origin(config)
    except UserError as error:
        raise UserError(f"{file}: key 'model': {error}") from None
    return config
