"""Finding methods, and the counting that Hugging Face matrices need."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.decision.target import NM, Budget, Unstructured
from megatron_prune.errors import UserError
from megatron_prune.methods.base import finite, get_method, methods, select_blocks
from megatron_prune.methods.maskllm import MaskLLM
from megatron_prune.methods.sparsegpt import SparseGPT


def test_listing_describes_every_method() -> None:
    listed = {info.name: info for info in methods()}
    assert {"magnitude", "wanda", "sparsegpt", "maskllm"} <= set(listed)
    for info in listed.values():
        assert "arXiv:" in info.paper
        assert info.targets
        assert all(knob.help for knob in info.hyperparameters)
    assert {knob.name: knob.default for knob in listed["sparsegpt"].hyperparameters} == {
        "update_weights": True,
        "percdamp": 0.01,
        "block_size": 128,
        "descent_passes": 0,
        "true_sequential": False,
    }


def test_get_method_sets_hyperparameters() -> None:
    assert get_method("sparsegpt", percdamp=0.1) == SparseGPT(percdamp=0.1)


def test_nearest_method_and_hyperparameter_are_named() -> None:
    with pytest.raises(UserError, match="unknown method 'sparsegtp' .did you mean 'sparsegpt'"):
        get_method("sparsegtp")
    with pytest.raises(UserError, match="no hyper-parameter 'perc_damp' .did you mean 'percdamp'"):
        get_method("sparsegpt", perc_damp=0.1)
    with pytest.raises(UserError, match="it has: none"):
        get_method("wanda", percdamp=0.1)


def test_bounds_of_hyper_parameters_are_where_they_are_said_to_be() -> None:
    assert SparseGPT(percdamp=1e6, block_size=1).block_size == 1
    for wrong in (0.0, float("inf")):
        with pytest.raises(UserError, match="percdamp"):
            SparseGPT(percdamp=wrong)


@pytest.mark.parametrize("wrong", [{"percdamp": -0.1}, {"percdamp": float("nan")}, {"block_size": 0}])
def test_hyperparameter_ranges(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="allowed"):
        get_method("sparsegpt", **wrong)


def test_unsupported_target() -> None:
    with pytest.raises(UserError, match="maskllm cannot prune to 0.5; it supports N:M"):
        MaskLLM().accept(Unstructured(0.5))


def test_finite_names_the_layer() -> None:
    with pytest.raises(UserError, match="weights of layer.7 hold NaN or infinity"):
        finite("layer.7", torch.tensor([1.0, float("nan")]), "weights")


def test_blocks_are_counted_apart_in_their_own_row_order() -> None:
    """Two interleaved matrices: each keeps its own half, and equal scores go by its own row order."""
    score = torch.ones(4, 2)
    score[1::2] *= 9
    mask = select_blocks(score, {"a": torch.tensor([2, 0]), "b": torch.tensor([1, 3])}, lambda rows: rows)
    assert mask.tolist() == [[True] * 2, [False] * 2, [False] * 2, [True] * 2]


def test_a_mask_is_learned_for_up_to_eight_inputs() -> None:
    """Of 16 inputs 8 can stay in 12,870 ways; those in one shot need no logit for each."""
    for n, m in ((1, 2), (4, 8), (7, 8)):
        MaskLLM().accept(NM(n, m))
    with pytest.raises(UserError) as caught:
        MaskLLM().accept(NM(8, 16))
    assert str(caught.value) == (
        "pattern 8:16 has 12870 choices in each group, and a learned mask a logit for each; allowed: M up to 8, or a "
        "method in one shot: magnitude, sparsegpt, wanda"
    )
    for name in ("magnitude", "sparsegpt", "wanda"):
        get_method(name).accept(NM(8, 16))


def test_budgets_are_of_what_a_method_counts() -> None:
    for measure in ("parameters", "forward_flops", "kv_cache_bytes"):
        get_method("minitron").accept(Budget(10, measure))
    with pytest.raises(UserError, match="minitron cannot prune to latency_us=10; its budgets may limit parameters"):
        get_method("minitron").accept(Budget(10, "latency_us"))
    get_method("darwinlm").accept(Budget(10, "latency_us"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_anywhere(wrong: float) -> None:
    plain = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert finite("x", plain, "weights") is plain
    for place in range(15):
        damaged = plain.clone()
        damaged.view(-1)[place] = wrong
        with pytest.raises(UserError, match="weights of x hold NaN"):
            finite("x", damaged, "weights")


def test_a_rank_may_have_no_rows() -> None:
    nothing = torch.empty(0, 4)
    assert finite("x", nothing, "weights") is nothing


def test_of_each_matrix_its_own_share_stays() -> None:
    """Counted by its own height: all but one in the first, one in the second, whatever the other's scores are."""
    score = torch.tensor([[5.0, 6.0], [1.0, 2.0], [7.0, 9.0]])
    mask = select_blocks(score, {"a": torch.tensor([0, 2]), "b": torch.tensor([1])}, lambda rows: 2 * rows - 1)
    assert mask.tolist() == [[False, True], [False, True], [True, True]]
