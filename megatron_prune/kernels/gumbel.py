"""Learnable N:M masks (MaskLLM, Fang et al. 2024, arXiv 2409.17481, section 3.2): Gumbel-softmax over the
patterns of every group, and the masked weight, differentiable in the logits. Forward and backward are one
pass each; the backward draws the same counter-based noise again, so that nothing of the size of the logits is
kept between them. Three implementations with one meaning: PyTorch on any device, row chunk by row chunk; C on
the CPU (csrc/gumbel.c), ten times faster than the formula spelt out in PyTorch; Triton on a GPU
(triton_gumbel.py)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prune.kernels.compiled import DISABLE_VARIABLE, load_library, load_triton
from megatron_prune.kernels.definition import Draw, pattern_table
from megatron_prune.kernels.memory import expect_writes
from megatron_prune.kernels.philox import gumbel_noise

Implementation = Literal["auto", "eager", "cpu", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

CHUNK_LOGITS = {"cpu": 2**20, "accelerator": 2**22}
"""Logits the PyTorch path takes at a time, to bound its temporaries (about 100 bytes a logit)."""

SOURCE = Path(__file__).parent / "csrc" / "gumbel.c"


@dataclass(frozen=True)
class Position:
    """Where a shard of a weight lies in the unsharded weight."""

    row_ids: Tensor
    """int64 [rows]: row of the unsharded weight for each row here."""
    first_group: int
    """Index in its unsharded row of the first group here."""
    groups_per_row: int
    """Groups in an unsharded row: inputs / M."""

    @classmethod
    def whole(cls, rows: int, groups: int, device: torch.device | str = "cpu") -> Position:
        """The position of a weight that is not sharded."""
        return cls(torch.arange(rows, device=device), 0, groups)


@dataclass(frozen=True)
class Call:
    """What one evaluation needs besides weight and logits."""

    n: int
    m: int
    scale: float
    temperature: float
    key: tuple[int, int] | None
    position: Position
    hard: bool
    regularization: float
    implementation: str
    accumulate_into: Tensor | None = None
    stand_in: bool = False
    straight: bool = False


@functools.cache
def patterns(n: int, m: int) -> Tensor:
    """`pattern_table` as a tensor: bool [C(m, n), m], always the same one; ValueError unless 1 <= n <= m <= 8."""
    return torch.from_numpy(pattern_table(n, m))


def masked_weight(
    weight: Tensor,
    logits: Tensor,
    *,
    n: int,
    m: int,
    scale: float,
    temperature: float,
    draw: Draw | None,
    position: Position,
    hard: bool = False,
    regularization: float = 0.0,
    accumulate_into: Tensor | None = None,
    stand_in: bool = False,
    straight: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    """The masked weight, [out, in] in the weight's dtype, differentiable in the logits.

        weight * mask    with    mask = softmax((scale * logits + g) / temperature) @ patterns

    weight [out, in] and logits [out, in / m, C(m, n)] are contiguous, fp32 or bf16 (PyTorch path: any float);
    arithmetic is fp32 (fp64 when either is). g is the standard Gumbel noise of `draw`; None means g = 0.
    hard=True: straight-through. Forward and weight gradient use the likeliest pattern, the logits see the
    soft one. straight=True: the weight's gradient is the incoming one, whatever the mask, so that removed
    weights go on learning (Zhou et al. 2021, arXiv:2102.04010, section 3.2).

    regularization r adds the gradient of -r * sum((weight * mask)^2) to the logits' gradient (not to the
    weight's), independent of the incoming gradient: scale it yourself when the loss is scaled.

    accumulate_into, fp32 like logits: backward adds the logits' gradient there and autograd gets None for
    them (the main_grad of Megatron's buckets, without a second copy of the gradient). logits must still
    require grad. With stand_in autograd gets a tensor of the logits' shape and type instead, into which nothing
    has been written: a gradient for hooks that want to see one, whose values nobody may read.

    Differentiable once, in logits and, if it requires grad, in weight. Saved for backward: the two inputs
    only. Raises ValueError on shapes, dtypes or an `implementation` that do not fit.
    """
    _check(weight, logits, n, m, temperature, position)
    if accumulate_into is not None:
        _check_accumulator(accumulate_into, logits)
    chosen = _choose(implementation, weight, logits)
    key = draw.key() if draw is not None else None
    call = Call(
        n, m, scale, temperature, key, position, hard, regularization, chosen, accumulate_into, stand_in, straight
    )
    result: Tensor = _MaskedWeight.apply(weight, logits, call)  # type: ignore[no-untyped-call]
    return result


def statistics(
    logits: Tensor, *, scale: float, temperature: float, implementation: Implementation = "auto"
) -> tuple[Tensor, Tensor]:
    """What is logged of the masks as they are without noise, in one pass over the logits [out, groups, patterns].

    The winners, and float64 [2]: the sums over groups of their probability (divide by groups: 1 / patterns undecided, 1
    decided) and of the entropy in nats (ln patterns undecided, 0 decided); those of shards add up.
    """
    return _winners(logits, scale / temperature, implementation)


def winners(logits: Tensor, implementation: Implementation = "auto") -> Tensor:
    """Index of the largest logit of each group, the lowest where several are equal: uint8 [out, in / M]."""
    return _winners(logits, 1.0, implementation)[0]


def _winners(logits: Tensor, sharpness: float, implementation: Implementation) -> tuple[Tensor, Tensor]:
    if logits.dim() != 3:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected [out, groups, patterns]")
    chosen = _choose(implementation, logits) if logits.is_contiguous() else "eager"
    return _functions(chosen).winners(logits, sharpness)


def decode(logits: Tensor, n: int, m: int) -> Tensor:
    """The mask the logits stand for, without noise: bool [out, in]."""
    table = patterns(n, m).to(logits.device)
    if logits.shape[-1] != len(table):
        raise ValueError(f"logits have {logits.shape[-1]} patterns; {n}:{m} has {len(table)}")
    return table[winners(logits).long()].flatten(1)


def pattern_index(mask: Tensor, n: int, m: int) -> Tensor:
    """Inverse of `decode`: the pattern of each group of a bool mask [out, in], as uint8 [out, in / m].

    Raises ValueError when a group does not keep exactly n, or in is not a multiple of m.
    """
    table = patterns(n, m)
    if mask.shape[-1] % m:
        raise ValueError(f"mask has {mask.shape[-1]} inputs, not a multiple of {m}")
    bits = 2 ** torch.arange(m)
    lookup = torch.full((2**m,), 255, dtype=torch.uint8)
    lookup[(table * bits).sum(-1)] = torch.arange(len(table), dtype=torch.uint8)
    codes = (mask.reshape(*mask.shape[:-1], -1, m) * bits.to(mask.device, torch.uint8)).sum(-1)
    index = lookup.to(mask.device)[codes]
    wrong = int((index == 255).sum())
    if wrong:
        raise ValueError(f"mask is not {n}:{m}: {wrong} of {index.numel()} groups do not keep exactly {n}")
    return index


class _MaskedWeight(torch.autograd.Function):
    """The differentiable core of `masked_weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, call: Call) -> Tensor:
        ctx.save_for_backward(weight, logits)
        ctx.call = call
        return _functions(call.implementation).forward(weight, logits, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, logits = ctx.saved_tensors
        call: Call = ctx.call
        needs_weight, needs_logits = ctx.needs_input_grad[:2]
        grad_output = grad_output.contiguous()
        add = call.accumulate_into is not None and needs_logits
        grad_weight = expect_writes(torch.empty_like(weight)) if needs_weight and not call.straight else None
        grad_logits = call.accumulate_into if add else expect_writes(torch.empty_like(logits)) if needs_logits else None
        step = _functions(call.implementation).backward
        step(weight, logits, grad_output, grad_weight, grad_logits, add, call)
        if needs_weight and call.straight:
            grad_weight = grad_output
        if add:
            grad_logits = torch.empty_like(logits) if call.stand_in else None
        return grad_weight, grad_logits, None


# ---- PyTorch -------------------------------------------------------------------------------------------


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Row ranges of at most CHUNK_LOGITS logits each (one row at least)."""
    limit = CHUNK_LOGITS["cpu" if logits.device.type == "cpu" else "accelerator"]
    step = max(1, limit // max(1, logits.shape[1] * logits.shape[2]))
    return (slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step))


def _compute_dtype(weight: Tensor, logits: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (weight.dtype, logits.dtype) else torch.float32


def _noisy(logits: Tensor, rows: slice, call: Call, dtype: torch.dtype) -> Tensor:
    """scale * logits + g of the given rows, [rows, groups, patterns]."""
    noisy = logits[rows].to(dtype) * call.scale
    if call.key is None:
        return noisy
    where = call.position
    columns = where.first_group + torch.arange(logits.shape[1], device=logits.device)
    groups = where.row_ids[rows].to(logits.device).unsqueeze(-1) * where.groups_per_row + columns
    return noisy.add_(gumbel_noise(groups, logits.shape[-1], call.key))


def _eager_masks(logits: Tensor, rows: slice, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [rows, groups, patterns], forward mask [rows, groups, m] and table [patterns, m]."""
    table = patterns(call.n, call.m).to(logits.device, dtype)
    noisy = _noisy(logits, rows, call, dtype)
    largest = noisy.amax(dim=-1, keepdim=True)
    # The difference first: dividing large logits by a small temperature would round away what tells them
    # apart.
    probabilities = ((noisy - largest) / call.temperature).softmax(dim=-1)
    mask = table[noisy.argmax(dim=-1)] if call.hard else probabilities @ table
    return probabilities, mask, table


def _eager_forward(weight: Tensor, logits: Tensor, call: Call) -> Tensor:
    dtype = _compute_dtype(weight, logits)
    output = torch.empty_like(weight)
    for rows in _chunks(logits):
        _, mask, _ = _eager_masks(logits, rows, call, dtype)
        output[rows] = weight[rows].to(dtype) * mask.flatten(1)
    return output


def _eager_backward(
    weight: Tensor,
    logits: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    add: bool,
    call: Call,
) -> None:
    """Fills grad_weight and fills or adds to grad_logits, where they are wanted."""
    dtype = _compute_dtype(weight, logits)
    for rows in _chunks(logits):
        probabilities, mask, table = _eager_masks(logits, rows, call, dtype)
        w = weight[rows].to(dtype).view(mask.shape)
        dy = grad_output[rows].to(dtype).view(mask.shape)
        if grad_weight is not None:
            grad_weight[rows] = (mask * dy).flatten(1).to(grad_weight.dtype)
        if grad_logits is None:
            continue
        grad_mask = w * (dy - 2.0 * call.regularization * w * mask)
        grad_probabilities = grad_mask @ table.T
        mean = (probabilities * grad_probabilities).sum(dim=-1, keepdim=True)
        grad = grad_probabilities.sub_(mean).mul_(probabilities).mul_(call.scale / call.temperature)
        if add:
            grad_logits[rows] += grad
        else:
            grad_logits[rows] = grad.to(grad_logits.dtype)


def _eager_winners(logits: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Winners, and the sums of their noiseless probabilities, softmax(sharpness * logits), and of the entropies."""
    index = torch.empty(logits.shape[:2], dtype=torch.uint8, device=logits.device)
    sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for rows in _chunks(logits):
        z = logits[rows].to(_compute_dtype(logits, logits))
        index[rows] = z.argmax(dim=-1)
        logs = ((z - z.amax(dim=-1, keepdim=True)) * sharpness).log_softmax(dim=-1)
        probabilities = logs.exp()
        sums[0] += probabilities.amax(dim=-1).sum(dtype=torch.float64)
        sums[1] -= torch.where(probabilities > 0, probabilities * logs, 0).sum(dtype=torch.float64)
    return index, sums


# ---- compiled C ----------------------------------------------------------------------------------------


class _Arguments(ctypes.Structure):
    """`Arguments` of csrc/gumbel.c: same order, same widths."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "groups", "first_group", "groups_per_row")),
        *((name, ctypes.c_void_p) for name in ("row_ids", "pattern_bits", "weight", "logits", "grad_output")),
        *((name, ctypes.c_void_p) for name in ("masked_weight", "grad_weight", "grad_logits")),
        *((name, ctypes.c_int32) for name in ("m", "patterns", "weight_bf16", "logits_bf16")),
        *((name, ctypes.c_int32) for name in ("grad_logits_bf16", "noise", "hard", "accumulate", "threads")),
        ("key", ctypes.c_uint32 * 2),
        *((name, ctypes.c_float) for name in ("scale", "inverse_temperature", "regularization")),
    ]


@functools.cache
def pattern_bits(n: int, m: int) -> Tensor:
    """uint8 [patterns]: bit i is set where the pattern keeps input i."""
    return (patterns(n, m) * 2 ** torch.arange(m)).sum(-1).to(torch.uint8)


def _run(function: str, call: Call, logits: Tensor, *extra: Tensor, **tensors: Tensor | None) -> None:
    """Call a function of the library: `tensors` fill the fields so named, `extra` follow as pointers."""
    library = load_library(SOURCE)
    assert library is not None
    bits = pattern_bits(call.n, call.m)
    row_ids = call.position.row_ids.to("cpu", torch.int64).contiguous()
    grad_logits, weight = tensors.get("grad_logits"), tensors.get("weight")
    arguments = _Arguments(
        rows=logits.shape[0],
        groups=logits.shape[1],
        first_group=call.position.first_group,
        groups_per_row=call.position.groups_per_row,
        row_ids=row_ids.data_ptr(),
        pattern_bits=bits.data_ptr(),
        logits=logits.data_ptr(),
        m=call.m,
        patterns=logits.shape[2],
        weight_bf16=weight is not None and weight.dtype == torch.bfloat16,
        logits_bf16=logits.dtype == torch.bfloat16,
        grad_logits_bf16=grad_logits is not None and grad_logits.dtype == torch.bfloat16,
        noise=call.key is not None,
        hard=call.hard,
        threads=torch.get_num_threads(),
        key=call.key or (0, 0),
        scale=call.scale,
        inverse_temperature=1.0 / call.temperature,
        regularization=call.regularization,
    )
    arguments.accumulate = grad_logits is not None and grad_logits is call.accumulate_into
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr() if tensor is not None else None)
    if logits.numel():
        getattr(library, function)(ctypes.byref(arguments), *(ctypes.c_void_p(t.data_ptr()) for t in extra))


def _compiled_forward(weight: Tensor, logits: Tensor, call: Call) -> Tensor:
    output = expect_writes(torch.empty_like(weight))
    _run("gumbel_forward", call, logits, weight=weight, masked_weight=output)
    return output


def _compiled_backward(
    weight: Tensor,
    logits: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    add: bool,
    call: Call,
) -> None:
    """As `_eager_backward`."""
    gradients = {"grad_output": grad_output, "grad_weight": grad_weight, "grad_logits": grad_logits}
    _run("gumbel_backward", call, logits, weight=weight, **gradients)


def _compiled_winners(logits: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    index = torch.empty(logits.shape[:2], dtype=torch.uint8)
    sums = torch.zeros(2, dtype=torch.float64)
    call = Call(1, 1, sharpness, 1.0, None, Position.whole(*logits.shape[:2]), False, 0.0, "cpu")
    _run("gumbel_winners", call, logits, index, sums)
    return index, sums


# ---- Triton --------------------------------------------------------------------------------------------


def _triton() -> ModuleType | None:
    """`triton_gumbel`; None, after one loud warning, without the triton package."""
    return load_triton("triton_gumbel", "learned masks on this GPU are made")


# ---- choice and checks ---------------------------------------------------------------------------------


class _Functions(NamedTuple):
    """One implementation."""

    forward: Callable[[Tensor, Tensor, Call], Tensor]
    backward: Callable[..., None]
    winners: Callable[[Tensor, float], tuple[Tensor, Tensor]]


def _functions(implementation: str) -> _Functions:
    """What `_choose` chose."""
    if implementation == "triton":
        kernels = _triton()
        assert kernels is not None
        return _Functions(kernels.forward, kernels.backward, kernels.winners)
    if implementation == "cpu":
        return _Functions(_compiled_forward, _compiled_backward, _compiled_winners)
    return _Functions(_eager_forward, _eager_backward, _eager_winners)


def _choose(implementation: Implementation, *tensors: Tensor) -> str:
    """The one asked for; for "auto" the fastest that works for these tensors."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; allowed are {', '.join(IMPLEMENTATIONS)}")
    if implementation == "cpu" and not _compiled_works(*tensors):
        raise ValueError(
            "implementation 'cpu' takes fp32 or bf16 tensors in CPU memory, and needs a working C compiler and "
            f"{DISABLE_VARIABLE} not 0; use 'auto'"
        )
    if implementation == "triton" and not _triton_works(*tensors):
        raise ValueError(
            "implementation 'triton' takes fp32 or bf16 tensors in GPU memory, and needs the triton package and "
            f"{DISABLE_VARIABLE} not 0; use 'auto'"
        )
    if implementation != "auto":
        return implementation
    on_gpu = tensors[0].device.type == "cuda"
    fast, works = ("triton", _triton_works) if on_gpu else ("cpu", _compiled_works)
    return fast if works(*tensors) else "eager"


_NARROW = {torch.float32, torch.bfloat16}


def _narrow(tensors: tuple[Tensor, ...]) -> bool:
    return {t.dtype for t in tensors} <= _NARROW


def _compiled_works(*tensors: Tensor) -> bool:
    """Whether the C path can take these tensors."""
    fits = _narrow(tensors) and all(t.is_cpu for t in tensors)
    return fits and load_library(SOURCE) is not None


def _triton_works(*tensors: Tensor) -> bool:
    """Whether the Triton path can take these tensors: on a GPU, or anywhere in Triton's interpreter."""
    kernels = _triton() if _narrow(tensors) else None
    return kernels is not None and (kernels.interpreted() or all(t.device.type == "cuda" for t in tensors))


def _check(weight: Tensor, logits: Tensor, n: int, m: int, temperature: float, position: Position) -> None:
    table = patterns(n, m)
    expected = (weight.shape[0], weight.shape[-1] // m, len(table))
    if weight.dim() != 2 or weight.shape[1] % m or tuple(logits.shape) != expected:
        raise ValueError(
            f"weight {tuple(weight.shape)} and logits {tuple(logits.shape)} do not fit {n}:{m}: "
            f"expected [out, in] with in a multiple of {m}, and [out, in / {m}, {expected[2]}]"
        )
    if not (weight.is_contiguous() and logits.is_contiguous()):
        raise ValueError("weight and logits must be contiguous")
    if weight.device != logits.device:
        raise ValueError(f"weight is on {weight.device}, logits on {logits.device}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if position.row_ids.shape != (weight.shape[0],):
        raise ValueError(f"position has {tuple(position.row_ids.shape)} row ids for {weight.shape[0]} rows")
    if position.first_group < 0 or position.first_group + expected[1] > position.groups_per_row:
        raise ValueError(
            f"groups {position.first_group} to {position.first_group + expected[1]} are outside a row of "
            f"{position.groups_per_row}"
        )


def _check_accumulator(accumulator: Tensor, logits: Tensor) -> None:
    same = accumulator.shape == logits.shape and accumulator.device == logits.device
    if not same or accumulator.dtype != torch.float32 or not accumulator.is_contiguous():
        raise ValueError(
            f"accumulate_into is {accumulator.dtype} {tuple(accumulator.shape)} on {accumulator.device}; "
            f"it must be contiguous fp32 {tuple(logits.shape)} on {logits.device}"
        )
