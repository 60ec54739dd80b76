"""One mask for all micro-batches of a step: its work is done once, and the gradient is that of doing it each time."""

from __future__ import annotations

from typing import Any

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch
from torch import Tensor

from megatron_prune.model import masked_linear
from megatron_prune.model.context import positions
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import PrunableModel
from tests.unit.test_gpu_path import model

MICROBATCHES = 3


def learning(per_step: bool, train_weights: bool) -> PrunableModel:
    """A small LLaMA whose masks are drawn by one key: that of a step, or of the micro-batch 0 again and again."""
    network = model()
    draw = MaskDraw(2, 4, seed=1, scale=3.0, temperature=0.8, regularization=1e-3, step=5, per_step=per_step)
    network.learn_masks(draw)
    for linear in network.linears():
        linear.module.weight.requires_grad_(train_weights)
        with torch.no_grad():
            linear.module.mask_logits.normal_(generator=torch.Generator().manual_seed(linear.tensor_id))
    network.chunks[0].train()
    return network


def gradients(network: PrunableModel) -> list[Tensor]:
    """Of everything that is trained, after the backward passes of a step."""
    for number in range(MICROBATCHES):
        tokens = torch.arange(24).roll(number).view(2, 12)
        network.chunks[0](tokens, positions(12).expand(2, -1), None).square().mean().backward()
    for linear in network.linears():
        linear.module.finish_step()
        assert linear.module.shared is None
    return [parameter.grad for parameter in network.chunks[0].parameters() if parameter.grad is not None]


@pytest.mark.parametrize("train_weights", [False, True])
def test_gradients_are_those_of_a_mask_made_for_every_micro_batch(
    monkeypatch: pytest.MonkeyPatch, train_weights: bool
) -> None:
    made: list[int] = []
    whole = masked_linear.masked_weight

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(masked_linear, "masked_weight", counted)
    with backend.running(backend.Layout()):
        found, counts = [], []
        for per_step in (False, True):
            network = learning(per_step, train_weights)
            made.clear()
            found.append(gradients(network))
            counts.append(len(made) / len(network.linears()))
    assert counts == [MICROBATCHES, 2]  # for the passes, and for the gradient
    assert len(found[0]) == len(found[1]) > 8
    for each, once in zip(*found, strict=True):
        assert each.abs().max() > 0
        torch.testing.assert_close(once, each, rtol=1e-4, atol=1e-6)


def test_the_next_step_has_a_mask_of_its_own() -> None:
    with backend.running(backend.Layout()):
        network = learning(True, False)
        linear = network.linears()[0].module
        assert linear.mask_draw is not None
        first = linear._masked(linear.weight, linear.mask_draw)
        assert linear._masked(linear.weight, linear.mask_draw) is first
        linear.mask_draw.step += 1
        assert not torch.equal(linear._masked(linear.weight, linear.mask_draw), first)
