"""Distillation losses under tensor and sequence parallelism: pure functions of tensors and a process group.

Logits are `[..., vocab / tp]`: each rank holds the columns of its part of the vocabulary. With p the teacher's and q
the student's probabilities at temperature T,

    divergence = T^2 * sum over v of p_v * (log p_v - log q_v)          gradient of a student's logit: T * (q_v - p_v)

The factor T^2 (Hinton et al. 2015, arXiv:1503.02531, section 2) keeps the gradient's size when T changes. Padded
vocabulary rows, whose logits are the smallest number of their type, have probability 0 and take no part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.training.weighting import HiddenLoss


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, group: Any = None) -> Tensor:
    """`[...]` float32: T^2 * KL(teacher || student) of each token, from logits `[..., vocab / tp]` of any float type.

    Differentiable in the student's logits. Collective over `group`, whose ranks hold the parts of the vocabulary (None:
    this rank has all of it); every rank gets the same values.
    """
    return _Divergence.apply(student, teacher, temperature, group)


class _Divergence(torch.autograd.Function):
    """Keeps one float32 tensor of the logits' size for the backward pass: the gradient itself."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: Any) -> Tensor:
        log_q = _log_probabilities(student, temperature, group)
        log_p = _log_probabilities(teacher, temperature, group)
        p = log_p.exp()
        terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0)  # 0 * (-inf + inf) where both have none
        result = _sum(terms.sum(-1), group) * temperature**2
        ctx.dtype = student.dtype
        ctx.save_for_backward(log_q.exp_().sub_(p).mul_(temperature))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * gradients[0].unsqueeze(-1)).to(ctx.dtype), None, None, None


def _log_probabilities(logits: Tensor, temperature: float, group: Any) -> Tensor:
    """Logarithm of the softmax over the whole vocabulary, this rank's columns, float32, a tensor of its own."""
    x = logits.float() / temperature
    top = x.amax(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    x -= top
    return x.sub_(_sum(x.exp().sum(-1, keepdim=True), group).log_())


def _sum(x: Tensor, group: Any) -> Tensor:
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """`[...]` float32: -log of the probability of each label, from whole logits `[..., vocab]` of any float type.

    Not torch's cross_entropy: on a CPU its gradients of SmolLM2, with 49,152 words, had 15 times the rounding error.
    """
    x = logits.float()
    return torch.logsumexp(x, -1) - x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def hidden_distance(student: Tensor, teacher: Tensor, kind: HiddenLoss) -> Tensor:
    """Mean over tokens of two layers' outputs `[..., hidden]`: 1 - cosine, or the squared difference per channel."""
    a, b = student.float(), teacher.float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(a, b, dim=-1)).mean()
    return F.mse_loss(a, b)


class AddLoss(torch.autograd.Function):
    """`AddLoss.apply(x, loss, scale)` is x, and its backward pass adds `scale * loss` to what is differentiated.

    So a layer's output can have a loss of its own on any pipeline stage.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.clone()  # a pipeline frees outputs, and not through views

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], gradients[0].new_tensor(ctx.scale, dtype=torch.float32), None
