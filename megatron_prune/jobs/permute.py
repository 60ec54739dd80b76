"""A dense model in, the same model with its channels in another order out: N:M patterns keep more of it then."""

from __future__ import annotations

from dataclasses import replace

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.claims import refuse_existing
from megatron_prune.config import PermuteConfig
from megatron_prune.decision.pruned import cut, made
from megatron_prune.decision.run_folder import trained_model
from megatron_prune.decision.source import open_model, tell_left
from megatron_prune.decision.target import NM, parse_any_target
from megatron_prune.errors import UserError
from megatron_prune.exporting.preflight import check_export
from megatron_prune.log import progress
from megatron_prune.methods.permutation import check, permuted
from megatron_prune.model.checkpoint import compute_dtype, save_model
from megatron_prune.model.forward import window_losses
from megatron_prune.model.layout import layout_of
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.workbench import calibration_windows

COMPARED = 8
"""Windows on which the model is compared with itself."""
ROUNDING = 0.01
"""Of its loss that another order of sums may change."""


def permute(config: PermuteConfig) -> list[str]:
    """Write `config.output` from `config.input`; lines on what came of it. By all processes."""
    target = parse_any_target(config.target)
    if not isinstance(target, NM) or target.dense or target.dense_share or target.share != 1:
        raise UserError(f"--target {config.target} was given; permute takes a pattern N:M alone, such as 2:4 or 4:8")
    config = replace(config, input=trained_model(config.input))
    source = open_model(config.input)
    pruned = source.history.get("target")
    if pruned and isinstance(parse_any_target(pruned), NM):
        raise UserError(
            f"{config.input} was pruned to {pruned}, and another order would take its groups apart: give the dense "
            "model, and prune what permute writes"
        )
    check_export(source.config)
    check(source.config, target)
    compute_dtype(source.config.dtype)
    tell_left(source)
    tokens = calibration_windows(config.calibration, source, "permute", config.apply_chat_template).tokens
    layout = layout_of(config.parallelism)
    refuse_existing(config.output, "checkpoint")
    with backend.running(layout, timeout_minutes=config.parallelism.distributed_timeout_minutes):
        model = source.load(layout)
        before = _loss(model, tokens)
        with progress(f"permute {target}", source.config.num_layers, "layers") as advance:
            units = permuted(model, tokens, target, advance)
        model = cut(model, units)
        after = _loss(model, tokens)
        if not abs(after - before) < ROUNDING * max(1.0, before):
            raise RuntimeError(f"the loss was {before} and is {after} after a change of order: nothing is written")
        zeros = save_model(config.output, model, source.history, source.tokenizer)
    same = f"next-token loss of {min(COMPARED, len(tokens))} windows {after:.4f}, before {before:.4f}"
    return [made(config.output, model.config, zeros), same]


@torch.no_grad()
def _loss(model: PrunableModel, tokens: Tensor) -> float:
    total, count = window_losses(model, tokens[:COMPARED].to(backend.device()))
    return total / count
