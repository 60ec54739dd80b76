"""Compiles every Triton kernel for an NVIDIA GPU, on any machine, and prints their names (TRITON_INTERPRET unset)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_prune.kernels import gumbel_kernels, triton_gumbel
from megatron_prune.kernels.gumbel import Call, Position

CALL = Call(2, 4, 1.0, 1.0, (1, 2), Position.whole(8, 8), False, 0.0, "triton")
FLAGS = {"INDEX": tl.int32, "WEIGHT": True, "LOGITS": True, "ADD": True, "HARDWARE": True}
TYPES = {
    **dict.fromkeys(("logits", "grad_logits", "sums"), "*fp32"),
    **dict.fromkeys(("weight", "output", "grad_output", "grad_weight"), "*bf16"),
    **dict.fromkeys(("total", "groups", "first_group", "groups_per_row"), "i32"),
    **dict.fromkeys(("scale", "inverse_temperature", "sharpness", "regularization"), "fp32"),
    **{"row_ids": "*i64", "key": "i64", "winners": "*u8"},
}


def compile_kernel(kernel: Any) -> str:
    """PTX of one kernel."""
    known = triton_gumbel.constants(6) | triton_gumbel.mask_constants(CALL, 6) | FLAGS
    fixed = {name: known[name] for name in kernel.arg_names if name in known}
    signature = {name: "constexpr" if name in fixed else TYPES[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_gumbel.BLOCK // 32})
    assert result.asm["cubin"]
    return result.asm["ptx"]


if __name__ == "__main__":
    for name in ("forward", "backward", "winners"):
        ptx = compile_kernel(getattr(gumbel_kernels, name))
        assert "ex2.approx.ftz" in ptx and ("lg2.approx.ftz" in ptx) == (name != "winners")
        print(name)
