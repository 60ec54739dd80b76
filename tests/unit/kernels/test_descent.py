"""Descent on masks and weights against every mask there is, solved one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_prune.kernels.descent import descend, fits
from megatron_prune.kernels.second_order import factorise, solve_nm, solve_unstructured
from megatron_prune.kernels.selection import keep_largest, select_nm

DAMPING = 0.01


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and a Hessian of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), 2 * x.T @ x / len(x)


def damped(hessian: Tensor) -> Tensor:
    """What E is measured with."""
    return hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))


def errors(weight: Tensor, new: Tensor, hessian: Tensor) -> Tensor:
    """E of each row."""
    lost = weight.double() - new.double()
    return ((lost @ damped(hessian)) * lost).sum(1)


def masks(n: int, m: int, columns: int) -> Iterator[Tensor]:
    """All N:M masks of a row."""
    patterns = [torch.tensor([i in kept for i in range(m)]) for kept in itertools.combinations(range(m), n)]
    yield from (torch.cat(chosen) for chosen in itertools.product(patterns, repeat=columns // m))


def best(weight: Tensor, hessian: Tensor, n: int, m: int, update: bool) -> Tensor:
    """Lowest E of each row over all masks, weights by least squares where they are updated."""
    gram, found = damped(hessian), []
    for row in weight.double():
        costs = []
        for mask in masks(n, m, len(row)):
            new = torch.where(mask, row, 0.0)
            if update:
                new[mask] = torch.linalg.solve(gram[mask][:, mask], (gram[mask] @ row))
            costs.append((row - new) @ gram @ (row - new))
        found.append(torch.stack(costs).min())
    return torch.stack(found)


def started(weight: Tensor, hessian: Tensor, n: int, m: int, update: bool) -> tuple[Tensor, Tensor]:
    """SparseGPT's mask and weights, or the dense ones."""
    mask, new = solve_nm(weight, factorise(hessian, DAMPING), n, m)
    return mask, new if update else weight


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_of_one_group_it_finds_the_best_mask_there_is(n: int, m: int, update: bool) -> None:
    weight, hessian = problem(40, m, seed=n)
    mask, start = started(weight, hessian, n, m, update)
    kept, new = descend(weight, start, mask, hessian, m, 1, DAMPING, update)
    assert torch.equal(kept.sum(1), torch.full((40,), n)) and not new[~kept].any()
    assert torch.allclose(errors(weight, new, hessian), best(weight, hessian, n, m, update), rtol=1e-5)
    assert errors(weight, torch.where(mask, start, 0.0), hessian).sum() > errors(weight, new, hessian).sum() * 1.01


@pytest.mark.parametrize("update", [True, False])
def test_of_several_groups_it_comes_near_the_best(update: bool) -> None:
    weight, hessian = problem(12, 12)
    mask, start = started(weight, hessian, 2, 4, update)
    lowest = best(weight, hessian, 2, 4, update)
    before = errors(weight, torch.where(mask, start, 0.0), hessian)
    _, new = descend(weight, start, mask, hessian, 4, 20, DAMPING, update)
    after = errors(weight, new, hessian)
    assert (after >= lowest * (1 - 1e-6)).all() and (after <= before * (1 + 1e-6)).all()
    assert after.sum() - lowest.sum() < 0.5 * (before.sum() - lowest.sum())


@pytest.mark.parametrize("update", [True, False])
def test_no_pass_raises_the_error_of_any_row(update: bool) -> None:
    weight, hessian = problem(32, 320)
    mask, start = started(weight, hessian, 2, 4, update)
    last = errors(weight, torch.where(mask, start, 0.0), hessian)
    for passes in (1, 2, 5):
        kept, new = descend(weight, start, mask, hessian, 4, passes, DAMPING, update)
        found = errors(weight, new, hessian)
        assert (found <= last * (1 + 1e-6)).all() and found.sum() < last.sum()
        assert torch.equal(kept.unflatten(1, (-1, 4)).sum(2), torch.full((32, 80), 2))
        assert update or torch.equal(new, torch.where(kept, weight, 0.0))
        last = found


def test_passes_end_where_least_squares_under_the_mask_does() -> None:
    weight, hessian = problem(8, 64)
    mask, start = started(weight, hessian, 2, 4, True)
    kept, new = descend(weight, start, mask, hessian, 4, 400, DAMPING, True)
    gram = damped(hessian)
    for row, chosen, found in zip(weight.double(), kept, new, strict=True):
        fitted = torch.linalg.solve(gram[chosen][:, chosen], gram[chosen] @ row)
        assert torch.allclose(found[chosen].double(), fitted, atol=1e-4)


def test_without_groups_each_four_neighbours_keep_as_many() -> None:
    weight, hessian = problem(16, 64)
    mask, start = solve_unstructured(
        weight, factorise(hessian, DAMPING), lambda scores, _: keep_largest(scores, scores.shape[1] // 2)
    )
    kept, new = descend(weight, start, mask, hessian, 4, 5, DAMPING, True)
    assert torch.equal(kept.unflatten(1, (-1, 4)).sum(2), mask.unflatten(1, (-1, 4)).sum(2))
    assert len(mask.unflatten(1, (-1, 4)).sum(2).unique()) > 2 and not torch.equal(kept, mask)
    assert (errors(weight, new, hessian) <= errors(weight, start, hessian) * (1 + 1e-6)).all()


def test_rows_do_not_meet() -> None:
    weight, hessian = problem(24, 256)
    mask, start = started(weight, hessian, 2, 4, True)
    whole = descend(weight, start, mask, hessian, 4, 3, DAMPING, True)
    parts = [descend(weight[i], start[i], mask[i], hessian, 4, 3, DAMPING, True) for i in (slice(0, 5), slice(5, 24))]
    assert torch.equal(whole[0], torch.cat([kept for kept, _ in parts]))
    assert torch.allclose(whole[1], torch.cat([new for _, new in parts]), rtol=1e-6, atol=0)


def test_of_equal_patterns_the_first_weights_go() -> None:
    weight, hessian = torch.ones(2, 8), torch.eye(8)
    mask = select_nm(torch.arange(8.0).flip(0).expand(2, 8), 2, 4)
    kept, _ = descend(weight, weight, mask, hessian, 4, 1, DAMPING, False)
    assert kept.tolist() == [[False, False, True, True] * 2] * 2


def test_what_is_given_stays_as_it_was() -> None:
    weight, hessian = problem(4, 16)
    mask, start = started(weight, hessian, 2, 4, True)
    before = [x.clone() for x in (weight, start, mask, hessian, hessian.double())]
    exact = hessian.double()
    descend(weight, start, mask, exact, 4, 2, DAMPING, True)
    assert all(torch.equal(x, y) for x, y in zip(before, (weight, start, mask, hessian, exact), strict=True))


def test_patterns_that_can_be_tried() -> None:
    assert fits(2, 4) and fits(4, 8) and not fits(5, 10) and fits(1, 16) and not fits(8, 16)


def test_what_descent_cannot_do_is_refused() -> None:
    from megatron_prune.decision.target import NM, Unstructured
    from megatron_prune.errors import UserError
    from megatron_prune.methods.base import get_method
    from megatron_prune.model.families import family_of
    from tests.models import TINY_SIZES

    found = {"model_type": "llama", "rms_norm_eps": 1e-6, **TINY_SIZES["llama"]}
    config = family_of(found).from_hf(found)
    odd = family_of(found).from_hf(found | {"intermediate_size": 66})
    method = get_method("sparsegpt", descent_passes=2)
    method.check(config, NM(4, 8))
    method.check(config, Unstructured(0.5))
    get_method("sparsegpt").check(odd, Unstructured(0.5))
    for model, target, said in (
        (config, NM(8, 16), "8:16 has 12870 patterns; allowed: at most 70"),
        (odd, Unstructured(0.5), "has 66 inputs; allowed: multiples of 4"),
    ):
        with pytest.raises(UserError, match=said):
            method.check(model, target)
    with pytest.raises(UserError, match="descent_passes -1 was given; allowed: 0 or more"):
        get_method("sparsegpt", descent_passes=-1)
