"""The layout that the parallel flags ask for."""

from __future__ import annotations

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from megatron_prune.option_groups import Parallelism


def layout_of(parallelism: Parallelism) -> backend.Layout:
    """The layout that the parallel flags ask for."""
    return backend.Layout(
        tensor=parallelism.tensor_model_parallel_size,
        pipeline=parallelism.pipeline_model_parallel_size,
        context=parallelism.context_parallel_size,
        sequence_parallel=parallelism.sequence_parallel,
        virtual_pipeline=parallelism.virtual_pipeline_model_parallel_size,
        expert=parallelism.expert_model_parallel_size,
        expert_tensor=parallelism.expert_tensor_parallel_size,
    )
