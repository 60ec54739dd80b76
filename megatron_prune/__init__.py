"""Prune large language models at Megatron scale: Hugging Face in, Hugging Face out.

The verbs of the command line are functions here (`megatron_prune.prune(...)`), see `megatron_prune.api`; `prune_model`
prunes a transformers model in memory. Nothing heavy is imported until one of them is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune.device import whole_float32
from megatron_prune.errors import UserError
from megatron_prune.version import VERSION

whole_float32()

__version__ = VERSION

__all__ = [
    "UserError",
    "__version__",
    "bench",
    "completion",
    "evaluate",
    "export",
    "import_",
    "inspect",
    "latency",
    "methods_",
    "permute",
    "plan",
    "preprocess",
    "prune",
    "prune_model",
    "report",
    "train",
    "trim",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A verb's function, made when it is first asked for."""
    if name == "prune_model":
        from megatron_prune.in_memory import prune_model

        return prune_model
    if name in __all__ or (Path(__file__).parent / "verbs" / f"{name}.py").is_file():
        from megatron_prune.api import function

        return function(name)
    raise AttributeError(f"module 'megatron_prune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
