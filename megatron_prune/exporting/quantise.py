"""`export --quantize`: the linears of the decoder in 8 or 4 bits, as TensorRT-LLM and vLLM read them.

nvidia-modelopt chooses the numbers (its own quantisers, calibrated on our windows) and writes the directory;
config.json and the tokenizer are those of any other export. What was written is then read back: a weight that was zero
is zero, so 2:4 and any other pattern holds. Embedding, output layer and norms stay as they are; int4_awq folds the
scales of inputs into the norms before them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import numpy as np
import torch
from torch import Tensor

from megatron_prune.claims import refuse_existing
from megatron_prune.config import ExportConfig
from megatron_prune.data.calibration import windows
from megatron_prune.data.named import named_files
from megatron_prune.data.tokenizer import form_of, load_tokenizer
from megatron_prune.data.tokenizer_files import copy_tokenizer
from megatron_prune.decision.masks import pack_mask, prunable_shapes, unpack_mask
from megatron_prune.errors import UserError
from megatron_prune.files import new_folder, write_json
from megatron_prune.foreign import quiet, read_json, reason
from megatron_prune.imports import without_megatron, without_triton
from megatron_prune.log import progress
from megatron_prune.model.build import DTYPES
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.length import readable
from megatron_prune.model.packed import PackedReader
from megatron_prune.model.pruning import write_pruning
from megatron_prune.model.quantised import KEY
from megatron_prune.model.transformers_model import filled_model
from megatron_prune.ranks import disk_fault

BLOCKS = {"fp8": (1,), "int4_awq": (128, 64), "nvfp4": (16,)}
"""Inputs that share a scale: the first of these sizes that divides the inputs of every linear."""
_CONFIGS = {"fp8": "FP8_DEFAULT_CFG", "int4_awq": "INT4_AWQ_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
"""nvidia-modelopt's names of its own settings."""
OLDEST = (0, 45)
"""Before it nvfp4 could not be written without a GPU."""
_INSTALL = "pip install 'megatron-prune[modelopt]'"


@dataclass(frozen=True)
class Plan:
    """What is known before the model is loaded."""

    method: str
    block: int
    tokens: Tensor
    """Calibration windows `[count, length]`."""
    tokenizer: Path


def prepare(config: ExportConfig, model: ModelConfig, tokenizer: Path) -> Plan:
    """Everything that can be refused is, before the model is loaded; `tokenizer`: the folder to read it from."""
    assert config.quantize is not None, "checked by the caller"
    refuse_existing(config.output, "export")
    block = block_of(model, config.quantize)
    check_installed()
    if backend.world_size() > 1:
        raise UserError(
            f"--quantize {config.quantize}: {backend.world_size()} processes were started and one quantises; use one"
        )
    c = config.calibration
    length = readable("calibration_seq_length", c.seq_length, model)
    reads = load_tokenizer(tokenizer, model.vocab_size, chat=config.apply_chat_template)
    text = named_files(c.text, c.samples, c.seed, form_of(reads))
    drawn = windows(text, reads, c.samples, length, c.seed, c.document_range)
    return Plan(config.quantize, block, drawn.tokens, tokenizer)


def block_of(model: ModelConfig, method: str) -> int:
    """Inputs that share a scale; UserError for a model that the format has no room for."""
    family, sizes = get_family(model.family), BLOCKS[method]
    if family.conv1d:
        raise UserError(
            f"--quantize {method}: {model.family} models store their linears [in, out], and no engine reads those "
            "quantised by nvidia-modelopt; export without --quantize"
        )
    if family.alternating:
        raise UserError(
            f"--quantize {method}: {model.family} models have the experts of a layer in one tensor, which is not "
            "packed here; export without --quantize"
        )
    shapes = prunable_shapes(model)
    for name, (rows, inputs) in shapes.items():
        if inputs % sizes[-1]:
            raise UserError(
                f"--quantize {method}: blocks of {' or '.join(map(str, sizes))} inputs share a scale and {name} has "
                f"{inputs} inputs: prune to multiples of {sizes[-1]}, or use --quantize fp8"
            )
        if method == "int4_awq" and rows % 2:
            raise UserError(
                f"--quantize {method}: rows are packed in pairs and {name} has {rows}: prune to even numbers, or use "
                "--quantize fp8"
            )
    return next(size for size in sizes if all(shape[1] % size == 0 for shape in shapes.values()))


def check_installed() -> None:
    """UserError without nvidia-modelopt, or with one that is too old."""
    if importlib.util.find_spec("modelopt") is None:
        raise UserError(f"--quantize needs nvidia-modelopt, which is not installed: {_INSTALL}")
    found = version("nvidia-modelopt")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"--quantize needs nvidia-modelopt {oldest} or later, {found} is installed: {_INSTALL}")


def write_quantised(
    output: Path, config: ModelConfig, weights: Iterator[tuple[str, Tensor]], plan: Plan, history: Mapping[str, Any]
) -> list[str]:
    """Write the model's directory; in words, what came of it.

    `weights`: Hugging Face name and tensor; `history`: of the checkpoint.
    """
    zeros = Zeros(config)
    model = filled_model(config, zeros.watch(weights), DTYPES.get(config.dtype, torch.float16))
    zeros.check_scales(plan.method)
    with new_folder(output, alone=True) as partial:
        _quantise(model.to(backend.device()), plan, partial)
        _replace_settings(partial, config, plan.tokenizer)
        write_pruning(partial, history)
        zeros.check(PackedReader(partial))
        after = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    before = sum(zeros.bytes.values())
    size = f", blocks of {plan.block} inputs" if plan.block > 1 else ""
    return [f"{plan.method}{size}: {after:,} bytes instead of {before:,}; {zeros.told()}"]


def _quantise(model: Any, plan: Plan, folder: Path) -> None:
    """Let nvidia-modelopt calibrate a transformers model, and write it."""
    model.config.architectures = [type(model).__name__]  # which it asks for
    said = sys.stdout
    with _foreign(), torch.no_grad():
        quantization, export_hf_checkpoint = _modelopt()
        settings = _settings(quantization, plan)
        quantization.quantize(model, settings, lambda model: _show(model, plan.tokens, said))
        export_hf_checkpoint(model, export_dir=folder)


def _modelopt() -> tuple[Any, Callable[..., None]]:
    """What is used of it."""
    with without_triton():
        import modelopt.torch.quantization as quantization
        from modelopt.torch.export import export_hf_checkpoint
    return quantization, export_hf_checkpoint


def _settings(quantization: Any, plan: Plan) -> dict[str, Any]:
    """Its own settings for a format, with our size of a block."""
    settings: dict[str, Any] = copy.deepcopy(getattr(quantization, _CONFIGS[plan.method]))
    if plan.method == "int4_awq":
        for entry in settings["quant_cfg"]:
            if entry["quantizer_name"] == "*weight_quantizer":
                entry["cfg"]["block_sizes"][-1] = plan.block
    return settings


def _show(model: Any, tokens: Tensor, said: Any) -> None:
    """Run the calibration windows through the model; progress goes to `said`."""
    with contextlib.redirect_stdout(said), progress("quantise", len(tokens), "windows") as advance:
        for window in tokens.to(backend.device()).split(1):
            model(window, use_cache=False)
            advance(1)


@contextlib.contextmanager
def _foreign() -> Iterator[None]:
    """While active, nvidia-modelopt prints nothing, and what it raises is one line; of a full disk it stays.

    It finds no megatron-core, whose classes it would change.
    """
    nowhere = io.StringIO()
    with quiet(), without_megatron(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except Exception as error:
            if isinstance(error, UserError) or disk_fault(error):
                raise
            raise UserError(
                f"nvidia-modelopt {version('nvidia-modelopt')} could not quantise this model ({type(error).__name__}: "
                f"{reason(error)}); export without --quantize, or with another format"
            ) from error


def _replace_settings(folder: Path, config: ModelConfig, tokenizer: Path) -> None:
    """config.json as every export has it, with what nvidia-modelopt says of the format; and the tokenizer."""
    about = read_json(folder / "config.json", "a quantised model")[KEY]
    write_json(folder / "config.json", get_family(config.family).to_hf(config) | {KEY: about})
    (folder / "generation_config.json").unlink(missing_ok=True)  # transformers' own; the model's is with its tokenizer
    for file in folder.glob("*.safetensors"):  # which safetensors keeps from other users
        file.chmod((folder / "config.json").stat().st_mode)
    copy_tokenizer(tokenizer, folder)


class Zeros:
    """Which weights of the decoder's linears are zero, as bits, from before they are quantised."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = prunable_shapes(config)
        self.bytes: dict[str, int] = {}
        """Of every tensor."""
        self._bits: dict[str, np.ndarray] = {}
        self._before = self._after = 0

    def watch(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights."""
        for name, tensor in weights:
            self.bytes[name] = tensor.nbytes
            if name in self.shapes:
                self._bits[name] = pack_mask(tensor == 0)
            yield name, tensor

    def check_scales(self, method: str) -> None:
        """UserError for a weight without a number to take a scale from."""
        for name, bits in self._bits.items():
            if unpack_mask(bits, self.shapes[name]).all():
                raise UserError(
                    f"--quantize {method}: {name} has only zeros, from which no scale follows; prune such layers away "
                    "(num_layers=N), or export without --quantize"
                )

    def check(self, reader: PackedReader) -> None:
        """Read what was written; UserError where a linear is not quantised, or a weight that was zero is not."""
        if set(reader.packed_names()) != set(self.shapes):
            left = sorted(set(self.shapes) - set(reader.packed_names()))
            raise UserError(f"nvidia-modelopt left {len(left)} linears as they were ({left[0]}); nothing is written")
        for name, bits in self._bits.items():
            was, is_now = unpack_mask(bits, self.shapes[name]), reader.read(name)
            if not torch.isfinite(is_now).all():
                raise UserError(f"nvidia-modelopt made numbers of {name} NaN or infinite; nothing is written")
            if lost := int((was & (is_now != 0)).sum()):
                raise UserError(f"nvidia-modelopt gave {lost} zeros of {name} another value; nothing is written")
            self._before += int(was.sum())
            self._after += int((is_now == 0).sum())

    def told(self) -> str:
        """The counts in words."""
        more = self._after - self._before
        return f"all {self._before:,} zeros of the linears stay zeros, {more:,} more weights round to zero"
