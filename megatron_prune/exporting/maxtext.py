"""`export --format maxtext`: a checkpoint or a run as a model for MaxText, with its masks.

Orbax and JAX live in an environment of their own (tools/setup_maxtext.sh). The model goes there through a folder in the
unfinished output: an ordinary Hugging Face directory, and the masks, in which padding counts as removed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import numpy as np
import torch
from torch import Tensor

from megatron_prune.config import ExportConfig
from megatron_prune.decision.mask_npz import write_masks
from megatron_prune.decision.masks import Masks, pack_mask, prunable_shapes, unpack_mask
from megatron_prune.decision.pruned import open_source
from megatron_prune.decision.run_folder import decision_of, is_run, read_run
from megatron_prune.decision.target import NM, Unstructured, parse_any_target
from megatron_prune.decision.tiles import broken_groups
from megatron_prune.decision.trimming import is_trim
from megatron_prune.errors import UserError
from megatron_prune.exporting.forms import form_of
from megatron_prune.exporting.huggingface import write_hf
from megatron_prune.exporting.padding import kept_history, padded
from megatron_prune.files import new_folder
from megatron_prune.maxtext import layout
from megatron_prune.maxtext.folder import write_settings
from megatron_prune.model.families import ModelConfig, check_exportable, get_family
from megatron_prune.model.layout import layout_of

VARIABLE = "MEGATRON_PRUNE_MAXTEXT_PYTHON"
_ROOT = Path(__file__).resolve().parents[2]
MaskSource = Callable[[str, Tensor], Tensor]
"""Hugging Face name and weight -> bool mask of the same shape, True = kept."""


def maxtext_python() -> Path:
    """The python of MaxText's environment; UserError when there is none."""
    given = os.environ.get(VARIABLE)
    python = Path(given) if given else _ROOT / ".venv-maxtext" / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"{python} does not exist: MaxText has an environment of its own; make it with tools/setup_maxtext.sh, or "
            f"name its python in {VARIABLE}"
        )
    return python


def export_maxtext(config: ExportConfig) -> None:
    """Write `config.output`. Everything that can be refused is, before the model is loaded."""
    source = open_source(config.input)
    stored = source.config
    masks = _masks_of(config.input, source.history)
    form = form_of(stored, config.layers)
    if form in ("custom", "blocks"):
        raise UserError(f"--layers {form} was given; MaxText has layers of one size: give padded, or leave it out")
    written = get_family(stored.family).uniform(stored) if form == "padded" else stored
    check_exportable(written)
    layout.check(written)
    python = maxtext_python()
    with backend.running(layout_of(config.parallelism)):
        model = source.load(layout_of(config.parallelism))
        kept = _Kept(stored, _source_of(masks))
        weights = kept.watch(model.hf_weights())
        weights = padded(stored, weights) if form == "padded" else weights
        if backend.rank() != 0:
            for _ in weights:  # every rank takes part in gathering each tensor
                pass
            return
        with new_folder(config.output, alone=True) as folder:
            handover, made = folder / "handover", folder / "made"
            history = kept_history(source.history) if form == "padded" else source.history
            write_hf(handover / "hf", written, weights, source.tokenizer, history=history)
            arguments = ["--input", handover / "hf", "--output", made, "--weights-dtype", config.weights_dtype]
            if masks is not None or form == "padded":
                names = prunable_shapes(written)
                found = dict(kept.masks(written if form == "padded" else None))
                pattern = masks.info.target if isinstance(masks, Masks) and form is None else None
                write_masks(handover / "masks.npz", ((name, found[name].numpy()) for name in names), pattern)
                arguments += ["--masks", handover / "masks.npz"]
            call(python, "convert", *arguments)
            shutil.rmtree(handover)
            for part in list(made.iterdir()):
                part.rename(folder / part.name)
            made.rmdir()
            write_settings(folder, config.output, written)


def _masks_of(path: Path, history: dict[str, Any]) -> Masks | NM | Unstructured | None:
    """Which weights stay zero: a run's decision, or those that the pattern a checkpoint was pruned to has made zero."""
    if is_run(path) and read_run(path).method != "train" and not is_trim(decision_of(path)):
        return Masks.load(decision_of(path))
    target = parse_any_target(history["target"]) if history.get("target") else None
    return target if isinstance(target, NM | Unstructured) else None


def _source_of(masks: Masks | NM | Unstructured | None) -> MaskSource:
    if masks is None:
        return lambda _name, weight: torch.ones_like(weight, dtype=torch.bool)
    if isinstance(masks, Masks):
        return lambda name, _weight: masks.get(name)
    target = masks

    def nonzero(name: str, weight: Tensor) -> Tensor:
        mask = weight != 0
        if not isinstance(target, NM) or target.leaves(name):
            return mask
        if broken_groups(mask, target).any():
            raise UserError(f"{name} was pruned to {target} and is not any more: export it with --format hf")
        return mask

    return nonzero


class _Kept:
    """Collects the masks of weights that pass, as bits."""

    def __init__(self, config: ModelConfig, mask_of: MaskSource) -> None:
        self.config = config
        self.shapes = prunable_shapes(config)
        self._mask_of = mask_of
        self._bits: dict[str, np.ndarray] = {}

    def watch(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights."""
        for name, tensor in weights:
            if name in self.shapes:
                self._bits[name] = pack_mask(self._mask_of(name, tensor))
            yield name, tensor

    def masks(self, wide: ModelConfig | None) -> Iterator[tuple[str, Tensor]]:
        """By name; of the padded model `wide`, where what is padding is removed."""
        masks = ((name, unpack_mask(bits, self.shapes[name])) for name, bits in self._bits.items())
        return masks if wide is None else padded(self.config, masks)


def call(python: Path, *arguments: object, on_cpu: bool = True) -> None:
    """A verb of `megatron_prune.maxtext` in its own environment; UserError says what it complained about."""
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1"}
    if on_cpu:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [str(python), "-m", "megatron_prune.maxtext", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if "ModuleNotFoundError" in complaint:
            raise UserError(
                f"{python} is not the Python of MaxText's environment ({complaint}): make that with "
                f"tools/setup_maxtext.sh, or name its python in {VARIABLE}"
            )
        raise UserError(f"{python} could not {arguments[0]} it: {complaint.partition('error: ')[2] or complaint}")
