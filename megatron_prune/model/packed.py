"""Models quantised by nvidia-modelopt, as `export --quantize` writes them, read without it.

    fp8        weight [out, in] float8 (e4m3); weight_scale and input_scale, one number each
    int4_awq   weight [out / 2, in] bytes, rows 2i and 2i + 1 in the low and the high half; weight_scale
               [out, in / block]; pre_quant_scale [in], where inputs are multiplied by it first
    nvfp4      weight [out, in / 2] bytes, columns 2i and 2i + 1 in the low and the high half, each 4 bits of float
               (e2m1); weight_scale [out, in / 16] float8; weight_scale_2 and input_scale, one number each

A weight is its codes times its scales. What is computed from them here is what an engine computes, in the type asked
for: products of rounded weights and, for fp8 and nvfp4, of inputs rounded in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from safetensors import safe_open
from torch import Tensor
from typing_extensions import TypedDict

from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import check_shape, fenced, read_json, strict
from megatron_prune.model import quantised
from megatron_prune.model.convert import HFReader, local_directory
from megatron_prune.model.mxfp4 import fp4_values
from megatron_prune.model.published import check_adapter, check_tensors
from megatron_prune.model.stored import Entry, read_entries

FP4_BLOCK = 16
LARGEST_FP8, LARGEST_FP4 = 448.0, 6.0
SMALLEST_FP8 = 2.0**-9
"""Above zero."""
_AGAIN = "write it again with `export --quantize`"


class _Settings(TypedDict):
    """`quantization_config` of config.json."""

    __pydantic_config__ = strict()  # type: ignore[misc]
    quant_method: Literal["modelopt"]
    quant_algo: Literal["FP8", "W4A16_AWQ", "NVFP4"]
    config_groups: NotRequired[dict[str, Any]]
    ignore: NotRequired[list[str]]
    producer: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Scheme:
    """How one format stores a weight."""

    name: str
    """As `export --quantize` has it."""
    dtype: str
    """Of the codes, in safetensors' words."""
    rows: int = 1
    """Rows of the weight for each row of codes."""
    columns: int = 1
    numbers: tuple[str, ...] = ()
    """Tensors beside the weight that are one number."""
    also: tuple[str, ...] = ()
    """Tensors that there may be."""


SCHEMES = {
    "FP8": Scheme("fp8", "F8_E4M3", numbers=("weight_scale", "input_scale")),
    "W4A16_AWQ": Scheme("int4_awq", "U8", rows=2, also=("pre_quant_scale",)),
    "NVFP4": Scheme("nvfp4", "U8", columns=2, numbers=("weight_scale_2", "input_scale")),
}


# --- numbers ---


def from_int4(codes: Tensor, scale: Tensor) -> Tensor:
    """`[out, in]` float32 of codes `[out / 2, in]` and scales `[out, blocks]`."""
    nibbles = torch.stack([codes & 15, codes >> 4], dim=1).flatten(0, 1)
    signed = (nibbles.to(torch.int8) ^ 8) - 8
    return signed.float() * scale.float().repeat_interleave(signed.shape[1] // scale.shape[1], dim=1)


def from_fp4(codes: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """`[out, in]` float32 of codes `[out, in / 2]` and scales `[out, in / 16]`, themselves in units of ``scale_2``."""
    return fp4_values(codes) * (scale.float() * scale_2.float()).repeat_interleave(FP4_BLOCK, dim=1)


def round_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` in units of ``scale`` as float8, and back: in its own type."""
    return (_as_fp8(x.float() / scale) * scale).to(x.dtype)


def round_fp4(x: Tensor, scale_2: Tensor) -> Tensor:
    """``x`` as 4-bit floats, each 16 along the last dimension with a scale of their own in units of ``scale_2``."""
    blocks = x.float().unflatten(-1, (-1, FP4_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / (LARGEST_FP4 * scale_2)
    scale = _as_fp8(scale.clamp(min=SMALLEST_FP8)) * scale_2
    return (_as_fp4(blocks / scale) * scale).flatten(-2).to(x.dtype)


def _as_fp8(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).float()


def _as_fp4(x: Tensor) -> Tensor:
    """The nearest value that 4 bits have; in the middle between two, that of the even code.

    Values are 0.5 apart below 2, 1 below 4 and 2 from there on, and `round` goes to the even multiple.
    """
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x.clamp(-LARGEST_FP4, LARGEST_FP4) / step).round() * step


# --- files ---


def open_reader(source: str | Path) -> HFReader:
    """A reader of a Hugging Face checkpoint (directory or hub id), of one that nvidia-modelopt has quantised, too."""
    directory = local_directory(source)
    return PackedReader(directory) if is_packed(directory) else HFReader(directory)


def is_packed(directory: Path) -> bool:
    """Whether config.json says that nvidia-modelopt has quantised the model."""
    if not (directory / "config.json").is_file():
        return False
    about = read_json(directory / "config.json", "a Hugging Face checkpoint").get(quantised.KEY)
    return isinstance(about, dict) and about.get("quant_method") == "modelopt"


class PackedReader(HFReader):
    """A quantised model as if it were a plain one: `read` gives what its codes and scales stand for, in float32."""

    def read(self, name: str) -> Tensor:
        """The tensor ``name``; of a quantised weight every zero is +0.0, those that it was rounded to as well."""
        packed = self._packed_weights().get(name)
        if packed is None:
            return super().read(name)
        part = {kind: self._stored_tensor(entry) for kind, entry in packed.items()}
        if self.scheme.name == "int4_awq":
            weight = from_int4(part["weight"], part["weight_scale"])
        elif self.scheme.name == "nvfp4":
            weight = from_fp4(part["weight"], part["weight_scale"], part["weight_scale_2"])
        else:
            weight = part["weight"].float() * part["weight_scale"]
        if "pre_quant_scale" in part:
            weight = weight * part["pre_quant_scale"].float()
        return weight + 0.0

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """As the base class."""
        return self.read(name)[first:last]

    def packed_names(self) -> list[str]:
        """Names of the quantised weights."""
        return list(self._packed_weights())

    def round_inputs(self, model: Any) -> None:
        """Let the linears of transformers' ``model`` round their inputs as an engine does."""
        rounding = {"fp8": round_fp8, "nvfp4": round_fp4}.get(self.scheme.name)
        if rounding is None:
            return
        if self.model_config.num_moe_experts:
            raise UserError(
                f"{self.directory}: the inputs of experts cannot be rounded in transformers, which has all of a layer "
                "in one matrix; evaluate the model that it was made from, or this one in the engine that it is for"
            )
        for name, parts in self._packed_weights().items():
            module = model.get_submodule(name.removesuffix(".weight"))
            scale = self._stored_tensor(parts["input_scale"]).to(module.weight.device)
            module.register_forward_pre_hook(_before(rounding, scale))

    def _packed_weights(self) -> dict[str, dict[str, Entry]]:
        """What the quantised weights are packed in, by the names that the family's table has."""
        return {name: self._packed[one.name] for name, one in self._entries.items() if one.name in self._packed}

    def _check_directory(self) -> None:
        check_adapter(self.directory)

    def _read_config(self) -> dict[str, Any]:
        config = super()._read_config()
        about = config.pop(quantised.KEY)
        where = f"{self.directory / 'config.json'}: key {quantised.KEY}"
        self.scheme = SCHEMES[check_shape(about, where, _Settings, _AGAIN)["quant_algo"]]
        return config

    def _read_entries(self) -> dict[str, Entry]:
        """The entries of a plain model; what they are packed in is kept beside."""
        plain = read_entries(self.directory)
        starts = [name.removesuffix("weight_scale") for name in plain if name.endswith(".weight_scale")]
        self._packed = {start + "weight": self._take_parts(start, plain) for start in starts}
        for name, parts in self._packed.items():
            rows, columns = parts["weight"].shape
            shape = (rows * self.scheme.rows, columns * self.scheme.columns)
            self._check_scales(shape, parts)
            plain[name] = replace(parts["weight"], dtype="F32", shape=shape)
        check_tensors(self.directory, plain)
        return plain

    def _take_parts(self, start: str, plain: dict[str, Entry]) -> dict[str, Entry]:
        """The tensors that a weight is packed in, by the last part of their names, taken out of `plain`."""
        kinds = dict.fromkeys(("weight", "weight_scale", *self.scheme.numbers))
        parts = {kind: plain.pop(start + kind) for kind in (*kinds, *self.scheme.also) if start + kind in plain}
        for kind in kinds:
            if kind not in parts:
                raise UserError(
                    f"{self.directory} has no tensor {start}{kind}, which {self.scheme.name} needs; {_AGAIN}"
                )
        codes = parts["weight"]
        if codes.dtype != self.scheme.dtype or len(codes.shape) != 2:
            raise _strange(codes, f"{self.scheme.dtype} of two dimensions")
        return parts

    def _check_scales(self, shape: tuple[int, int], parts: Mapping[str, Entry]) -> None:
        """UserError for a scale of another shape or type than a weight of ``shape`` has."""
        for kind in self.scheme.numbers:
            if parts[kind].dtype != "F32" or parts[kind].shape not in ((), (1,)):
                raise _strange(parts[kind], "one number in F32")
        if (inputs := parts.get("pre_quant_scale")) and inputs.shape != shape[1:]:
            raise _strange(inputs, f"{shape[1]} numbers")
        scale = parts["weight_scale"]
        if self.scheme.name == "nvfp4" and (
            scale.dtype != "F8_E4M3" or scale.shape != (shape[0], shape[1] // FP4_BLOCK) or shape[1] % FP4_BLOCK
        ):
            raise _strange(scale, f"F8_E4M3, one for each {FP4_BLOCK} weights of {list(shape)}")
        if self.scheme.name == "int4_awq" and (
            len(scale.shape) != 2 or scale.shape[0] != shape[0] or not scale.shape[1] or shape[1] % scale.shape[1]
        ):
            raise _strange(scale, f"one for each block of the rows of {list(shape)}")

    def _stored_tensor(self, entry: Entry) -> Tensor:
        with fenced(f"cannot read {entry.name} from {entry.file}", _AGAIN), safe_open(entry.file, "pt") as opened:
            return opened.get_tensor(entry.name)


def _before(rounding: Callable[[Tensor, Tensor], Tensor], scale: Tensor) -> Callable[[Any, tuple[Tensor]], Tensor]:
    return lambda _module, inputs: rounding(inputs[0], scale)


def _strange(entry: Entry, allowed: str) -> UserError:
    found = f"{entry.name} in {entry.file} is {brief(entry.dtype)[1:-1]} {brief(list(entry.shape))}"
    return UserError(f"{found}; allowed: {allowed}; {_AGAIN}")
