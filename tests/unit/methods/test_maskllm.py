"""The start and the options of learned masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from megatron_prune.backend import Layout
from megatron_prune.decision.target import NM, Unstructured
from megatron_prune.errors import UserError
from megatron_prune.kernels.gumbel import decode, patterns
from megatron_prune.kernels.selection import select_nm
from megatron_prune.methods.base import get_method
from megatron_prune.methods.maskllm import WEIGHT_OPTIONS, MaskLLM, prior_logits
from megatron_prune.option_groups import Calibration
from megatron_prune.options import entries
from megatron_prune.training.joint import WeightTraining


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


@pytest.mark.parametrize(
    "option", ["scale_start", "temperature_end", "prior_strength", "lr_multiplier", "weight_lr_multiplier"]
)
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} 0 was given; allowed: above 0"):
        get_method("maskllm", **{option: 0})


@pytest.mark.parametrize(
    "option", ["tile_lr_multiplier", "weight_regularization", "weight_eps", "weight_clip", "masked_decay"]
)
def test_options_below_zero_are_refused(option: str) -> None:
    assert getattr(MaskLLM(**{option: 0.0}), option) == 0
    with pytest.raises(UserError, match=f"{option} -1.0 was given; allowed: 0 or more"):
        MaskLLM(**{option: -1.0})


def test_weights_stay_unless_they_train() -> None:
    assert MaskLLM().weights_stay and not MaskLLM(train_weights=True).weights_stay


def test_unstructured_targets_are_refused() -> None:
    with pytest.raises(UserError, match="N:M"):
        MaskLLM().accept(Unstructured(0.5))


def test_what_is_asked_for_reaches_the_training_session() -> None:
    """Options that are named here; tiles learn where the target leaves a share dense."""
    runner = Mock(microbatches=4)
    work: Any = SimpleNamespace(learn=lambda: runner, model=SimpleNamespace(layout=Layout()))
    target = NM(2, 4)
    weights: dict[str, Any] = dict(weight_lr_multiplier=0.3, weight_eps=1e-7, weight_clip=0.5, train_norms=True)
    weights |= dict(masked_decay=9.0, decay_warmup=0.4, weight_gradient="dense")
    asked: dict[str, Any] = dict(hard=True, mask_draw="step", logits_dtype="bfloat16", lr_multiplier=7.0)
    method = MaskLLM(train_weights=True, **asked, **weights)
    assert method.decide(work, target) is runner.keep.return_value
    training = WeightTraining(lr_factor=0.3, eps=1e-7, clip=0.5, decay=9.0, decay_warmup=0.4, norms=True)
    draw = {"hard": True, "straight": True, "per_step": True, "logits_dtype": torch.bfloat16}
    runner.learn_masks.assert_called_once_with(target, training, **draw)
    start, std, half_step = runner.start_logits.call_args.args
    mask = torch.tensor([[False, True, True, False]])
    assert std == 0.01 and half_step == 0.015 and torch.equal(start(mask), prior_logits(mask, 2, 4, 3.0, 0.01))
    assert runner.optimize.call_args.kwargs["multipliers"] == {"*mask_logits": 7.0}
    moved = runner.optimize.call_args.kwargs["on_step"](0, 10)
    assert moved["weight_regularization"] == 1e-5 and runner.learn_masks.return_value.regularization == 1e-5 / 4
    MaskLLM().decide(work, target)
    plain = {"hard": False, "straight": False, "per_step": False, "logits_dtype": torch.float32}
    runner.learn_masks.assert_called_with(target, None, **plain)
    assert not runner.learn_tiles.called
    MaskLLM(tile_lr_multiplier=2.5).decide(work, NM(2, 4, (), 0.75))
    runner.learn_tiles.assert_called_once_with(NM(2, 4, (), 0.75), 2.5)


def test_experts_that_meet_several_micro_batches_take_one_draw() -> None:
    """Said before anything is learned; experts cut over tensor ranks alone see one micro-batch at a time."""
    runner = Mock(microbatches=4)
    shared: Any = SimpleNamespace(learn=Mock(return_value=runner), model=SimpleNamespace(layout=Layout(expert=2)))
    with pytest.raises(UserError, match="give --mask-draw step"):
        MaskLLM(mask_draw="microbatch").decide(shared, NM(2, 4))
    assert not shared.learn.called
    MaskLLM(mask_draw="step").decide(shared, NM(2, 4))
    cut = Layout(tensor=2, expert_tensor=1)
    alone: Any = SimpleNamespace(learn=Mock(return_value=runner), model=SimpleNamespace(layout=cut))
    MaskLLM(mask_draw="microbatch").decide(alone, NM(2, 4))
    assert shared.learn.call_count == alone.learn.call_count == 1


def test_what_the_start_does_not_need_is_idle() -> None:
    settings = {"prior": None, "initial_logits": None, "calibration": ("a.txt",), "calibration_seed": 0}
    settings["target"] = "2:4@0.75"
    text = {entry.key for entry in entries(Calibration)}
    assert {"calibration", "calibration_seed", "calibration_samples"} <= text

    def idle(**given: str) -> set[str]:
        return set(MaskLLM().idle(settings | given))

    frozen = set(WEIGHT_OPTIONS)
    assert set(MaskLLM(train_weights=True).idle(settings)) == {"prior_strength", "decay_warmup"} | text
    assert set(MaskLLM(train_weights=True, masked_decay=1.0).idle(settings)) == {"prior_strength"} | text
    text |= frozen
    assert idle() == {"prior_strength"} | text
    assert idle(initial_logits="run") == {"prior_strength", "std"} | text
    assert idle(prior="run") == idle(prior="magnitude") == text
    assert idle(prior="sparsegpt") == frozen
    assert idle(prior="sparsegpt", target="2:4") == frozen | {"tile_lr_multiplier"}
