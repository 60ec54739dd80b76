"""Heads and groups by what a refit cannot make up for: its formula against solved fits, greedy against trying all."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.statistics import reconstruction
from megatron_prune.statistics.reconstruction import Reconstruction, groups_to_keep, heads_to_keep

WIDTH, GROUPS, EACH = 4, 3, 3


def config() -> Any:
    """Nine heads of four channels in three groups, in every layer."""
    block = SimpleNamespace(num_query_groups=GROUPS, num_attention_heads=GROUPS * EACH, group_heads=EACH)
    return SimpleNamespace(kv_channels=WIDTH, block=lambda layer: block)


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Weight `[6, 36]` and correlated inputs `[400, 36]`."""
    generator = torch.Generator().manual_seed(seed)
    channels = WIDTH * GROUPS * EACH
    x = torch.randn(400, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
    return torch.randn(6, channels, generator=generator), x


def members(*groups: int) -> dict[int, range]:
    return {group: range(EACH * group, EACH * (group + 1)) for group in groups}


def linear(weight: Tensor, x: Tensor, damping: float = 1e-12) -> Reconstruction:
    return Reconstruction(weight, x.double().t() @ x.double(), damping)


def left_error(weight: Tensor, x: Tensor, gone: Tensor) -> float:
    """Squared error of the best fit of the outputs from the other inputs."""
    stay = torch.tensor([n for n in range(x.shape[1]) if n not in gone.tolist()])
    x, outputs = x.double(), x.double() @ weight.double().t()
    fitted = torch.linalg.lstsq(x[:, stay], outputs).solution
    return float((outputs - x[:, stay] @ fitted).square().sum())


def test_the_error_is_that_of_the_best_fit() -> None:
    weight, x = inputs(0)
    found = linear(weight, x)
    first, second = torch.tensor([1, 5, 6]), torch.tensor([0, 20])
    assert found.error(first) == pytest.approx(left_error(weight, x, first), rel=1e-6)
    found.remove(first)
    added = left_error(weight, x, torch.cat([first, second])) - left_error(weight, x, first)
    assert found.error(second) == pytest.approx(added, rel=1e-6)
    stay = torch.tensor([n for n in range(x.shape[1]) if n not in first.tolist()])
    fitted = torch.linalg.lstsq(x[:, stay].double(), x.double() @ weight.double().t()).solution
    torch.testing.assert_close(found.weight[:, stay], fitted.t(), atol=1e-6, rtol=1e-6)
    assert not found.weight[:, first].any()


def test_the_best_choice_is_found_and_a_predictable_head_goes_however_large() -> None:
    weight, x = inputs(1)
    x[:, 4:8] = 50 * x[:, 8:12]  # head 1 is head 2, louder
    heads = heads_to_keep(config(), 0, linear(weight, x, 1e-9), members(0, 1, 2), 2)
    assert len(heads) == 6 and len({1, 2} & set(heads)) == 1
    choices = itertools.product(*(itertools.combinations(range(3 * g, 3 * g + 3), 2) for g in range(3)))
    fresh = linear(weight, x, 1e-9)

    def error(kept: tuple[int, ...]) -> float:
        gone = [head for head in range(9) if head not in kept]
        return fresh.error(torch.tensor([4 * head + n for head in gone for n in range(4)]))

    assert heads == min((tuple(itertools.chain(*choice)) for choice in choices), key=error)


def test_groups_go_whole_and_one_by_one_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = inputs(2)
    weight[:, 12:24] = 0  # group 1 does nothing
    assert groups_to_keep(config(), 0, linear(weight, x), 2) == (0, 2)
    exhaustive = heads_to_keep(config(), 0, linear(weight, x), members(0, 2), 3)
    assert exhaustive == (0, 1, 2, 6, 7, 8)
    monkeypatch.setattr(reconstruction, "EXHAUSTIVE", 0)
    assert groups_to_keep(config(), 0, linear(weight, x), 2) == (0, 2)
    weight, x = inputs(3)
    weight[:, [0, 1, 2, 3, 20, 21, 22, 23, 24, 25, 26, 27]] = 0  # heads 0, 5 and 6: one in each group
    assert heads_to_keep(config(), 0, linear(weight, x), members(0, 1, 2), 2) == (1, 2, 3, 4, 7, 8)


def test_inputs_go_one_by_one_as_if_each_removal_were_worked_out_anew() -> None:
    weight, x = inputs(4)
    found, slow = linear(weight, x, 1e-9), linear(weight, x, 1e-9)
    for count in (30, 11):
        kept = found.shrink(count)
        while int(slow.alive.sum()) > count:
            errors = {int(j): slow.error(j[None]) for j in slow.alive.nonzero().flatten()}
            slow.remove(torch.tensor([min(errors, key=errors.__getitem__)]))
        assert kept.tolist() == slow.alive.nonzero().flatten().tolist() and len(kept) == count
        torch.testing.assert_close(found.weight, slow.weight, atol=1e-6, rtol=1e-6)
    one, two = kept[:1], kept[3:5]
    for each in (found, slow):
        each.remove(one)
    torch.testing.assert_close(found.weight, slow.weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.inverse, slow.inverse, atol=1e-6, rtol=1e-6)
    assert found.error(two) == pytest.approx(slow.error(two), rel=1e-6)
