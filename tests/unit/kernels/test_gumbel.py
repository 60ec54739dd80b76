"""Learnable N:M masks: maths against autograd, C and Triton against PyTorch, sharding, and decoding.

Triton's kernels run on a GPU where there is one, otherwise in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.device import has_cuda
from megatron_prune.kernels import compiled, gumbel
from megatron_prune.kernels.compiled import load_library
from megatron_prune.kernels.gumbel import Draw, Position
from megatron_prune.kernels.philox import gumbel_from_bits, gumbel_noise

needs_compiled = pytest.mark.skipif(load_library(gumbel.SOURCE) is None, reason="no C compiler on this machine")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the triton package is not installed (pip install triton)"
)
GPU = "cuda" if has_cuda() else "cpu"
FAST = [pytest.param("cpu", marks=needs_compiled), pytest.param("triton", marks=needs_triton)]
TARGETS = [(2, 4), (1, 4), (4, 8), (1, 2), (3, 4), (2, 3)]
DRAW = Draw(seed=1234, step=5, microbatch=6, tensor_id=7)
SETTINGS: dict[str, Any] = {"scale": 2.0, "temperature": 0.7, "draw": DRAW}


@pytest.fixture(params=["eager", *FAST])
def implementation(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=FAST)
def fast(request: pytest.FixtureRequest) -> Any:
    """The implementations that are compared with the PyTorch one."""
    return request.param


def on_device(implementation: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors where an implementation takes them."""
    return [tensor.to(GPU if implementation == "triton" else "cpu") for tensor in tensors]


def example(
    n: int, m: int, rows: int = 5, groups: int = 37, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [rows, groups * m], logits [rows, groups, patterns], gradient of the output)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, groups, len(gumbel.patterns(n, m)), generator=generator)
    weight, grad = (torch.randn(rows, groups * m, generator=generator) for _ in range(2))
    return weight.to(dtype), logits.to(dtype), grad.to(dtype)


def evaluate(
    weight: Tensor, logits: Tensor, grad: Tensor, n: int, m: int, learn_weight: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, gradient of the logits, gradient of the weight or None) of one call at the whole position."""
    weight, logits, grad = on_device(options.get("implementation", "eager"), weight, logits, grad)
    weight, logits = weight.clone().requires_grad_(learn_weight), logits.clone().requires_grad_()
    position = Position.whole(*logits.shape[:2])
    output = gumbel.masked_weight(weight, logits, n=n, m=m, **{**SETTINGS, "position": position, **options})
    output.backward(grad)
    assert logits.grad is not None
    return output.detach().cpu(), logits.grad.cpu(), None if weight.grad is None else weight.grad.cpu()


def formula(
    weight: Tensor,
    logits: Tensor,
    n: int,
    m: int,
    scale: float,
    temperature: float,
    draw: Draw | None,
    hard: bool = False,
) -> Tensor:
    """The definition, in plain differentiable PyTorch."""
    noisy = scale * logits
    if draw is not None:
        groups = torch.arange(logits[..., 0].numel()).view(logits.shape[:2])
        noisy = noisy + gumbel_noise(groups, logits.shape[-1], draw.key())
    table = gumbel.patterns(n, m).to(logits.dtype)
    mask = (noisy / temperature).softmax(-1) @ table
    if hard:
        mask = table[noisy.argmax(-1)] + mask - mask.detach()
    return weight * mask.flatten(1)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("n", "m"), TARGETS)
def test_agrees_with_autograd_of_the_definition(n: int, m: int, hard: bool, implementation: Any) -> None:
    """Output and both gradients; hard: the logits' gradient is that of the soft mask."""
    weight, logits, grad = example(n, m)
    output, grad_logits, grad_weight = evaluate(
        weight, logits, grad, n, m, learn_weight=True, hard=hard, implementation=implementation
    )
    weight.requires_grad_(), logits.requires_grad_()
    expected = formula(weight, logits, n, m, hard=hard, **SETTINGS)
    expected.backward(grad)
    torch.testing.assert_close(output, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_logits, logits.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_weight, weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_regularizer_is_the_gradient_of_its_formula(hard: bool, implementation: Any) -> None:
    weight, logits, grad = example(2, 4)
    _, grad_logits, _ = evaluate(
        weight, logits, grad, 2, 4, regularization=0.3, hard=hard, implementation=implementation
    )
    logits.requires_grad_()
    output = formula(weight, logits, 2, 4, hard=hard, **SETTINGS)
    ((output * grad).sum() - 0.3 * output.square().sum()).backward()
    torch.testing.assert_close(grad_logits, logits.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("draw", [None, DRAW])
def test_gradcheck_in_double(draw: Draw | None) -> None:
    weight, logits, _ = (tensor.double().requires_grad_() for tensor in example(2, 4, 2, 3))
    position = Position.whole(2, 3)

    def call(w: Tensor, o: Tensor) -> Tensor:
        return gumbel.masked_weight(w, o, n=2, m=4, scale=1.5, temperature=0.9, draw=draw, position=position)

    assert torch.autograd.gradcheck(call, (weight, logits))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("n", "m"), TARGETS)
def test_fast_equals_eager(n: int, m: int, hard: bool, fast: Any) -> None:
    tensors = example(n, m)
    options: dict[str, Any] = {"hard": hard, "regularization": 0.1, "learn_weight": True}
    eager = evaluate(*tensors, n, m, implementation="eager", **options)
    ours = evaluate(*tensors, n, m, implementation=fast, **options)
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)


def test_fast_agrees_with_double(fast: Any) -> None:
    """Against the fp64 path, which gradcheck above proves."""
    tensors = example(2, 4)
    options: dict[str, Any] = {"regularization": 0.1, "learn_weight": True}
    double = evaluate(*(tensor.double() for tensor in tensors), 2, 4, implementation="eager", **options)
    ours = evaluate(*tensors, 2, 4, implementation=fast, **options)
    for value, reference in zip(ours, double, strict=True):
        assert value is not None and reference is not None
        torch.testing.assert_close(value.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_hard_samples_are_the_same_bit_for_bit(n: int, m: int, fast: Any) -> None:
    tensors = example(n, m)
    options: dict[str, Any] = {"hard": True, "scale": 0.1}  # so that the noise decides
    eager = evaluate(*tensors, n, m, implementation="eager", **options)[0]
    assert torch.equal(evaluate(*tensors, n, m, implementation=fast, **options)[0], eager)
    assert not torch.equal(eager, evaluate(*tensors, n, m, implementation="eager", **options | {"draw": None})[0])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_fast_equals_eager_in_bf16(weight_dtype: torch.dtype, logits_dtype: torch.dtype, fast: Any) -> None:
    """Both compute in fp32 and round once: at most one bf16 step apart."""
    weight, logits, grad = example(2, 4)
    tensors = weight.to(weight_dtype), logits.to(logits_dtype), grad.to(weight_dtype)
    eager = evaluate(*tensors, 2, 4, implementation="eager", learn_weight=True)
    compared = evaluate(*tensors, 2, 4, implementation=fast, learn_weight=True)
    assert [t.dtype for t in compared if t is not None] == [weight_dtype, logits_dtype, weight_dtype]
    for ours, reference in zip(compared, eager, strict=True):
        assert ours is not None and reference is not None
        tolerance = 2.0**-7 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=tolerance)
        if ours.dtype == torch.bfloat16 and not (fast == "triton" and GPU == "cpu"):  # the interpreter cuts off
            assert (ours == reference).float().mean() > 0.99


def test_late_schedule_stays_finite_and_close(fast: Any) -> None:
    """Scale 500 and temperature 0.05 (the end of training), where exponents reach 10^4."""
    weight, logits, grad = example(2, 4)
    options: dict[str, Any] = {"scale": 500.0, "temperature": 0.05}
    eager = evaluate(weight, 0.01 * logits, grad, 2, 4, implementation="eager", **options)
    ours = evaluate(weight, 0.01 * logits, grad, 2, 4, implementation=fast, **options)
    assert ours[1].isfinite().all()
    torch.testing.assert_close(ours[0], eager[0], atol=1e-4, rtol=1e-4)


@needs_triton
def test_tensors_of_more_than_2_31_elements_are_counted_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_prune.kernels import triton_gumbel

    tensors = example(2, 4)
    narrow = evaluate(*tensors, 2, 4, implementation="triton", learn_weight=True)
    monkeypatch.setattr(triton_gumbel, "WIDE_FROM", 0)
    wide = evaluate(*tensors, 2, 4, implementation="triton", learn_weight=True)
    torch.testing.assert_close(wide, narrow, atol=0, rtol=0)


@needs_triton
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_triton_writes_no_further_than_its_tensors(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 185 groups the last program has 57; what lies behind every result stays as it is."""
    tensors = example(n, m)
    expected = evaluate(*tensors, n, m, implementation="eager", learn_weight=True)
    rooms: list[Tensor] = []
    plain = torch.full

    def roomy(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        size = math.prod(shape)
        room = plain((size + 4096,), 7, dtype=dtype, device=device)
        rooms.append(room[size:])
        return room[:size].view(shape)

    def like(x: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return roomy(x.shape, dtype or x.dtype, x.device)

    def fresh(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        return roomy(shape[0] if len(shape) == 1 else shape, dtype, device)

    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(torch, "empty", fresh)
    found = evaluate(*tensors, n, m, implementation="triton", learn_weight=True)
    index = gumbel.winners(*on_device("triton", tensors[1]), "triton")
    monkeypatch.undo()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(index.cpu(), gumbel.winners(tensors[1], "eager"))
    assert len(rooms) >= 5 and all((room == 7).all() for room in rooms)


@needs_triton
@pytest.mark.parametrize(("patterns", "inputs"), [(6, 4), (2, 2), (70, 8)])
def test_32_bits_count_as_long_as_every_place_has_a_number(
    patterns: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last group of the last program, whether it is there or not, times its logits or its inputs."""
    import triton.language as tl

    from megatron_prune.kernels import triton_gumbel

    chosen: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *_, INDEX, num_warps, **more: chosen.append((grid[0], INDEX, 32 * num_warps, more["BLOCK"]))

    monkeypatch.setattr(triton_gumbel.torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    for groups in (1, 128, 129, *(2**31 // (max(patterns, inputs)) + 512 * n for n in range(-4, 5)), 2**31):
        logits = torch.empty(1, groups, patterns, device="meta")
        triton_gumbel._launch(Kernel(), logits, (), triton_gumbel.constants(patterns))
        programs, index, threads, block = chosen[-1]
        assert programs == -(-groups // block) and threads == block
        if programs * block * max(patterns, inputs) > 2**31:
            assert index == tl.int64
        if 2 * programs * block * max(patterns, 8) <= 2**31:
            assert index == tl.int32
    triton_gumbel._launch(Kernel(), torch.empty(1, 0, patterns, device="meta"), (), {})
    assert len(chosen) == 13  # nothing is run on nothing


def test_noise_of_extreme_words_is_the_definition() -> None:
    """Words at both ends and at the seams of the approximation, one by one, in Triton's arithmetic."""
    pytest.importorskip("triton", reason="the triton package is not installed (pip install triton)")
    from tests.unit.kernels.gumbel_of_words import gumbel_of_words

    seams = torch.tensor([3 * 2**30, 2**31, 2**24, 2**25])
    words = torch.cat(
        [torch.arange(256), 2**32 - 1 - torch.arange(256), *(seam + torch.arange(-512, 512) for seam in seams)]
    )
    expected = gumbel_from_bits(words)
    torch.testing.assert_close(gumbel_of_words(words.to(GPU)).cpu(), expected, atol=2e-6, rtol=2e-7)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_shard_draws_the_slice_of_the_whole(n: int, m: int, implementation: Any) -> None:
    """Permuted rows and a column range, as tensor parallelism cuts them: bit for bit the whole's values."""
    weight, logits, grad = example(n, m, rows=11, groups=29)
    whole = evaluate(weight, logits, grad, n, m, implementation=implementation)
    rows, first, last = torch.tensor([7, 0, 3, 10]), 9, 23
    inputs = slice(first * m, last * m)
    shard = evaluate(
        weight[rows, inputs].contiguous(),
        logits[rows, first:last].contiguous(),
        grad[rows, inputs].contiguous(),
        n,
        m,
        position=Position(rows, first, 29),
        implementation=implementation,
    )
    assert torch.equal(shard[0], whole[0][rows, inputs])
    torch.testing.assert_close(shard[1], whole[1][rows, first:last], atol=1e-6, rtol=1e-6)


def test_equal_draws_agree_and_others_differ(implementation: Any) -> None:
    tensors = example(2, 4)
    first, again = (evaluate(*tensors, 2, 4, implementation=implementation)[0] for _ in range(2))
    assert torch.equal(first, again)
    for field in ("seed", "step", "microbatch", "tensor_id"):
        other = evaluate(*tensors, 2, 4, draw=replace(DRAW, **{field: 99}), implementation=implementation)[0]
        assert not torch.equal(first, other), field


def test_row_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = example(2, 4)
    whole = evaluate(*tensors, 2, 4, implementation="eager", learn_weight=True)
    monkeypatch.setitem(gumbel.CHUNK_LOGITS, "cpu", 500)
    torch.testing.assert_close(evaluate(*tensors, 2, 4, implementation="eager", learn_weight=True), whole)


@needs_compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_does_not_change_the_result(threads: int, use_threads: Callable[[int], None]) -> None:
    tensors = example(2, 4)
    reference = evaluate(*tensors, 2, 4, implementation="cpu")
    use_threads(threads)
    result = evaluate(*tensors, 2, 4, implementation="cpu")
    assert torch.equal(result[0], reference[0]) and torch.equal(result[1], reference[1])


def test_saves_only_its_inputs(implementation: Any) -> None:
    weight, logits, _ = on_device(implementation, *example(2, 4))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gumbel.masked_weight(
            weight,
            logits.requires_grad_(),
            n=2,
            m=4,
            position=Position.whole(5, 37),
            implementation=implementation,
            **SETTINGS,
        )
    assert sorted(saved) == sorted((weight.data_ptr(), logits.data_ptr()))


def test_accumulate_into_adds_the_ordinary_gradient(implementation: Any) -> None:
    weight, logits, grad = example(2, 4)
    _, expected, _ = evaluate(weight, logits, grad, 2, 4, regularization=0.1, implementation=implementation)
    weight, logits, grad, expected = on_device(implementation, weight, logits, grad, expected)
    accumulator, leaf = torch.ones_like(logits), logits.clone().requires_grad_()
    seen: list[Any] = []
    hook = leaf.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad))
    for stand_in in (False, True):
        gumbel.masked_weight(
            weight,
            leaf,
            n=2,
            m=4,
            position=Position.whole(5, 37),
            regularization=0.1,
            accumulate_into=accumulator,
            stand_in=stand_in,
            implementation=implementation,
            **SETTINGS,
        ).backward(grad)
    hook.remove()
    assert seen[-1].shape == leaf.shape, "hooks see a gradient where one is to stand in"
    assert [found for found in seen[:-1] if found is not None] == []
    torch.testing.assert_close(accumulator, 1 + 2 * expected, atol=1e-5, rtol=1e-5)


def test_a_straight_gradient_is_the_incoming_one(implementation: Any) -> None:
    """Of the weight; output and the logits' gradient are as ever."""
    weight, logits, grad = example(2, 4)
    plain, straight = (
        evaluate(weight, logits, grad, 2, 4, learn_weight=True, straight=each, implementation=implementation)
        for each in (False, True)
    )
    assert torch.equal(plain[0], straight[0]) and torch.equal(plain[1], straight[1])
    assert straight[2] is not None and torch.equal(straight[2], grad)
    assert plain[2] is not None and not torch.equal(plain[2], grad)
    frozen = evaluate(weight, logits, grad, 2, 4, straight=True, implementation=implementation)
    assert frozen[2] is None


def test_frozen_weight_gets_no_gradient_and_frozen_logits_none(implementation: Any) -> None:
    weight, logits, grad = example(2, 4)
    assert evaluate(weight, logits, grad, 2, 4, implementation=implementation)[2] is None
    weight, logits, grad = on_device(implementation, weight, logits, grad)
    weight.requires_grad_()
    options: dict[str, Any] = {
        "n": 2,
        "m": 4,
        "position": Position.whole(5, 37),
        "implementation": implementation,
    }
    gumbel.masked_weight(weight, logits, **options, **SETTINGS).backward(grad)
    assert weight.grad is not None and logits.grad is None


def test_without_noise_and_at_low_temperature_the_mask_is_the_decoded_one(implementation: Any) -> None:
    weight, logits, grad = example(2, 4)
    options: dict[str, Any] = {
        "draw": None,
        "scale": 1e3,
        "temperature": 1e-3,
        "implementation": implementation,
    }
    output, _, _ = evaluate(weight, logits, grad, 2, 4, **options)
    torch.testing.assert_close(output, weight * gumbel.decode(logits, 2, 4))


def test_statistics_are_those_of_the_definition(implementation: Any) -> None:
    _, logits, _ = example(2, 4)
    where = on_device(implementation, logits)
    index, sums = gumbel.statistics(*where, scale=2.0, temperature=0.7, implementation=implementation)
    probabilities = (2.0 * logits / 0.7).softmax(-1)
    assert torch.equal(index.cpu().long(), probabilities.argmax(-1))
    best, entropy = sums.tolist()
    assert best == pytest.approx(probabilities.amax(-1).sum().item(), rel=1e-5)
    assert entropy == pytest.approx(torch.distributions.Categorical(probabilities).entropy().sum().item(), rel=1e-5)


def test_entropy_of_decided_groups_is_zero(implementation: Any) -> None:
    logits = torch.tensor([[[1.0, 0, 0, 0, 0, -1], [0, 0, 0, 0, 0, 0]]])
    _, sums = gumbel.statistics(
        *on_device(implementation, logits), scale=2000.0, temperature=1.0, implementation=implementation
    )
    assert sums.tolist() == pytest.approx([1 + 1 / 6, math.log(6)], rel=1e-5)


@pytest.mark.parametrize(("n", "m"), TARGETS)
def test_decode_and_pattern_index_round_trip(n: int, m: int) -> None:
    _, logits, _ = example(n, m)
    mask = gumbel.decode(logits, n, m)
    assert mask.dtype == torch.bool and (mask.unflatten(1, (-1, m)).sum(-1) == n).all()
    assert torch.equal(gumbel.pattern_index(mask, n, m), gumbel.winners(logits))


def test_ties_go_to_the_lowest_pattern(implementation: Any) -> None:
    logits = torch.tensor([[[0.0, 0, 0, 0, 0, 0], [0, 3, 1, 3, 3, 0], [-1, -1, -1, -1, -1, 2]]])
    assert gumbel.winners(*on_device(implementation, logits), implementation).tolist() == [[0, 1, 5]]
    weight = torch.ones(1, 12)
    hard = evaluate(weight, logits, weight, 2, 4, draw=None, hard=True, implementation=implementation)[0]
    assert hard.tolist() == [[1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_winners_agree(dtype: torch.dtype, fast: Any) -> None:
    """Bit for bit; bf16 logits bring ties."""
    _, logits, _ = example(4, 8, dtype=dtype)
    assert torch.equal(gumbel.winners(*on_device(fast, logits), fast).cpu(), gumbel.winners(logits, "eager"))


def test_pattern_index_refuses_other_masks() -> None:
    mask = torch.tensor([[True, True, False, False, True, False, False, False]])
    with pytest.raises(ValueError, match="not 2:4: 1 of 2 groups"):
        gumbel.pattern_index(mask, 2, 4)
    with pytest.raises(ValueError, match="multiple of 4"):
        gumbel.pattern_index(mask[:, :6], 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 1}, "expected \\[out, in\\]"),
        ({"n": 5}, "allowed are 1 <= N <= M"),
        ({"temperature": 0.0}, "must be positive"),
        ({"position": Position.whole(4, 37)}, "row ids for 5 rows"),
        ({"position": Position(torch.arange(5), 1, 37)}, "outside a row"),
        ({"accumulate_into": torch.zeros(5, 37, 5)}, "contiguous fp32"),
        ({"implementation": "gpu"}, "allowed are auto, eager, cpu, triton"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    weight, logits, _ = example(2, 4)
    arguments = {"n": 2, "m": 4, "position": Position.whole(5, 37), **SETTINGS, **change}
    with pytest.raises(ValueError, match=message):
        gumbel.masked_weight(weight, logits, **arguments)


def test_noncontiguous_inputs_are_refused_and_outgoing_gradients_are_not() -> None:
    weight, logits, _ = example(2, 4)
    output, _, _ = evaluate(weight, logits, torch.ones(1, 1).expand(5, 148), 2, 4)
    assert output.shape == (5, 148)
    with pytest.raises(ValueError, match="contiguous"):
        evaluate(weight.T.contiguous().T, logits, weight, 2, 4)


def fake(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """What the choice of an implementation looks at in a tensor."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, is_cpu=device == "cpu")


@needs_triton
def test_gpu_tensors_go_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gumbel._choose("auto", fake("cuda")) == "triton"
    assert gumbel._choose("auto", fake("cuda", torch.float64)) == "eager"
    assert gumbel._choose("auto", fake("cpu")) != "triton"
    monkeypatch.setenv("MEGATRON_PRUNE_COMPILED", "0")
    assert gumbel._choose("auto", fake("cuda")) == "eager"
    with pytest.raises(ValueError, match="MEGATRON_PRUNE_COMPILED not 0"):
        gumbel._choose("triton", fake("cuda"))


def test_without_triton_a_gpu_falls_back_loudly_and_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    compiled._load_triton.cache_clear()
    try:
        assert [gumbel._choose("auto", fake("cuda")) for _ in range(3)] == ["eager"] * 3
    finally:
        compiled._load_triton.cache_clear()
    assert [str(warning.message) for warning in recwarn if "triton package is not installed" in str(warning.message)]
    assert len(recwarn) == 1


@needs_triton
def test_kernels_compile_for_a_gpu() -> None:
    """For NVIDIA's compute capability 9.0, by Triton's compiler, which needs no GPU; the interpreter skips all that.

    2:4, and 4:8, whose 70 choices unrolled would take longer than this waits.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_for_gpu.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["forward", "backward", "winners"] * 2 + ["inside", "inside", "behind"]
