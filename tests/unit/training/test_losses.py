"""Distillation losses against torch's own, on whole vocabularies; with shards in tests/distributed/test_recovery.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.training import losses
from megatron_prune.training.losses import AddLoss, divergence, hidden_distance, next_token
from megatron_prune.training.weighting import teacher_layer


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of standard deviation 4."""
    return (4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("at_once", [1, 4 * 37, 2**20], ids=["a token", "4 tokens of 10", "all"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergence_and_its_gradient_are_those_of_kl_div(
    temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.AT_ONCE, "cpu", at_once)
    student, teacher = logits(2, 5, 37).requires_grad_(), logits(2, 5, 37, seed=1)
    found = divergence(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(found.mean(), student)
    log_q = F.log_softmax(student / temperature, -1)
    expected = F.kl_div(log_q, F.log_softmax(teacher / temperature, -1), reduction="none", log_target=True).sum(-1)
    (wanted,) = torch.autograd.grad((temperature**2 * expected).mean(), student)
    torch.testing.assert_close(found, temperature**2 * expected)
    torch.testing.assert_close(gradient, wanted, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_padded_vocabulary_takes_no_part(dtype: torch.dtype, temperature: float) -> None:
    """Padded logits are the smallest number of their type; divided by a small temperature they overflow."""
    student, teacher = logits(3, 37, dtype=dtype), logits(3, 37, seed=1, dtype=dtype)
    padded = [F.pad(x, (0, 3), value=torch.finfo(dtype).min).requires_grad_() for x in (student, teacher)]
    found = divergence(padded[0], padded[1], temperature)
    torch.testing.assert_close(found, divergence(student, teacher, temperature))
    (gradient,) = torch.autograd.grad(found.sum(), padded[0])
    assert gradient.isfinite().all() and bool((gradient[:, 37:] == 0).all()) and bool((gradient[:, :37] != 0).any())
    assert gradient.dtype == dtype


def test_equal_logits_do_not_diverge() -> None:
    x = logits(4, 37).requires_grad_()
    found = divergence(x, x.detach() + 5.0)
    assert found.abs().max() < 1e-5
    assert torch.autograd.grad(found.sum(), x)[0].abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_next_token_loss_is_exact_with_a_large_vocabulary(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(16, 49152, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    labels = torch.arange(16) * 3000
    found, expected = next_token(logits, labels), F.cross_entropy(exact, labels, reduction="none")
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 2e-6
    found.sum().backward()
    expected.sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert (logits.grad - exact.grad).norm() < tolerance * exact.grad.norm()


def test_hidden_distances() -> None:
    a, b = logits(6, 2, 16), logits(6, 2, 16, seed=1)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(hidden_distance(a, b, "cosine"), (1 - cosine).mean())
    torch.testing.assert_close(hidden_distance(a, b, "mse"), ((a - b) ** 2).mean())
    assert hidden_distance(a, 3 * a, "cosine") < 1e-6 < hidden_distance(a, 3 * a, "mse")


def test_a_loss_in_passing_adds_its_gradient() -> None:
    x = logits(5).requires_grad_()
    AddLoss.apply(x, (x**2).sum(), 0.25).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 1 + 0.25 * 2 * x.detach())


def test_layers_are_matched_by_depth() -> None:
    """Last to last; with an even split over pipeline stages a student's layer and its teacher's share a stage."""
    assert [teacher_layer(i, 4, 8) for i in range(4)] == [1, 3, 5, 7]
    assert [teacher_layer(i, 6, 9) for i in range(6)] == [1, 2, 4, 5, 7, 8]
    assert [teacher_layer(i, 30, 30) for i in range(30)] == list(range(30))
    for stages, student, teacher in ((2, 6, 8), (3, 6, 9), (4, 8, 12)):
        for i in range(student):
            stage = teacher_layer(i, student, teacher) // (teacher // stages)
            assert stage == i // (student // stages)
