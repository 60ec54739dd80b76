"""Statistics of a model on disk, so that another target, or another method, needs no new pass over the text.

    DIR/statistics.json                                 what was measured: model, weights, calibration windows; complete
    DIR/00017.mlp.linear_fc2.ChannelActivations.safetensors     one layer's accumulators, numbered in their order

All accumulators are sums over windows, the same in every parallel layout. Files of an unfinished pass are not used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from pydantic import with_config
from torch import Tensor
from typing_extensions import TypedDict

from megatron_prune.claims import PARTIAL
from megatron_prune.errors import UserError
from megatron_prune.files import own_file, write_json
from megatron_prune.foreign import fenced, read_format, strict
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.ranks import by_leader, from_leader
from megatron_prune.schema import Count, Word
from megatron_prune.tensor_files import read_tensors, write_tensors

FILE = "statistics.json"
_FORMAT = 1
SAMPLED = 4096
"""So many numbers of every tensor tell one model's weights from another's."""

Statistic = Callable[..., Any]
"""A class of accumulators: made of (channels, device), with `update` and `tensors`."""


@with_config(strict())
class _File(TypedDict):
    """What is in the description."""

    format: Literal[1]
    model: Word
    weights: Word
    windows: list[Count]
    tokens: Word
    complete: list[Word]


class StatisticsStore:
    """A folder of statistics of one model on one set of windows. Made and used by all ranks together."""

    def __init__(self, folder: Path, model: PrunableModel, tokens: Tensor) -> None:
        self.folder = folder
        self.about = {
            "format": _FORMAT,
            "model": model.config.fingerprint(),
            "weights": _weights_digest(model),
            "windows": list(tokens.shape),
            "tokens": hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest(),
        }
        self.finished: set[str] = set()
        self.parts: list[StatisticsStore] = []
        by_leader(self._open)
        self.finished = from_leader(self.finished)

    def _open(self) -> None:
        """Find out what is complete."""
        if not (self.folder / FILE).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(not path.name.endswith(PARTIAL) for path in self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty and holds no statistics: give another folder")
            self._describe()
            return
        found = read_format(self.folder / FILE, "a folder of statistics", _FORMAT, _File)
        for key, value in self.about.items():
            if found.get(key) != value:
                raise UserError(
                    f"{self.folder} was made with another {key}: give a new folder, or the same model and "
                    "calibration options"
                )
        self.finished = set(found["complete"])

    def part(self, name: str, model: PrunableModel, tokens: Tensor) -> StatisticsStore:
        """A folder in this one, of the same model on some of the windows. Collective."""
        self.parts.append(StatisticsStore(self.folder / name, model, tokens))
        return self.parts[-1]

    def forget(self) -> None:
        """Remove a folder in which nothing is complete: a run that fails leaves no other."""
        for part in self.parts:
            part.forget()
        if backend.rank() == 0 and not any(store.finished for store in (self, *self.parts)):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _describe(self) -> None:
        write_json(self.folder / FILE, {**self.about, "complete": sorted(self.finished)})

    def has(self, sites: Mapping[str, Statistic]) -> bool:
        """Whether all these statistics are there, of every layer."""
        return all(self._kept(site, kind) in self.finished for site, kind in sites.items())

    def _kept(self, site: str, kind: Statistic) -> str:
        """The name under which a statistic is there, or would be: one that begins as it does will do."""
        names = [_name(site, each) for each in (kind, *kind.__subclasses__())]  # type: ignore[attr-defined]
        return next((name for name in names if name in self.finished), names[0])

    def write(self, layer: int, found: Mapping[str, Any]) -> None:
        """Keep a layer's statistics by site, those that are not there; rank 0 writes. Collective."""

        def save() -> None:
            for site, statistic in found.items():
                if _name(site, type(statistic)) not in self.finished:
                    tensors = {str(n): tensor.cpu().contiguous() for n, tensor in enumerate(statistic.tensors())}
                    file = self._file(layer, _name(site, type(statistic)))
                    with own_file(file) as partial:
                        write_tensors(tensors, partial)

        by_leader(save)

    def complete(self, sites: Mapping[str, Statistic]) -> None:
        """Note that these statistics are there of every layer. Collective."""
        self.finished |= {_name(site, kind) for site, kind in sites.items()}
        by_leader(self._describe)

    def read(self, layer: int, into: Mapping[str, Any]) -> None:
        """Fill fresh statistics with what was kept."""
        for site, statistic in into.items():
            file = self._file(layer, self._kept(site, type(statistic)))
            with fenced(f"{file} is missing or damaged", f"remove {self.folder}"):
                kept = read_tensors(file)
                for number, tensor in enumerate(statistic.tensors()):
                    tensor.copy_(kept[str(number)].view(tensor.shape))

    def _file(self, layer: int, name: str) -> Path:
        return self.folder / f"{layer:05d}.{name}.safetensors"


def _name(site: str, kind: Statistic) -> str:
    return f"{site}.{kind.__name__}"


def _weights_digest(model: PrunableModel) -> str:
    """Of evenly spaced numbers of every tensor, the same in every layout. Collective."""
    seen = hashlib.sha256()
    for map in model.maps:
        numbers = model.whole(map).detach().flatten()
        sample = numbers[:: max(1, len(numbers) // SAMPLED)].float().cpu()
        seen.update(json.dumps([map.megatron, list(map.shape)]).encode() + sample.numpy().tobytes())
    return seen.hexdigest()
