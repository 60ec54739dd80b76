"""Magnitude, Wanda and SparseGPT end to end on plain matrices, whole and with rows shared between ranks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.kernels import second_order
from megatron_prune.kernels.selection import pruned_count
from megatron_prune.methods.base import PruningMethod
from megatron_prune.methods.magnitude import Magnitude
from megatron_prune.methods.scores import wanda_score
from megatron_prune.methods.sparsegpt import SparseGPT
from megatron_prune.methods.wanda import Wanda
from tests.unit.methods.cluster import Cluster

METHODS = [Magnitude(), Wanda(), SparseGPT(), SparseGPT(update_weights=False, block_size=20)]
TARGETS = ["2:4", "1:4", "4:8", "0.5", "0.37"]
IN, HIDDEN, OUT = 48, 40, 22


@cache
def model() -> tuple[dict[str, Tensor], list[Tensor], dict[str, dict[str, Tensor]]]:
    """A fused, interleaved first matrix and a plain second one; quantised, so that scores tie."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.eye(IN) + torch.randn(IN, IN, generator=generator) / IN**0.5
    weights = {
        "fused": torch.randn(HIDDEN, IN, generator=generator) / IN**0.5,
        "plain": torch.randn(OUT, HIDDEN, generator=generator) / HIDDEN**0.5,
    }
    weights = {name: torch.round(weight * 64) / 64 for name, weight in weights.items()}
    rows = torch.arange(HIDDEN)
    blocks = {"fused": {"q": rows[rows % 4 != 3], "k": rows[rows % 4 == 3]}}
    windows = [torch.randn(64, IN, generator=generator) @ mix for _ in range(4)]
    return weights, windows, blocks


def cluster(ranks: int = 1) -> Cluster:
    weights, windows, blocks = model()
    return Cluster(weights, windows, ranks, blocks)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_ranks_do_not_change_the_decision(method: PruningMethod, target: str) -> None:
    """Three ranks with unequal shares: masks and weights bit-equal to one rank's."""
    if isinstance(method, SparseGPT) and second_order._compiled() is None:
        pytest.skip("only the compiled solver is bit-equal whatever the rows")
    whole, shared = cluster(1).prune(method, target), cluster(3).prune(method, target)
    for name, mask in whole.masks.items():
        assert shared.masks[name].equal(mask)
        assert shared.weights[name].equal(whole.weights[name])


def test_magnitudes_are_not_squared() -> None:
    """Whose squares all vanish in float32."""
    tiny = torch.tensor([[1e-30, -3e-30, 2e-30, 0.5e-30]])
    found = Cluster({"plain": tiny}, [torch.ones(1, 4)], 1, {}).prune(Magnitude(), "2:4")
    assert found.masks["plain"].tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_patterns_and_counts_are_exact(method: PruningMethod) -> None:
    for n, m in ((2, 4), (1, 4), (4, 8), (5, 8)):
        for mask in cluster().prune(method, f"{n}:{m}").masks.values():
            assert (mask.view(-1, m).sum(dim=1) == n).all()
    pruned = cluster().prune(method, "0.37")
    for name, mask in pruned.masks.items():
        for rows in pruned.blocks.get(name, {name: torch.arange(len(mask))}).values():
            counts = (~mask[rows]).sum(dim=1)
            if isinstance(method, Wanda):
                assert (counts == pruned_count(mask.shape[1], 0.37)).all()
            else:
                assert counts.sum() == pruned_count(mask[rows].numel(), 0.37)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_only_the_update_changes_kept_weights(method: PruningMethod) -> None:
    before, after = cluster(), cluster().prune(method, "2:4")
    changed = any(not after.weights[n].equal(before.weights[n] * after.masks[n]) for n in after.masks)
    assert changed == (isinstance(method, SparseGPT) and method.update_weights)


def test_magnitude_keeps_the_largest_and_of_ties_the_highest_index() -> None:
    weight = torch.tensor([[1.0, -5.0, 3.0, 2.0], [2.0, 2.0, -2.0, 2.0]])
    masks = Cluster({"w": weight}, []).prune(Magnitude(), "2:4").masks
    assert masks["w"].int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    masks = Cluster({"w": weight}, []).prune(Magnitude(), "1:4").masks
    assert masks["w"].int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    masks = Cluster({"w": weight}, []).prune(Magnitude(), {"sparsity": 0.5}).masks
    assert masks["w"].int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_magnitude_counts_fused_matrices_apart() -> None:
    """A matrix of large weights fused with one of small weights: each loses half."""
    weight = torch.arange(1.0, 33.0).view(4, 8)
    blocks = {"w": {"small": torch.tensor([0, 1]), "large": torch.tensor([2, 3])}}
    mask = Cluster({"w": weight}, [], blocks=blocks).prune(Magnitude(), 0.5).masks["w"]
    assert mask.sum(dim=1).tolist() == [0, 8, 0, 8]


def test_wanda_follows_the_norm_of_its_inputs() -> None:
    """The smaller weight wins when its input is larger, and loses when that input is turned down."""
    weight = torch.tensor([[3.0, 1.0]])
    assert wanda_score(weight, torch.tensor([1.0, 4.0])).tolist() == [[3.0, 4.0]]
    for gain, kept in ((4.0, [[0, 1]]), (2.0, [[1, 0]])):
        x = torch.tensor([[1.0, gain], [-1.0, gain]])
        assert Cluster({"w": weight}, [x]).prune(Wanda(), "1:2").masks["w"].int().tolist() == kept


def test_wanda_uses_all_windows() -> None:
    """Norms add over windows as squares: 3 and 4 in two windows make 5, more than 4.9 in one."""
    windows = [torch.tensor([[3.0, 4.9]]), torch.tensor([[4.0, 0.0]])]
    masks = Cluster({"w": torch.ones(1, 2)}, windows).prune(Wanda(), "1:2").masks
    assert masks["w"].int().tolist() == [[1, 0]]


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
def test_later_layers_see_earlier_ones_pruned(method: PruningMethod) -> None:
    """The second decision is that of a model whose first layer was pruned beforehand, not that of a dense one."""
    pruned = cluster().prune(method, "1:4")
    weights, windows, blocks = model()

    def second_alone(first: Tensor) -> Tensor:
        hidden = [torch.tanh(x @ first.t()) for x in windows]
        return Cluster({"plain": weights["plain"]}, hidden).prune(method, "1:4").masks["plain"]

    assert pruned.masks["plain"].equal(second_alone(pruned.weights["fused"]))
    assert not pruned.masks["plain"].equal(second_alone(weights["fused"]))


def test_output_error_of_the_methods_is_in_the_expected_order() -> None:
    weights, windows, _ = model()
    x, dense = torch.cat(windows), weights["fused"]

    def error(method: PruningMethod) -> float:
        new = cluster().prune(method, "2:4").weights["fused"]
        return float(((new - dense) @ x.t()).square().sum())

    updated, masked, wanda, magnitude = map(error, (SparseGPT(), SparseGPT(update_weights=False), Wanda(), Magnitude()))
    assert updated < masked < magnitude
    assert updated < wanda < magnitude


def test_singular_hessian_names_layer_tokens_and_remedy() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match="layer.9 is singular.* 3 calibration tokens.*percdamp"):
        Cluster({"layer.9": weight}, [x]).prune(SparseGPT(percdamp=1e-9), "2:4")
    Cluster({"layer.9": weight}, [x]).prune(SparseGPT(), "2:4")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_numbers_that_are_not_finite_are_refused(method: PruningMethod) -> None:
    weight = torch.ones(2, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(UserError, match="weights of w hold NaN"):
        Cluster({"w": weight}, [torch.ones(2, 4)]).prune(method, "2:4")
    if method.needs:
        with pytest.raises(UserError, match="inputs of w hold NaN"):
            Cluster({"w": torch.ones(2, 4)}, [torch.full((2, 4), float("inf"))]).prune(method, "2:4")
