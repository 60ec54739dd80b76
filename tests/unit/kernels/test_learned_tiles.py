"""Tiles that are dense to a degree: value and gradients against the formula spelt out, whole and in shards."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.kernels import tiles
from megatron_prune.kernels.gumbel import Draw
from megatron_prune.kernels.tiles import Shard, blended, centred, logistic_noise, sharpness, thresholds

ROWS, INPUTS, HIGH, WIDE = 10, 20, 3, 8
LINES, ACROSS = 4, 3
"""The last line and the last column of tiles are smaller."""
DRAW = Draw(seed=3, step=4, microbatch=5, tensor_id=6)
HOW: dict[str, Any] = {"scale": 1.5, "temperature": 0.7, "draw": DRAW}
ORDER = [4, 0, 9, 1, 8, 2, 7, 3, 6, 5]
"""Rows lie in this order, as those of queries, keys and values do."""


def shard(rows: list[int], first: int, last: int) -> Shard:
    """Of some rows and the inputs between two."""
    return Shard.of(torch.tensor(rows) // HIGH, LINES, first, last - first, WIDE, ACROSS)


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and masked weight in `ORDER`, and logits of tiles."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64)
    masked = weight * torch.rand(ROWS, INPUTS, generator=generator, dtype=torch.float64)
    logits = torch.randn(LINES, ACROSS, generator=generator, dtype=torch.float64)
    found = [x.requires_grad_() for x in (weight, masked, logits)]
    return found[0], found[1], found[2]


def by_hand(weight: Tensor, masked: Tensor, logits: Tensor, scale: float, temperature: float) -> Tensor:
    """Weight by weight, with the tile that it is in."""
    degree = ((scale * logits + logistic_noise(logits, DRAW)) / temperature).sigmoid()
    rows = []
    for row, number in enumerate(ORDER):
        each = [degree[number // HIGH, column // WIDE] for column in range(INPUTS)]
        dense = torch.stack(each)
        rows.append(dense * weight[row] + (1 - dense) * masked[row])
    return torch.stack(rows)


def gradients(result: Tensor, inputs: tuple[Tensor, ...], slope: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, inputs, slope))


@pytest.mark.parametrize("chunk", [tiles.CHUNK, 3 * INPUTS])
def test_value_and_gradients_are_those_of_the_formula(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CHUNK", chunk)
    inputs = tensors()
    slope = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = blended(*inputs, shard(ORDER, 0, INPUTS), **HOW), by_hand(*inputs, 1.5, 0.7)
    torch.testing.assert_close(found, expected)
    pairs = zip(gradients(found, inputs, slope), gradients(expected, inputs, slope), strict=True)
    for mine, theirs in pairs:
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(lambda *x: blended(*x, shard(ORDER, 0, INPUTS), **HOW), inputs)


@pytest.mark.parametrize(
    "parts", [[(ORDER[:4], 0, INPUTS), (ORDER[4:], 0, INPUTS)], [(ORDER, 0, 12), (ORDER, 12, INPUTS)]]
)
def test_gradients_of_shards_add_up(parts: list[tuple[list[int], int, int]]) -> None:
    """Also where a tile lies on two of them."""
    weight, masked, logits = tensors()
    slope = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = blended(weight, masked, logits, shard(ORDER, 0, INPUTS), **HOW)
    total = torch.zeros_like(logits)
    for rows, first, last in parts:
        here = [ORDER.index(row) for row in rows]
        own = [x[here, first:last] for x in (weight, masked)]
        part = blended(own[0], own[1], logits, shard(rows, first, last), **HOW)
        torch.testing.assert_close(part, whole[here, first:last])
        total += gradients(part, (logits,), slope[here, first:last])[0]
    torch.testing.assert_close(total, gradients(whole, (logits,), slope)[0])


def test_hard_tiles_are_one_or_the_other_and_see_the_soft_degree() -> None:
    weight, masked, logits = inputs = tensors()
    slope = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = shard(ORDER, 0, INPUTS)
    z = (1.5 * logits + logistic_noise(logits, DRAW)) / 0.7
    dense = whole.spread(z > 0)
    assert 0 < dense.sum() < dense.numel()
    result = blended(*inputs, whole, **HOW, hard=True)
    assert torch.equal(result, torch.where(dense, weight, masked))
    found = gradients(result, inputs, slope)
    assert torch.equal(found[0], slope * dense) and torch.equal(found[1], slope * ~dense)
    expected = gradients((whole.sums(slope * (weight - masked)).detach() * z.sigmoid()).sum(), (logits,), None)
    torch.testing.assert_close(found[2], expected[0])


def test_half_precision_is_rounded_once() -> None:
    weight, masked, logits = (x.detach() for x in tensors())
    narrow = [x.bfloat16() for x in (weight, masked)]
    result = blended(narrow[0], narrow[1], logits.float(), shard(ORDER, 0, INPUTS), **HOW)
    wide = [x.float() for x in narrow]
    exact = blended(wide[0], wide[1], logits.float(), shard(ORDER, 0, INPUTS), **HOW)
    assert result.dtype == torch.bfloat16 and torch.equal(result, exact.bfloat16())


def test_what_is_not_asked_for_is_not_made() -> None:
    weight, masked, logits = tensors()
    result = blended(weight.detach(), masked, logits.detach(), shard(ORDER, 0, INPUTS), **HOW)
    (found,) = gradients(result, (masked,), torch.ones_like(result))
    degree = ((1.5 * logits + logistic_noise(logits, DRAW)) / 0.7).sigmoid()
    torch.testing.assert_close(found, 1 - shard(ORDER, 0, INPUTS).spread(degree))


def test_noise_is_logistic_and_another_for_every_draw() -> None:
    many = torch.empty(300, 400)
    noise = logistic_noise(many, DRAW)
    assert abs(float(noise.mean())) < 0.02 and float(noise.var()) == pytest.approx(math.pi**2 / 3, rel=0.02)
    assert float((noise < 1).float().mean()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.005)
    assert torch.equal(noise, logistic_noise(many, DRAW))
    for field in ("seed", "step", "microbatch", "tensor_id"):
        other = logistic_noise(many, replace(DRAW, **{field: 9}))
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.02
    without = blended(*tensors(), shard(ORDER, 0, INPUTS), **HOW | {"draw": None})
    assert not torch.equal(without, blended(*tensors(), shard(ORDER, 0, INPUTS), **HOW))


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 0.05), (3.0, 1.0), (20.0, 12.8)])
def test_the_sharpness_is_that_of_the_expected_degree(scale: float, temperature: float) -> None:
    noise = logistic_noise(torch.empty(500, 500), DRAW).double()
    for logit in (-1.0, 0.1, 0.5):
        mean = float(((scale * logit + noise) / temperature).sigmoid().mean())
        said = 1 / (1 + math.exp(-sharpness(scale, temperature) * logit))
        assert said == pytest.approx(mean, abs=0.015)


SIZES = torch.tensor([[4.0, 4, 4, 2, 0], [4, 4, 2, 2, 1], [4, 4, 4, 4, 4]], dtype=torch.float64)
ROOM = torch.tensor([4.0, 6, 0], dtype=torch.float64)


def random_logits() -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sharp", [1e-3, 1.0, 30.0])
def test_a_threshold_fills_the_room(sharp: float) -> None:
    logits = random_logits()
    found = thresholds(logits, SIZES, ROOM, sharp)
    filled = (SIZES * (sharp * (logits - found[:, None])).sigmoid()).sum(1)
    torch.testing.assert_close(filled, ROOM)
    assert found[2] == math.inf and found[:2].isfinite().all()
    torch.testing.assert_close(thresholds(logits + 7, SIZES, ROOM, sharp)[:2], found[:2] + 7)


def test_gradients_go_through_the_threshold() -> None:
    """By finite differences; what moves all logits of a matrix alike has none."""
    logits, slope = random_logits(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sharp, step = 1.7, 1e-5
    slope[SIZES == 0] = 0
    slope[2] = 0  # tiles that cannot be dense have no effect

    def value(x: Tensor) -> Tensor:
        away = x - thresholds(x, SIZES, ROOM, sharp)[:, None]
        return (slope * away).nan_to_num(0.0, 0.0, 0.0).sum()

    found = centred(slope, logits, SIZES, thresholds(logits, SIZES, ROOM, sharp), sharp)
    for place in range(logits.numel()):
        nudge = torch.zeros(15, dtype=torch.float64).index_fill(0, torch.tensor(place), step).view(3, 5)
        difference = (value(logits + nudge) - value(logits - nudge)) / (2 * step)
        assert float(found.flatten()[place]) == pytest.approx(float(difference), abs=1e-6)
    assert found.sum(1).abs().max() < 1e-12 and found[:2].abs().max() > 0.1
