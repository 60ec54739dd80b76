"""Compiles every Triton kernel for an NVIDIA GPU, on any machine, and prints their names (TRITON_INTERPRET unset)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_prune.kernels import second_order_kernels, triton_gumbel, triton_second_order
from megatron_prune.kernels.gumbel import Call, Position
from megatron_prune.kernels.triton_second_order import TILE

CALL = Call(2, 4, 1.0, 1.0, (1, 2), Position.whole(8, 8), False, 0.0, "triton")
FLAGS = {"INDEX": tl.int32, "WEIGHT": True, "LOGITS": True, "ADD": True, "HARDWARE": True}
TYPES = {
    **dict.fromkeys(("logits", "grad_logits", "sums"), "*fp32"),
    **dict.fromkeys(("weight", "output", "grad_output", "grad_weight"), "*bf16"),
    **dict.fromkeys(("total", "groups", "first_group", "groups_per_row"), "i32"),
    **dict.fromkeys(("scale", "inverse_temperature", "sharpness", "regularization"), "fp32"),
    **{"row_ids": "*i64", "key": "i64", "winners": "*u8", "bits": "*u8"},
}
SOLVER_TYPES = {
    **dict.fromkeys(("weight", "upper", "errors"), "*fp32"),
    **dict.fromkeys(("mask", "live"), "*u8"),
    **dict.fromkeys(second_order_kernels.SIZES, "i32"),
}


def compile_kernel(kernel: Any, known: dict[str, Any], types: dict[str, str], warps: int) -> str:
    """PTX of one kernel."""
    fixed = {name: known[name] for name in kernel.arg_names if name in known}
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert result.asm["cubin"]
    return result.asm["ptx"]


def compile_gumbel(n: int, m: int) -> None:
    choices = math.comb(m, n)
    known = triton_gumbel.constants(choices) | triton_gumbel.mask_constants(replace(CALL, n=n, m=m), choices) | FLAGS
    for name in ("forward", "backward", "winners"):
        kernel = getattr(triton_gumbel.kernels(choices), name)
        ptx = compile_kernel(kernel, known, TYPES, triton_gumbel.BLOCK // 32)
        assert "ex2.approx.ftz" in ptx and "lg2.approx.ftz" in ptx
        print(name)


def compile_solver() -> None:
    rows = {"ROWS": triton_second_order.ROWS}
    for name, own in (("inside", {"N": 2, "M": 4} | rows), ("inside", {"N": 0, "M": 0} | rows), ("behind", TILE)):
        kernel = getattr(second_order_kernels, name)
        ptx = compile_kernel(kernel, {"WIDTH": 128} | own, SOLVER_TYPES, triton_second_order.WARPS)
        assert ("div.rn.f32" in ptx) == (name == "inside") and "tf32" not in ptx
        print(name)


if __name__ == "__main__":
    compile_gumbel(2, 4)
    compile_gumbel(4, 8)
    compile_solver()
