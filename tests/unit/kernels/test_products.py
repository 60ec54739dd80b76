"""Products by oneDNN: those of torch, and only where nothing is differentiated. Those of narrow types: in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from megatron_prune import backend
from megatron_prune.__main__ import main
from megatron_prune.data.requests import Request
from megatron_prune.evaluation.likelihood import TransformersScorer
from megatron_prune.kernels import products
from tests.models import byte_tokenizer, tiny_llama

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


# Types that the processor lacks


NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
WIDENING = pytest.mark.skipif(
    not hasattr(torch.library, "get_kernel"), reason="torch before 2.9: products stay its own"
)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products of bfloat16 and float16."""
    monkeypatch.setattr(products, "lacking", lambda: frozenset((torch.bfloat16, torch.float16)))


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def linear_with_bias(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w, w[:, 0])


def batches(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x, w.t().expand(len(x), -1, -1))


def added_batches(x: Tensor, w: Tensor) -> Tensor:
    return torch.baddbmm(x[..., :1].expand(-1, -1, len(w)), x, w.t().expand(len(x), -1, -1), beta=0.5, alpha=2.0)


def causal(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)


def masked(x: Tensor, w: Tensor) -> Tensor:
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(-2)
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=seen)


@WIDENING
@NARROW
@pytest.mark.parametrize(
    ("function", "bound"),
    [(linear, 0.5), (linear_with_bias, 0.5), (batches, 0.5), (added_batches, 0.5), (causal, 1.5), (masked, 1.5)],
)
@pytest.mark.usefixtures("lacking")
def test_narrow_products_and_gradients_are_sums_in_float32(
    function: Callable[..., Tensor], bound: float, dtype: torch.dtype
) -> None:
    """As those in float64, but for the rounding of each result to its type; `bound` in its epsilons.

    Attention's gradients begin with its rounded output. With its sums rounded, too, they are off by 1.8 or more.
    """
    torch.manual_seed(0)
    x, w = torch.randn(3, 40, 64).to(dtype), torch.randn(48, 64).to(dtype)

    def found(kind: torch.dtype) -> list[Tensor]:
        given = [value.to(kind, copy=True).requires_grad_() for value in (x, w)]
        result = function(*given)
        asked = [value for value in given if function not in (causal, masked) or value is given[0]]
        return [result, *torch.autograd.grad(result.float().square().sum(), asked)]

    with products.wide_products():
        narrow = found(dtype)
    wide = found(torch.float64)
    assert all(value.dtype == dtype for value in narrow)
    for one, other in zip(narrow, wide, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < bound * torch.finfo(dtype).eps, error


@WIDENING
@pytest.mark.usefixtures("lacking")
def test_other_types_are_torchs_own_and_afterwards_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    widening = products._widening

    def counted(*how: Any) -> Any:
        inner = widening(*how)

        def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
            made.append(args[0].dtype)
            return inner(keys, *args, **kwargs)

        return call

    monkeypatch.setattr(products, "_widening", counted)
    for dtype in (torch.float32, torch.float64, torch.int64):
        x = torch.arange(24).reshape(4, 6).to(dtype)
        before = x @ x.t()
        with products.wide_products():
            assert torch.equal(x @ x.t(), before)
    assert made == [torch.float32, torch.float64, torch.int64]
    x = torch.randn(4, 6).bfloat16()
    with pytest.raises(RuntimeError, match="stops"), products.wide_products():
        with products.wide_products():  # once is enough
            assert (x @ x.t()).dtype == torch.bfloat16
        x @ x.t()
        raise RuntimeError("stops")
    assert made[3:] == [torch.bfloat16] * 2
    x @ x.t()
    assert len(made) == 5
    with products.wide_products():
        x @ x.t()
    assert len(made) == 6


@WIDENING
@pytest.mark.usefixtures("lacking")
def test_operands_of_two_types_are_refused_as_ever() -> None:
    with products.wide_products(), pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(torch.randn(3, 4).bfloat16(), torch.randn(4, 5))


@WIDENING
@pytest.mark.usefixtures("lacking")
def test_an_operator_that_this_torch_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PRODUCTS", ("mm", "of_another_torch"))
    x = torch.randn(4, 6).bfloat16()
    with products.wide_products():
        torch.testing.assert_close((x @ x.t()).double(), x.double() @ x.double().t(), atol=0.05, rtol=0.01)


def test_a_processor_that_has_them_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "lacking", frozenset)
    monkeypatch.setattr(torch.library, "Library", lambda *_: pytest.fail("operators were replaced"))
    with products.wide_products():
        pass


@WIDENING
def test_what_is_lacking_is_told_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in ((True, True), (True, False), (False, False)):
        for name, answer in zip(("bf16", "fp16"), supported, strict=True):
            monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda answer=answer: answer)
        types = (torch.bfloat16, torch.float16)
        assert products.lacking() == {dtype for dtype, has in zip(types, supported, strict=True) if not has}
    monkeypatch.delattr(torch.library, "get_kernel")
    assert products.lacking() == frozenset()


@WIDENING
@pytest.mark.usefixtures("lacking")
def test_verbs_have_them() -> None:
    with backend.running(backend.Layout()):
        assert products._widened
    assert not products._widened


@WIDENING
@pytest.mark.usefixtures("lacking")
def test_transformers_models_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In perplexities and in the answers to tasks, where there are no process groups."""
    made: list[str] = []
    widening = products._widening

    def named(kernel: Any, dtypes: Any, name: str) -> Any:
        inner = widening(kernel, dtypes, name)
        return lambda keys, *args, **kwargs: (made.append(name), inner(keys, *args, **kwargs))[1]

    monkeypatch.setattr(products, "_widening", named)
    model = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257, dtype=torch.bfloat16))
    (tmp_path / "text.txt").write_text("words of a text that is long enough for two windows of sixteen bytes")
    asked = ["--text", str(tmp_path / "text.txt"), "--window", "16", "--windows", "2"]
    assert main(["evaluate", "--input", str(model), *asked, "--output", str(tmp_path / "out.json")]) == 0
    assert {"mm", products.ATTENTION} <= set(made) and not products._widened
    made.clear()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    TransformersScorer(loaded, 64, 64).score([Request([1, 2, 3], [4, 5])])
    assert "mm" in made and not products._widened
