"""Matrix products on a CPU, where torch's own are slow.

Of float32, for passes without gradients, by oneDNN: torch gives them to MKL, which leaves half of the vector width of
an AMD processor unused, and has no setting for that. On an EPYC with AVX-512 oneDNN has 2.2 times the speed for the
shapes of a 135M model: 220 instead of 100 GFLOP/s on one core. Both add up in float32, in different orders.

Of bfloat16 and float16, with gradients too, in float32: processors without AVX-512 (or Arm's counterpart) have no such
products, and torch then adds up in loops of its own, which for these shapes take 7 times as long, with gradients 23
to 43 times (benchmarks/narrow_products.py). Products of such numbers are exact in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def fast_products() -> contextlib.AbstractContextManager[Any]:
    """While active products of float32 tensors with matrices are oneDNN's, on processors that gain by it."""
    return _OneDNN() if available() else contextlib.nullcontext()


def available() -> bool:
    """Whether this processor has AVX-512, torch has oneDNN's product, and nobody has turned it off."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and known() and bool(torch.backends.mkldnn.enabled)


def known() -> bool:
    """Whether this torch has oneDNN and its product, which is no public function."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", ATTENTION, f"{ATTENTION}_backward")
"""Operators of torch that all others that multiply matrices come down to."""
_widened = False


def lacking() -> frozenset[torch.dtype]:
    """Types whose products this processor lacks, as torch itself decides whether oneDNN makes them; none where this
    torch (before 2.9, or without oneDNN) cannot be told to widen them.
    """
    if not (known() and hasattr(torch.library, "get_kernel")):
        return frozenset()
    ask = torch.ops.mkldnn
    there = {torch.bfloat16: ask._is_mkldnn_bf16_supported(), torch.float16: ask._is_mkldnn_fp16_supported()}
    return frozenset(dtype for dtype, supported in there.items() if not supported)


@contextlib.contextmanager
def wide_products() -> Iterator[None]:
    """While active CPU products of types that the processor lacks are made in float32 and rounded to their type.

    In all of the process, and for gradients too; each takes float32 copies of its operands. Afterwards everything is
    as it was.
    """
    global _widened
    dtypes = lacking()
    if _widened or not dtypes:
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in PRODUCTS:
            try:
                kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            except RuntimeError:  # another torch has another name for it, and keeps its own loops
                continue
            library.impl(name, _widening(kernel, dtypes, name), "CPU", with_keyset=True, allow_override=True)
        _widened = True
        yield
    finally:
        _widened = False
        library._destroy()


def _widening(kernel: Any, dtypes: frozenset[torch.dtype], name: str) -> Callable[..., Any]:
    """`kernel` with operands of `dtypes` given in float32, and its results in their type, but attention's sums."""
    first_only, mixed = name == ATTENTION, name.startswith(ATTENTION)

    def product(keys: Any, *args: Any, **kwargs: Any) -> Any:
        narrow = args[0].dtype
        alike = mixed or all(x.dtype == narrow for x in args if isinstance(x, Tensor))
        if narrow not in dtypes or not alike:  # what differs is refused as it is elsewhere
            return kernel.call_boxed(keys, *args, **kwargs)
        found = kernel.call_boxed(keys, *map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        if isinstance(found, Tensor):
            return found.to(narrow)
        return tuple(x if first_only and number else x.to(narrow) for number, x in enumerate(found))

    def _wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in dtypes else value

    return product


class _OneDNN(TorchFunctionMode):
    """Takes `F.linear` and `torch.matmul` where nothing has to be differentiated; the rest is torch's own."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not kwargs and not torch.is_grad_enabled():
            if function is F.linear and _takes(args[0], args[1]):
                return _linear(*args)
            if function is torch.matmul and args[1].dim() == 2 and _takes(args[0], args[1].t()):
                return _linear(args[0], args[1].t())
        return function(*args, **(kwargs or {}))


def _takes(inputs: Tensor, weight: Tensor) -> bool:
    """Whether these are float32 rows `[..., in]` and a matrix `[out, in]` as it lies in memory, on the CPU."""
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float32 for x in (inputs, weight))
    return plain and weight.is_cpu and weight.is_contiguous() and weight.dim() == 2 and inputs.dim() > 1


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
