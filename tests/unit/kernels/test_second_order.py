"""The second-order solver against brute force, its own reference, and itself on fewer rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.device import has_cuda
from megatron_prune.kernels import compiled, second_order
from megatron_prune.kernels.second_order import (
    Factor,
    SingularHessian,
    factorise,
    solve_nm,
    solve_unstructured,
)
from megatron_prune.kernels.selection import select_matrix, select_nm

PATTERNS = [(2, 4, 192), (1, 4, 132), (4, 8, 200), (3, 5, 95), (1, 16, 160), (1, 2, 50)]


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the triton package is not installed (pip install triton)"
)
needs_compiled = pytest.mark.skipif(second_order._compiled() is None, reason="no C compiler on this machine")
FAST = [pytest.param("compiled", marks=needs_compiled), pytest.param("triton", marks=needs_triton)]
GPU = torch.device("cuda" if has_cuda() else "cpu")
"""Triton's kernels run in its interpreter without a GPU (tests/conftest.py)."""


def take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve by this path from here on; Triton's takes tensors of the CPU there and back."""
    if name == "eager":
        monkeypatch.setattr(second_order, "_fast", lambda device: None)
        monkeypatch.setattr(second_order, "_factor_library", lambda: None)
    elif name == "triton":
        monkeypatch.setattr(second_order, "_fast", lambda device: through_triton)


def through_triton(weight: Tensor, mask: Tensor, factor: Factor, *block: int) -> None:
    from megatron_prune.kernels.triton_second_order import sweep

    there = [x.to(GPU) for x in (weight, mask, factor.upper, factor.live)]
    sweep(there[0], there[1], Factor(there[2], there[3]), *block)
    weight.copy_(there[0])
    mask.copy_(there[1])


@pytest.fixture(params=["eager", FAST[0]])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both paths of the CPU."""
    take(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(params=["eager", *FAST])
def any_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on all paths; Triton's interpreter takes its time."""
    take(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(params=FAST)
def fast(request: pytest.FixtureRequest) -> str:
    """The paths that are compared with the reference."""
    return str(request.param)


def problem(rows: int, width: int, tokens: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [rows, width] and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(tokens or 4 * width, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), 2 * x.t() @ x / len(x)


def exact_factor(hessian: Tensor) -> Tensor:
    """The Cholesky factor of the inverse, float64 and upper, by PyTorch."""
    return torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)


def damped(hessian: Tensor) -> Tensor:
    """`hessian` with 0.01 of its mean diagonal added to the diagonal, float64."""
    return hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian))


def output_error(new: Tensor, old: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's outputs, per token."""
    delta = (new - old).double()
    return float(((delta @ hessian.double()) * delta).sum() / 2)


def lower_half(scores: Tensor, first: int) -> Tensor:
    return select_matrix(scores, 0.5)


def fixed(mask: Tensor) -> Callable[[Tensor, int], Tensor]:
    """A selection decided beforehand."""
    return lambda scores, first: mask[:, first : first + scores.shape[1]]


def test_dense_groups_stay_whole_and_make_up_for_the_rest(any_path: str) -> None:
    """Against the solver that is given its mask group by group."""
    weight, hessian = problem(20, 32, seed=1)
    factor = factorise(hessian, 0.01)
    dense = torch.rand(20, 8, generator=torch.Generator().manual_seed(1)).gt(0.6).repeat_interleave(4, 1)
    mask, new = solve_nm(weight, factor, 2, 4, 16, dense)

    def select(scores: Tensor, first: int) -> Tensor:
        lowest = scores.sort(dim=1, stable=True).indices[:, :2]
        return torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False) | dense[:, first : first + 4]

    known, wanted = solve_unstructured(weight, factor, select, 4)
    assert torch.equal(mask, known) and torch.allclose(new, wanted, atol=1e-5)
    assert mask[dense].all() and (mask[~dense].view(-1, 4).sum(1) == 2).all()
    assert not torch.equal(new[dense], weight[dense])


def test_factor_is_the_papers(path: str) -> None:
    """Upper, and U^T U the inverse of the damped Hessian: the Cholesky factor of the inverse, which is unique."""
    _, hessian = problem(1, 40)
    factor = factorise(hessian, 0.01)
    torch.testing.assert_close(factor.upper.double(), exact_factor(damped(hessian)), rtol=1e-5, atol=1e-7)
    assert factor.upper.is_contiguous()
    assert not factor.upper.tril(-1).any()
    assert factor.live.all()


def test_factor_by_halves_is_the_whole_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd halves too; what does not exist is found in any of them."""
    _, hessian = problem(1, 75)
    whole = factorise(hessian, 0.01).upper
    monkeypatch.setattr(second_order, "LEAF", 4)
    for expected in (whole, exact_factor(damped(hessian)).float()):
        torch.testing.assert_close(factorise(hessian, 0.01).upper, expected, rtol=1e-6, atol=1e-7)
    for place in (3, 40, 74):
        broken = hessian.clone()
        broken[place, :place] *= 50
        broken[:place, place] *= 50
        broken[place, place + 1 :] *= 50
        broken[place + 1 :, place] *= 50
        with pytest.raises(SingularHessian):
            factorise(broken, 0.01)


@needs_compiled
@pytest.mark.parametrize("size", [1, 31, 33, 64, 203, 600, 1100])
def test_compiled_factor_is_float64s_and_threads_do_not_matter(size: int) -> None:
    """Every edge of its panels: 1100 halves to more than one depth of them."""
    library = second_order._factor_library()
    assert library is not None
    h = problem(1, size)[1].double() + 0.1 * torch.eye(size)
    found = []
    for threads in (1, 2, 5):
        u = h.masked_fill(torch.ones(size, size).tril(-1).bool(), float("nan"))  # below the diagonal nobody looks
        space = torch.full((library.second_order_space(size),), float("nan"), dtype=torch.float64)
        assert library.second_order_factor(u.data_ptr(), size, space.data_ptr(), threads)
        found.append(u)
    torch.testing.assert_close(found[0], exact_factor(h), rtol=1e-10, atol=1e-12)
    assert all(u.equal(found[0]) for u in found)


@needs_compiled
def test_working_space_of_the_largest_matrices_is_counted_in_64_bits() -> None:
    """It grows with the width, and nothing is made here."""
    library = second_order._factor_library()
    assert library is not None
    spaces = [library.second_order_space(2**exponent) for exponent in (20, 30, 32)]
    assert spaces[1] / spaces[0] == pytest.approx(2**10, rel=1e-3) and spaces[2] / spaces[1] == pytest.approx(4)
    assert spaces[1] > 2**32


def least_squares(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Each removal, left to right, followed by the exact optimum of all columns on its right (float64)."""
    dense, hessian = weight.double(), hessian.double()
    current = dense.clone()
    for row, keep in zip(current, mask, strict=True):
        origin = row.clone()
        for j in (~keep).nonzero().flatten().tolist():
            row[j] = 0.0
            done, rest = slice(0, j + 1), slice(j + 1, None)
            push = hessian[rest, done] @ (row[done] - origin[done])
            row[rest] = origin[rest] - torch.linalg.solve(hessian[rest, rest], push)
    return current * mask


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([1, 3, 128]))
def test_update_solves_the_least_squares_of_what_remains(seed: int, width: int, block: int) -> None:
    weight, hessian = problem(3, width, seed=seed, tokens=20 * width)
    hessian += 0.01 * torch.eye(width)  # a few seeds give inputs that are nearly dependent
    mask = torch.rand(3, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    _, solved = solve_unstructured(weight, factorise(hessian, 0.0), fixed(mask), block)
    expected = least_squares(weight, mask, hessian).float()
    torch.testing.assert_close(solved, expected, rtol=1e-3, atol=1e-3)


def test_identity_hessian_is_magnitude(path: str) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    factor = factorise(torch.eye(64), 0.01)
    mask, new = solve_nm(weight, factor, 2, 4)
    assert mask.equal(select_nm(weight.abs(), 2, 4))
    assert new.equal(weight * mask)
    mask, new = solve_unstructured(weight, factor, lower_half)
    assert mask.equal(select_matrix(weight.abs(), 0.5))
    assert new.equal(weight * mask)


def test_update_beats_the_mask_alone_and_magnitude(path: str) -> None:
    weight, hessian = problem(16, 128)
    mask, new = solve_nm(weight, factorise(hessian, 0.01), 2, 4)
    magnitude = weight * select_nm(weight.abs(), 2, 4)
    errors = [output_error(w, weight, hessian) for w in (new, weight * mask, magnitude)]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(("n", "m", "width"), PATTERNS)
def test_pattern_is_exact_for_any_block(path: str, n: int, m: int, width: int) -> None:
    """Blocks that do not hold whole groups are rounded up, and the block size changes rounding only."""
    weight, hessian = problem(7, width)
    factor = factorise(hessian, 0.01)
    mask, new = solve_nm(weight, factor, n, m)
    assert (mask.view(-1, m).sum(dim=1) == n).all()
    assert not new[~mask].any()
    other, _ = solve_nm(weight, factor, n, m, block_size=7)
    assert (other == mask).float().mean() > 0.99


@pytest.mark.parametrize(("n", "m", "width"), PATTERNS)
def test_fast_equals_the_reference(n: int, m: int, width: int, fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(16, width)
    compare_paths(fast, monkeypatch, weight, hessian, lambda f: solve_nm(weight, f, n, m))


def test_fast_equals_the_reference_unstructured(fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(20, 203)
    compare_paths(fast, monkeypatch, weight, hessian, lambda f: solve_unstructured(weight, f, lower_half))


def compare_paths(
    fast: str,
    monkeypatch: pytest.MonkeyPatch,
    weight: Tensor,
    hessian: Tensor,
    solve: Callable[[Factor], tuple[Tensor, Tensor]],
) -> None:
    """Masks agree on 99.9% of the entries, the output error to a thousandth, and most weights to rounding."""
    factor = factorise(hessian, 0.01)
    results = []
    for name in (fast, "eager"):
        with monkeypatch.context() as patch:
            take(name, patch)
            results.append(solve(factor))
    (mask, new), (eager_mask, eager_new) = results
    assert (mask == eager_mask).float().mean() >= 0.999
    rows = (mask == eager_mask).all(dim=1)
    assert rows.float().mean() >= 0.9
    torch.testing.assert_close(new[rows], eager_new[rows], rtol=1e-3, atol=1e-4)
    reached, reference = (output_error(w, weight, hessian) for w in (new, eager_new))
    assert reached == pytest.approx(reference, rel=1e-3)


def splits(rows: int) -> Iterator[list[slice]]:
    for cuts in ([0, 1, rows], [0, rows // 2, rows // 2 + 1, rows], [0, *range(5, rows, 9), rows]):
        yield [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def test_rows_are_independent(path: str) -> None:
    """Whichever rows are solved together: bit-equal when compiled; in PyTorch up to the rounding of a product."""
    for new, again in solved_in_parts():
        if path == "compiled":
            assert again.equal(new)
        else:
            assert ((again != 0) == (new != 0)).float().mean() >= 0.999


@pytest.mark.gpu
@pytest.mark.skipif(GPU.type == "cpu", reason="needs a GPU: in Triton's interpreter the product is NumPy's")
def test_rows_are_independent_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    take("triton", monkeypatch)
    for new, again in solved_in_parts():
        assert again.equal(new)


def solved_in_parts() -> Iterator[tuple[Tensor, Tensor]]:
    """(weights solved together, the same in parts) for some ways to part them."""
    weight, hessian = problem(70, 300)
    factor = factorise(hessian, 0.01)
    _, new = solve_nm(weight, factor, 2, 4)
    for split in splits(70):
        yield new, torch.cat([solve_nm(weight[rows], factor, 2, 4)[1] for rows in split])


@needs_compiled
def test_threads_do_not_matter(use_threads: Callable[[int], None]) -> None:
    weight, hessian = problem(70, 300)
    factor = factorise(hessian, 0.01)
    results = []
    for threads in (1, 3):
        use_threads(threads)
        results.append(solve_nm(weight, factor, 2, 4)[1])
    assert results[0].equal(results[1])


@needs_triton
@pytest.mark.parametrize(("n", "m"), [(2, 4), (0, 0)])
def test_triton_writes_its_rows_alone_and_no_column_before_its_block(n: int, m: int) -> None:
    """What lies behind the last of 21 rows, in the same program's reach, stays as it is."""
    from megatron_prune.kernels.triton_second_order import sweep

    weight, hessian = problem(21, 40)
    factor = factorise(hessian, 0.01)
    weights, masks = torch.full((64, 40), 7.0), torch.ones(64, 40, dtype=torch.bool)
    weights[:21] = weight
    if not m:
        masks[:21, ::3] = False
    expected, mask = weights[:21].clone(), masks[:21].clone()
    second_order.sweep_eager(expected, mask, factor, 8, 24, n, m)
    weights, masks = weights.to(GPU), masks.to(GPU)
    sweep(weights[:21], masks[:21], Factor(factor.upper.to(GPU), factor.live.to(GPU)), 8, 24, n, m)
    assert (weights[21:] == 7).all() and masks[21:].all()
    torch.testing.assert_close(weights[:21].cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(weights[:21, :8].cpu(), weight[:, :8]) and torch.equal(masks[:21].cpu(), mask)


@needs_triton
@pytest.mark.parametrize(("rows", "columns", "first", "last"), [(1, 64, 0, 64), (17, 200, 64, 128), (130, 129, 0, 64)])
def test_triton_has_as_many_programs_as_there_is_work(
    rows: int, columns: int, first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program for every 16 rows of the block, one for every tile of 64 x 64 behind it, none behind the last."""
    from megatron_prune.kernels import triton_second_order

    launched: list[tuple[str, tuple[int, ...], int]] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, WIDTH, **more: launched.append((self.name, grid, WIDTH))

    for name in ("inside", "behind"):
        monkeypatch.setattr(triton_second_order.kernels, name, Kernel(name))
    weight, factor = torch.zeros(rows, columns), Factor(torch.eye(columns), torch.ones(columns, dtype=torch.bool))
    triton_second_order.sweep(weight, torch.ones(rows, columns, dtype=torch.bool), factor, first, last, 2, 4)
    programs = len(range(0, rows, 16)), (len(range(0, rows, 64)), len(range(last, columns, 64)))
    expected = [("inside", (programs[0],), 64), ("behind", programs[1], 64)]
    assert launched == (expected if programs[1][1] else expected[:1])
    launched.clear()
    triton_second_order.sweep(weight[:0], torch.ones(0, columns, dtype=torch.bool), factor, first, last, 2, 4)
    assert not launched


@needs_triton
def test_gpu_tensors_go_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_prune.kernels import triton_second_order

    assert second_order._fast(torch.device("cuda")) is triton_second_order.sweep
    assert second_order._fast(torch.device("meta")) is None
    monkeypatch.setenv("MEGATRON_PRUNE_COMPILED", "0")
    assert second_order._fast(torch.device("cuda")) is None


def test_without_triton_a_gpu_falls_back_loudly_and_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    compiled._load_triton.cache_clear()
    try:
        assert [second_order._fast(torch.device("cuda")) for _ in range(3)] == [None] * 3
    finally:
        compiled._load_triton.cache_clear()
    assert [str(w.message) for w in recwarn if "triton package is not installed, so SparseGPT" in str(w.message)]
    assert len(recwarn) == 1


def test_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = problem(5, 64)
    once = solve_nm(weight, factorise(hessian, 0.01), 2, 4)[1]
    torch.testing.assert_close(solve_nm(weight, factorise(64 * hessian, 0.01), 2, 4)[1], once)


def test_input_is_not_changed(path: str) -> None:
    weight, hessian = problem(5, 64)
    before = weight.clone()
    solve_nm(weight, factorise(hessian, 0.01), 2, 4)
    assert weight.equal(before)


def test_dead_inputs_are_zero_and_go_first(any_path: str) -> None:
    """Inputs 0 and 1 never fire; a live weight that is zero is kept rather than they, it can still be corrected."""
    weight, hessian = problem(6, 32)
    dead = torch.tensor([0, 1])
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    weight[:, 3] = 0.0
    weight[:, dead] = 50.0
    factor = factorise(hessian, 0.01)
    for mask, new in (solve_nm(weight, factor, 2, 4), solve_unstructured(weight, factor, lower_half)):
        assert not mask[:, dead].any()
        assert not new[:, dead].any()
        assert torch.isfinite(new).all()
    mask, new = solve_nm(weight, factor, 3, 4)
    assert mask[:, [1, 2, 3]].all()
    assert not new[:, dead].any()


def test_dead_inputs_do_not_change_the_others() -> None:
    """The damping is relative to live inputs: adding dead ones leaves the solution of the rest as it was."""
    weight, hessian = problem(6, 32)
    wider = torch.zeros(40, 40)
    wider[:32, :32] = hessian
    _, alone = solve_nm(weight, factorise(hessian, 0.01), 2, 4)
    _, padded = solve_nm(torch.cat([weight, torch.ones(6, 8)], dim=1), factorise(wider, 0.01), 2, 4)
    torch.testing.assert_close(padded[:, :32], alone)


@pytest.mark.parametrize("tokens", [1, 3, 39])
def test_too_few_tokens_are_singular_unless_damped(path: str, tokens: int) -> None:
    _, hessian = problem(1, 40, tokens=tokens)
    with pytest.raises(SingularHessian):
        factorise(hessian, 0.0)
    assert torch.isfinite(factorise(hessian, 0.01).upper).all()


def test_repeated_input_and_no_input_are_singular(path: str) -> None:
    x = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    x[:, 5] = x[:, 2]
    with pytest.raises(SingularHessian):
        factorise(x.t() @ x, 0.0)
    with pytest.raises(SingularHessian):
        factorise(torch.zeros(4, 4), 0.01)


def test_one_massive_input_is_not_singular(path: str) -> None:
    """Language models have inputs a thousand times the others; the default damping must carry them."""
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    x[:, 17] *= 1e4
    assert torch.isfinite(factorise(x.t() @ x, 0.01).upper).all()


def test_blocks_are_the_sweeps_own_where_it_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """In C a sweep gets all columns at once, elsewhere a block that holds whole groups."""
    weight, hessian = problem(2, 60)
    factor, cpu = factorise(hessian, 0.01), torch.device("cpu")
    for name in ("eager", "compiled"):
        with monkeypatch.context() as patched:
            take(name, patched)
            own = name == "compiled" and second_order._compiled() is not None
            spans: list[tuple[int, int]] = []
            patched.setattr(second_order, "sweep", lambda w, m, f, first, last, *_: spans.append((first, last)))  # noqa: B023
            solve_nm(weight, factor, 2, 4, block_size=18)
            assert second_order._has_own_blocks(cpu) == own
            assert spans == ([(0, 60)] if own else [(0, 20), (20, 40), (40, 60)])


def test_the_solver_works_in_float32_whatever_type_is_torchs_default(path: str) -> None:
    weight, hessian = problem(5, 64)
    expected = solve_nm(weight, factorise(hessian, 0.01), 2, 4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        factor = factorise(hessian, 0.01)
        found = solve_nm(weight, factor, 2, 4)
    finally:
        torch.set_default_dtype(before)
    assert factor.upper.dtype == found[1].dtype == torch.float32
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
