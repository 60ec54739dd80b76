"""The start and the options of learned masks."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.decision.target import Unstructured
from megatron_prune.errors import UserError
from megatron_prune.kernels.gumbel import decode, patterns
from megatron_prune.kernels.selection import select_nm
from megatron_prune.methods.base import get_method
from megatron_prune.methods.maskllm import MaskLLM, prior_logits


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (2, 8)])
@pytest.mark.parametrize("strength", [1e-3, 3.0, 30.0])
def test_a_fresh_start_decodes_to_its_prior_exactly(n: int, m: int, strength: float) -> None:
    mask = select_nm(torch.rand(64, 16 * m, generator=torch.Generator().manual_seed(n)), n, m)
    logits = prior_logits(mask, n, m, strength, 0.01)
    assert logits.shape == (64, 16, len(patterns(n, m)))
    assert torch.equal(decode(logits, n, m), mask)


def test_the_published_start_loses_groups() -> None:
    """Negative control: the paper's random part makes a share of the groups leave their prior."""
    generator = torch.Generator().manual_seed(0)
    mask = select_nm(torch.rand(256, 256, generator=generator), 2, 4)
    random = 0.01 * torch.randn(256, 64, 6, generator=generator)
    published = random + prior_logits(mask, 2, 4, 3.0, float(random.std()))
    lost = (decode(published, 2, 4) != mask).view(256, 64, 4).any(-1).float().mean()
    assert 0.01 < lost < 0.2


def test_equal_overlap_starts_equal() -> None:
    mask = torch.tensor([[True, True, False, False]])
    values = prior_logits(mask, 2, 4, 3.0, 0.01).flatten()
    overlap = (patterns(2, 4) & mask).sum(1)
    assert values.tolist() == pytest.approx([0.03 * (int(k) - 2) for k in overlap])


def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(UserError, match="allowed: linear, geometric"):
        MaskLLM(schedule_shape="cosine")


def test_unknown_types_of_logits_are_refused() -> None:
    with pytest.raises(UserError, match="allowed: float32, bfloat16"):
        MaskLLM(logits_dtype="float16")


def test_unknown_draws_are_refused() -> None:
    with pytest.raises(UserError, match="allowed: microbatch, step"):
        MaskLLM(mask_draw="epoch")


@pytest.mark.parametrize("recompute", [False, True])
def test_a_mask_for_each_micro_batch_or_one_for_the_step(recompute: bool) -> None:
    from collections import deque

    from megatron_prune.model.masked_linear import MaskDraw

    def keys(per_step: bool, step: int) -> list[tuple[int, int]]:
        draw = MaskDraw(2, 4, seed=0, step=step, per_step=per_step, recompute=recompute)
        found, pending = [], deque[int]()
        for draw.microbatch in range(3):
            if recompute:
                with torch.no_grad():
                    found.append(draw.draw(7, pending).key())
            found.append(draw.draw(7, pending).key())
        return found

    assert len(set(keys(False, 0))) == 3
    assert len(set(keys(True, 0))) == 1
    assert keys(True, 0)[0] == keys(False, 0)[0]
    assert keys(True, 1)[0] != keys(True, 0)[0]


def test_the_schedule_moves_the_draw() -> None:
    from types import SimpleNamespace

    draw = SimpleNamespace(scale=0.0, temperature=0.0, regularization=0.0)
    method = MaskLLM(weight_regularization=8e-5)
    logged = method.schedule(draw, 0, 10, microbatches=4)  # type: ignore[arg-type]
    assert (draw.scale, draw.temperature) == (1e2, 4.0)
    assert draw.regularization == pytest.approx(2e-5)  # a share for each of the step's micro-batches
    assert logged["weight_regularization"] == pytest.approx(8e-5)
    method.schedule(draw, 9, 10, microbatches=4)  # type: ignore[arg-type]
    assert (draw.scale, draw.temperature, draw.regularization) == (5e2, 0.05, 0.0)


@pytest.mark.parametrize("option", ["scale_start", "temperature_end", "prior_strength", "lr_multiplier"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} 0 was given; allowed: above 0"):
        get_method("maskllm", **{option: 0})


def test_negative_regularisation_is_refused() -> None:
    with pytest.raises(UserError, match="0 or more"):
        MaskLLM(weight_regularization=-1.0)


def test_unstructured_targets_are_refused() -> None:
    with pytest.raises(UserError, match="N:M"):
        MaskLLM().accept(Unstructured(0.5))
