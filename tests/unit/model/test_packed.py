"""Models that nvidia-modelopt has quantised, read without it: numbers, tensors, and what cannot be right."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.evaluation import hugging_face
from megatron_prune.model import packed
from megatron_prune.model.convert import HFReader
from megatron_prune.model.packed import PackedReader, open_reader
from tests.models import ALGORITHMS, FP4_VALUES, packed_llama

STEP = {"fp8": 2**-4, "int4_awq": 1 / 14, "nvfp4": 1 / 6 + 2**-4}
"""Largest error of a rounded weight, as a share of the largest weight that has its scale."""


@pytest.mark.parametrize("form", ALGORITHMS)
def test_weights_are_what_was_packed(tmp_path: Path, form: str) -> None:
    path, plain = packed_llama(tmp_path / "hf", form)
    reader = open_reader(path)
    assert isinstance(reader, PackedReader) and sorted(reader.names()) == sorted(plain)
    assert len(reader.packed_names()) == 7
    for name, weight in plain.items():
        found = reader.read(name)
        if name not in reader.packed_names():
            assert torch.equal(found, weight)
            continue
        error = (found / (torch.linspace(0.5, 2, weight.shape[1]) if form == "int4_awq" else 1) - weight).abs()
        most = weight.abs().max() * STEP[form] * 1.01
        assert 0 < error.max() <= most and error.mean() < most / 2, name
        assert not (torch.signbit(found) & (found == 0)).any()
        assert torch.equal(reader.read_rows(name, 3, 5), found[3:5])


@pytest.mark.parametrize("form", ALGORITHMS)
def test_whoever_needs_plain_weights_still_refuses(tmp_path: Path, form: str) -> None:
    with pytest.raises(UserError, match=r"quantised \(modelopt\), and pruning needs its plain weights"):
        HFReader(packed_llama(tmp_path / "hf", form)[0])


def test_every_code_of_four_bits() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    scale = torch.linspace(0.5, 8, 16)[:, None].expand(16, 2).to(torch.float8_e4m3fn)
    found = packed.from_fp4(codes, scale, torch.tensor(0.25))
    signed = [value * sign for sign in (1, -1) for value in FP4_VALUES]
    for row, column in itertools.product(range(16), range(32)):
        code = int(codes[row, column // 2]) // (16 if column % 2 else 1) % 16
        assert found[row, column] == signed[code] * float(scale[row, 0]) * 0.25
    whole = packed.from_int4(codes, torch.full((32, 4), 0.5))
    for row, column in itertools.product(range(32), range(16)):
        code = int(codes[row // 2, column]) // (16 if row % 2 else 1) % 16
        assert whole[row, column] == (code if code < 8 else code - 16) * 0.5


def test_inputs_are_rounded_to_the_nearest_value_and_ties_to_the_even_code() -> None:
    """Of all multiples of 1/8: the block's largest is 6, so that its scale is one."""
    grid = torch.arange(-48, 49) / 8
    rows = torch.stack([torch.full((16,), 6.0).index_fill(0, torch.tensor(0), float(x)) for x in grid])
    found = packed.round_fp4(rows, torch.tensor(1 / 448))[:, 0]
    for x, got in zip(grid.tolist(), found.tolist(), strict=True):
        nearest = min(range(8), key=lambda code: (abs(FP4_VALUES[code] - abs(x)), code % 2))
        assert abs(got) == pytest.approx(FP4_VALUES[nearest]) and got * x >= 0, x


def test_float8_saturates_and_zero_blocks_stay_zero() -> None:
    x = torch.tensor([[1e4, -1e4, 0.0, 1.0] * 4])
    assert packed.round_fp8(x, torch.tensor(1.0))[0, :4].tolist() == [448, -448, 0, 1]
    assert packed.round_fp8(x.bfloat16(), torch.tensor(1.0)).dtype == torch.bfloat16
    assert not packed.round_fp4(torch.zeros(2, 32), torch.tensor(0.5)).any()


@pytest.mark.parametrize("form", ALGORITHMS)
def test_a_model_computes_with_rounded_weights_and_inputs(tmp_path: Path, form: str) -> None:
    """Against products written out for one linear, and against the plain model."""
    path, _ = packed_llama(tmp_path / "hf", form)
    reader = open_reader(path)
    assert isinstance(reader, PackedReader)
    model = hugging_face.load(reader, "float32")
    linear = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.down_proj."
    stored = load_file(path / "model.safetensors")
    rounded = x
    if form == "fp8":
        scale = stored[name + "input_scale"]
        rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    elif form == "nvfp4":
        blocks = x.unflatten(1, (-1, 16))
        sizes = (blocks.abs().amax(2, keepdim=True) / 6 / 0.01).to(torch.float8_e4m3fn).float() * 0.01
        codes = (blocks / sizes).abs()[..., None].sub(torch.tensor(FP4_VALUES)).abs().argmin(-1)
        rounded = (torch.tensor(FP4_VALUES)[codes] * blocks.sign() * sizes).flatten(1)
    assert torch.equal(rounded, x) == (form == "int4_awq")
    with torch.no_grad():
        assert torch.allclose(linear(x), rounded @ reader.read(name + "weight").T, atol=1e-5)
        assert torch.isfinite(model(torch.arange(12)[None]).logits).all()
    assert hugging_face.about(reader, "float32") == {"kind": "hugging face", "dtype": "float32", "quantised": form}


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return apply


def _setting(**values: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] |= values
        (path / "config.json").write_text(json.dumps(config))

    return apply


UP = "model.layers.0.mlp.up_proj."
WRONG: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "algorithm": ("fp8", _setting(quant_algo="MXFP8"), "quantization_config: key 'quant_algo': 'MXFP8' given"),
    "cache": ("fp8", _setting(kv_cache_scheme={"num_bits": 8}), "key 'kv_cache_scheme'"),
    "scale": ("fp8", _tensors(lambda t: t.pop(UP + "input_scale")), f"no tensor {UP}input_scale, which fp8 needs"),
    "codes": ("fp8", _tensors(lambda t: t.pop(UP + "weight")), f"no tensor {UP}weight, which fp8 needs"),
    "other form": ("fp8", _setting(quant_algo="NVFP4"), "has no tensor .*weight_scale_2, which nvfp4 needs"),
    "type": ("nvfp4", _tensors(lambda t: t.update({UP + "weight": t[UP + "weight"].to(torch.int16)})), "is I16 .*U8"),
    "many": ("fp8", _tensors(lambda t: t.update({UP + "weight_scale": torch.ones(3)})), r"F32 \[3\]; .*one number"),
    "blocks": ("nvfp4", _tensors(lambda t: t.update({UP + "weight_scale": torch.ones(64, 1)})), "one for each 16"),
    "rows": (
        "int4_awq",
        _tensors(lambda t: t.update({UP + "weight_scale": torch.ones(3, 2)})),
        "each block of the rows",
    ),
    "inputs": (
        "int4_awq",
        _tensors(lambda t: t.update({UP + "pre_quant_scale": torch.ones(5)})),
        "allowed: 32 numbers",
    ),
    "shape": (
        "fp8",
        _tensors(lambda t: t.update({UP + "weight": t[UP + "weight"][:8]})),
        r"has shape \[8, 32\]; config",
    ),
    "more": ("fp8", _tensors(lambda t: t.update({"x.input_scale": torch.ones(())})), "holds x.input_scale, which"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_right_is_one_line(tmp_path: Path, name: str) -> None:
    form, change, complaint = WRONG[name]
    path, _ = packed_llama(tmp_path / "hf", form)
    change(path)
    with pytest.raises(UserError, match=complaint) as raised:
        open_reader(path)
    assert "\n" not in str(raised.value)
