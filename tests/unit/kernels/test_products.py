"""Products by oneDNN: those of torch, and only where nothing is differentiated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from megatron_prune.kernels import products

pytestmark = pytest.mark.skipif(not products.known(), reason="this torch has no product by oneDNN")
OURS = "mkldnn::_linear_pointwise"


def operators(function: object, *args: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
    """What a function gives while products are oneDNN's, and the names of the operators that it used."""
    with products._OneDNN(), profile(activities=[ProfilerActivity.CPU]) as used:
        found = function(*args)  # type: ignore[operator]
    return found, {event.key for event in used.key_averages()}


def matmul(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As megatron-core multiplies."""
    return torch.matmul(inputs, weight.t())


@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 24), (1, 1, 24)])
def test_products_are_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(shape), torch.randn(40, 24), torch.randn(40)
    turned = inputs.transpose(0, 1).contiguous().transpose(0, 1)  # rows that do not lie one after the other
    with torch.no_grad():
        for given in (inputs, turned):
            for function, args in ((F.linear, (weight,)), (F.linear, (weight, bias)), (matmul, (weight,))):
                found, used = operators(function, given, *args)
                assert OURS in used
                wide = function(given.double(), *(x.double() for x in args))
                torch.testing.assert_close(found.double(), wide, atol=1e-5, rtol=0)


def test_what_is_differentiated_is_torchs_own() -> None:
    inputs, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    found, used = operators(F.linear, inputs, weight)
    found.sum().backward()
    assert OURS not in used
    assert weight.grad is not None and torch.allclose(weight.grad, inputs.sum(0).expand(6, 8), atol=1e-5)


@torch.no_grad()
def test_other_products_are_torchs_own() -> None:
    inputs, weight = torch.randn(4, 8), torch.randn(6, 8)
    for given, matrix in (
        (inputs.bfloat16(), weight.bfloat16()),
        (inputs.double(), weight.double()),
        (inputs[0], weight),
        (inputs, torch.randn(8, 6).t()),
    ):
        found, used = operators(F.linear, given, matrix)
        assert OURS not in used and torch.equal(found, F.linear(given, matrix))
    assert OURS not in operators(torch.matmul, torch.randn(2, 3, 4), torch.randn(2, 4, 3))[1]


def test_torchs_own_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert products.available()
    with monkeypatch.context() as changed:
        changed.setattr(torch.backends.mkldnn, "enabled", False)
        assert not products.available()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not products.available()


def test_they_are_used_where_they_are_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = torch.randn(4, 8), torch.randn(6, 8)
    for able in (True, False):
        monkeypatch.setattr(products, "available", lambda able=able: able)
        with torch.no_grad(), products.fast_products(), profile(activities=[ProfilerActivity.CPU]) as used:
            F.linear(inputs, weight)
        assert (OURS in {event.key for event in used.key_averages()}) == able


@torch.no_grad()
def test_named_arguments_and_other_functions_are_torchs_own() -> None:
    inputs, weight, bias = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    found, used = operators(lambda x, w: F.linear(x, w, bias=bias), inputs, weight)
    assert OURS not in used
    torch.testing.assert_close(found, inputs @ weight.t() + bias, atol=1e-5, rtol=0)
    found, used = operators(lambda x, y: torch.add(x, y, alpha=2), inputs, inputs)
    assert OURS not in used and torch.equal(found, inputs + 2 * inputs)
