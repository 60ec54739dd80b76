"""Distillation losses under tensor and sequence parallelism: pure functions of tensors and a process group.

Logits are `[..., vocab / tp]`: each rank holds the columns of its part of the vocabulary. With p the teacher's and q
the student's probabilities at temperature T,

    divergence = T^2 * sum over v of p_v * (log p_v - log q_v)          gradient of a student's logit: T * (q_v - p_v)

The factor T^2 (Hinton et al. 2015, arXiv:1503.02531, section 2) keeps the gradient's size when T changes. Padded
vocabulary rows, whose logits are the smallest number of their type, have probability 0 and take no part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Logits of which float32 values are held at the same moment: few on a CPU, whose caches then hold them."""


class _Divergence(torch.autograd.Function):
    """Keeps nothing but the logits, as they came, and two numbers a token: float32 values of all logits at once would
    be the largest tensors of a training step.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: Any) -> Tensor:
        q, p = _softmax(student, temperature, group), _softmax(teacher, temperature, group)
        result = torch.empty(len(q.rows), dtype=torch.float32, device=student.device)
        for part in q.parts():
            log_q, log_p = q.logarithm(part), p.logarithm(part)
            shares = log_p.exp()
            terms = log_p.sub_(log_q).mul_(shares).masked_fill_(shares == 0, 0.0)  # 0 * (-inf + inf): both have none
            result[part] = terms.sum(-1)
        ctx.temperature = temperature
        ctx.save_for_backward(q.rows, q.top, q.log_sum, p.rows, p.top, p.log_sum)
        return (_sum(result, group) * temperature**2).view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        saved, outer = ctx.saved_tensors, gradients[0].reshape(-1, 1)
        q, p = (_Softmax(own[0], own[1], own[2], ctx.temperature) for own in (saved[:3], saved[3:]))
        slope = torch.empty_like(q.rows)
        for part in q.parts():
            difference = q.logarithm(part).exp_().sub_(p.logarithm(part).exp_())
            slope[part] = difference.mul_(ctx.temperature).mul_(outer[part])
        return slope.view(*gradients[0].shape, -1), None, None, None


class _Softmax(NamedTuple):
    """Logarithms of the softmax over the whole vocabulary, this rank's columns, made for some tokens at a time."""

    rows: Tensor
    """Logits `[tokens, vocab / tp]`."""
    top: Tensor
    """`[tokens, 1]` float32, their largest at the temperature."""
    log_sum: Tensor
    """`[tokens, 1]` float32: of the exponentials of what is left of them below `top`."""
    temperature: float

    def parts(self) -> list[slice]:
        """Tokens that are looked at together."""
        most = AT_ONCE["cpu" if self.rows.device.type == "cpu" else "cuda"]
        step = max(1, most // self.rows.shape[-1])
        return [slice(first, first + step) for first in range(0, len(self.rows), step)]

    def logarithm(self, part: slice) -> Tensor:
        """`[tokens, vocab / tp]` float32, a tensor of its own."""
        return self.below_top(part).sub_(self.log_sum[part])

    def below_top(self, part: slice) -> Tensor:
        """Logits minus the largest, at the temperature."""
        return self.rows[part].to(torch.float32, copy=True).div_(self.temperature).sub_(self.top[part])


def _softmax(logits: Tensor, temperature: float, group: Any) -> _Softmax:
    rows = logits.reshape(-1, logits.shape[-1])
    top = rows.amax(-1, keepdim=True).float() / temperature
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    found = _Softmax(rows, top, torch.empty_like(top), temperature)
    for part in found.parts():
        found.log_sum[part] = found.below_top(part).exp_().sum(-1, keepdim=True)
    _sum(found.log_sum, group).log_()
    return found


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
