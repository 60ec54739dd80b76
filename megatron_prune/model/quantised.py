"""Quantised checkpoints: recognised by config.json, a file beside it or their tensors, and refused with what to do.

Pruning decides about weights that a checkpoint of this kind does not hold; a mask for their rounded values is no mask
for the model.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_prune.errors import UserError, brief, shown

KEY = "quantization_config"
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""What some tools write beside config.json instead of its key, and the method that they stand for."""
_LOAD = "AutoModelForCausalLM.from_pretrained(DIR, quantization_config={})"
_STEPS = {
    "bitsandbytes": "AutoModelForCausalLM.from_pretrained(DIR).dequantize()",
    "fp8": _LOAD.format("FineGrainedFP8Config(dequantize=True)"),
    "mxfp4": _LOAD.format("Mxfp4Config(dequantize=True)"),
    "compressed-tensors": _LOAD.format("CompressedTensorsConfig(dequantize=True)"),
}
"""Method -> how transformers opens it with plain weights, where it can."""
_SIGNS = {
    "bitsandbytes": ("*.quant_state.bitsandbytes__*", "*.absmax", "*.quant_map", "*.SCB"),
    "gptq or awq": ("*.qweight", "*.qzeros", "*.g_idx"),
    "compressed-tensors": ("*.weight_packed", "*.weight_scale", "*.weight_zero_point"),
    "fp8": ("*.weight_scale_inv",),
    "mxfp4": ("*_blocks", "*_scales"),
}
"""Method -> names of tensors that only its checkpoints have."""
_NARROW = ("F8_", "F4", "F6_")
"""How the safetensors types of narrow floats begin."""


def check_config(hf_config: Mapping[str, Any]) -> None:
    """UserError for a config.json that says it is of a quantised model."""
    given = hf_config.get(KEY)
    if given is not None:
        method = given.get("quant_method") if isinstance(given, Mapping) else None
        refuse(f"config.json has {KEY}", str(method or "an unnamed method"))


def check_files(directory: Path) -> None:
    """UserError for a file that a tool of quantisation leaves."""
    for name, method in FILES.items():
        if (directory / name).is_file():
            refuse(f"{directory} holds {name}", method)


def check_tensors(directory: Path, dtypes: Mapping[str, str]) -> None:
    """UserError for tensors, name -> safetensors type, that only a quantised checkpoint has."""
    for method, patterns in _SIGNS.items():
        found = _first(dtypes, patterns)
        if found is not None:
            refuse(f"{directory} holds {shown(found)}", method)
    for name, dtype in dtypes.items():
        if dtype.startswith(_NARROW):
            refuse(
                f"{directory} holds {shown(name)} in {shown(dtype)}",
                "fp8" if dtype.startswith("F8_") else "mxfp4",
            )


def _first(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first name of a pattern."""
    return next((name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)), None)


def refuse(found: str, method: str) -> NoReturn:
    """The UserError of every quantised checkpoint."""
    step = _STEPS.get(method.replace("_", "-"))
    how = f", or dequantise it: {step}, then save_pretrained(NEW_DIR)" if step else ""
    raise UserError(
        f"{found}: the model is quantised ({brief(method)[1:-1]}), and pruning needs its plain weights; give the "
        f"unquantised model that it was made from{how}"
    )
