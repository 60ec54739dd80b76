"""A database of levels: every half of every layer at several sizes, refitted, to be put together by a search.

A level is what stays of a layer's attention (heads, equally many in every group; for groups of one head, groups) or of
its MLP (neurons), and the weight of the linear behind them once it has been refitted to do without the rest: structured
optimal brain surgeon, unit by unit (ZipLM, Kurtic et al. 2023, arXiv:2302.04089; DarwinLM, Tang et al. 2025,
arXiv:2502.07780, section 3.1). Level 0 is the whole half, the last level none of it. On disk, per half of a layer, kept
numbers and kept columns only:

    DIR/statistics.json                    model, weights and calibration windows that it was made from; see `store`
    DIR/levels.json                        sizes of all levels, damping
    DIR/00017.mlp.safetensors              "3.kept" int32 [units], "3.weight" [hidden, inputs], "errors" [levels]

The halves are shared out over all ranks. A file is there when it is complete, so a killed build goes on where it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.decision.units import BlockUnits, all_of_block, channels_of, heads_of
from megatron_prune.errors import UserError
from megatron_prune.files import own_file, write_json
from megatron_prune.foreign import fenced, read_json
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.prunable import FC2, PROJECTION
from megatron_prune.ranks import by_leader, from_leader, together
from megatron_prune.statistics.channels import Gram
from megatron_prune.statistics.passes import Passes
from megatron_prune.statistics.reconstruction import Reconstruction, groups_to_keep, heads_to_keep
from megatron_prune.statistics.store import StatisticsStore
from megatron_prune.tensor_files import read_tensors, write_tensors

FILE = "levels.json"
ATTENTION, MLP = "attention", "mlp"
KINDS = {ATTENTION: PROJECTION, MLP: FC2}
"""The halves of a layer, and the linear that each of them ends with."""


@dataclass(frozen=True)
class Level:
    """Size of a half of a layer."""

    groups: int = 0
    heads: int = 0
    """In each group."""
    ffn: int = 0


def attention_levels(config: ModelConfig, layer: int, count: int, free_groups: bool = False) -> list[Level]:
    """From all heads to none, about `count` steps: fewer heads in every group, or fewer groups of one head.

    With `free_groups` the larger of both numbers falls by one each time, `count` or more levels apart: 3 groups of 3
    heads are 9, 6, 4, 2 and 1 heads. Groups of unequal sizes, which neither megatron-core nor transformers has, are
    not among them.
    """
    block = config.block(layer)
    groups, heads = block.num_query_groups, block.group_heads
    if free_groups and min(groups, heads) > 1:
        return [*_falling(groups, heads, count), Level()]
    if heads > 1:
        return [*(Level(groups, kept) for kept in _spaced(heads, count)), Level()]
    return [*(Level(kept, 1) for kept in _spaced(groups, count)), Level()]


def _falling(groups: int, heads: int, count: int) -> list[Level]:
    """Heads in each group and groups in turn, thinned out to about `count` levels; the whole is the first."""
    found = [Level(groups, heads)]
    while groups * heads > 1:
        groups, heads = (groups - 1, heads) if groups > heads else (groups, heads - 1)
        found.append(Level(groups, heads))
    stride = max(1, round(len(found) / count))
    return found[::stride]


def mlp_levels(config: ModelConfig, layer: int, count: int) -> list[Level]:
    """From all neurons to none in `count` steps, sizes being multiples of 8 where that is fine enough."""
    width = config.block(layer).ffn_hidden_size
    unit = 8 if width // count >= 16 else 1
    return [*(Level(ffn=kept) for kept in _spaced(width, count, unit)), Level()]


def _spaced(whole: int, count: int, unit: int = 1) -> list[int]:
    """`whole` and about `count` - 1 smaller sizes above 0, evenly spaced, in falling order."""
    sizes = {round(whole * (count - step) / count / unit) * unit for step in range(1, count)}
    return sorted({whole, *(size for size in sizes if 0 < size < whole)}, reverse=True)


class Levels:
    """The database of one model in a folder. Made and used by all ranks together."""

    def __init__(self, folder: Path, passes: Passes, count: int, damping: float, free_groups: bool = False) -> None:
        assert passes.tokens is not None
        self.folder = folder
        self.config = passes.model.config
        self.damping = damping
        self.sizes: dict[str, list[list[Level]]] = {
            kind: [self._there(kind, layer, count, free_groups) for layer in range(self.config.num_layers)]
            for kind in KINDS
        }
        StatisticsStore(folder, passes.model, passes.tokens)  # refuses a folder that was made from something else
        by_leader(self._describe)
        self.cache: dict[tuple[str, int], dict[str, Tensor]] = {}

    def _there(self, kind: str, layer: int, count: int, free_groups: bool) -> list[Level]:
        """Levels of a half; of one that the model lacks, its absence only."""
        block = self.config.block(layer)
        if kind == ATTENTION:
            return attention_levels(self.config, layer, count, free_groups) if block.num_attention_heads else [Level()]
        return mlp_levels(self.config, layer, count) if block.ffn_hidden_size else [Level()]

    def _describe(self) -> None:
        about = {
            "damping": self.damping,
            **{kind: [[vars(level) for level in levels] for levels in found] for kind, found in self.sizes.items()},
        }
        if not (self.folder / FILE).exists():
            write_json(self.folder / FILE, about)
        elif read_json(self.folder / FILE, "a database of levels") != about:
            raise UserError(f"{self.folder} has other levels or damping: give the same, or a new folder")

    def _file(self, kind: str, layer: int) -> Path:
        return self.folder / f"{layer:05d}.{kind}.safetensors"

    def _missing(self) -> list[tuple[int, str]]:
        """Halves that have no file yet, as rank 0 sees it. Collective."""
        jobs = [(layer, kind) for layer in range(self.config.num_layers) for kind in KINDS]
        return from_leader(
            [(n, kind) for n, kind in jobs if len(self.sizes[kind][n]) > 1 and not self._file(kind, n).exists()]
        )

    def build(
        self,
        passes: Passes,
        progress: Callable[[int], None] = lambda layers: None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Make what is missing, as many layers at a time as there are ranks: each has one attention and one MLP.

        `between` is called after each round. Collective.
        """
        missing = set(self._missing())
        if not missing:
            return
        world = dist.get_world_size()
        mine: list[Job] = []
        for layer, seen in enumerate(passes.observe_each(dict.fromkeys(KINDS.values(), Gram))):
            for shift, (kind, path) in enumerate(KINDS.items()):
                if (layer, kind) in missing:
                    weight = passes.weight(layer, path)
                    if (layer + shift) % world == backend.rank():
                        mine.append((layer, kind, weight, seen[path].value()))
            if (layer + 1) % world == 0 or layer + 1 == self.config.num_layers:
                together(functools.partial(self._make_all, mine))
                mine.clear()
                between()
            progress(1)

    def _make_all(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._make(*job)

    def _make(self, layer: int, kind: str, weight: Tensor, gram: Tensor) -> None:
        """All levels of a half, in a file that appears whole."""
        linear = Reconstruction(weight, gram, self.damping)
        steps = attention_steps if kind == ATTENTION else mlp_steps
        wide = weight.double()
        whole = float(((wide @ gram.double()) * wide).sum())
        tensors, errors = {}, [0.0]
        for number, (kept, inputs) in enumerate(steps(self.config, layer, linear, self.sizes[kind][layer]), start=1):
            fitted = linear.weight[:, inputs].to(weight.dtype)
            tensors[f"{number}.kept"] = torch.tensor(kept, dtype=torch.int32)
            tensors[f"{number}.weight"] = fitted.contiguous().cpu()
            change = wide.clone()
            change[:, inputs] -= fitted.double()
            errors.append(float(((change @ gram.double()) * change).sum()) / whole if whole else 0.0)
        tensors["errors"] = torch.tensor([*errors, 1.0 if whole else 0.0], dtype=torch.float64)
        with own_file(self._file(kind, layer)) as partial:
            write_tensors(tensors, partial)

    def _tensors(self, kind: str, layer: int) -> dict[str, Tensor]:
        if (kind, layer) not in self.cache:
            file = self._file(kind, layer)
            with fenced(f"{file} is missing or damaged", "remove it and run again"):
                found = read_tensors(file)
                self._check(kind, layer, found)
            self.cache[kind, layer] = found
        return self.cache[kind, layer]

    def _check(self, kind: str, layer: int, found: dict[str, Tensor]) -> None:
        """ValueError unless there are errors of all levels, and units and weights of those in between."""
        levels, block = self.sizes[kind][layer], self.config.block(layer)
        count, width = (
            (block.ffn_hidden_size, 1) if kind == MLP else (block.num_attention_heads, self.config.kv_channels)
        )
        wanted: dict[str, tuple[int, ...]] = {"errors": (len(levels),)}
        for number, level in enumerate(levels[1:-1], start=1):
            kept = level.ffn if kind == MLP else level.groups * level.heads
            wanted |= {f"{number}.kept": (kept,), f"{number}.weight": (self.config.hidden_size, kept * width)}
        for name, shape in wanted.items():
            if found[name].shape != shape or found[name].is_floating_point() == name.endswith("kept"):
                raise ValueError(f"{name} is {found[name].dtype} of shape {list(found[name].shape)}, not {list(shape)}")
            if name.endswith("kept"):
                units = found[name].tolist()
                if units != sorted(set(units)) or not 0 <= units[0] <= units[-1] < count:
                    raise ValueError(f"{name} are not rising numbers below {count}")

    def error(self, kind: str, layer: int, level: int) -> float:
        """Squared output error of a level, as a share of the linear's squared output on the calibration text."""
        return float(self._tensors(kind, layer)["errors"][level]) if len(self.sizes[kind][layer]) > 1 else 0.0

    def units(self, layer: int, attention: int, mlp: int) -> BlockUnits:
        """What stays of a layer at these levels."""
        whole = all_of_block(self.config, layer)
        heads, ffn = whole.heads, whole.ffn
        if attention:
            heads = self._kept(ATTENTION, layer, attention)
        if mlp:
            ffn = self._kept(MLP, layer, mlp)
        groups = tuple(g for g in whole.groups if set(heads_of(self.config, layer, g)) & set(heads))
        return BlockUnits(groups, heads, ffn)

    def gone(self, kind: str, layer: int, level: int) -> bool:
        """Whether nothing is left of the half at this level."""
        return level == len(self.sizes[kind][layer]) - 1

    def _kept(self, kind: str, layer: int, level: int) -> tuple[int, ...]:
        if self.gone(kind, layer, level):
            return ()
        return tuple(self._tensors(kind, layer)[f"{level}.kept"].tolist())

    def weight(self, kind: str, layer: int, level: int, whole: Tensor) -> Tensor:
        """The linear behind a half at a level, in the shape of the `whole` one, zero where inputs are gone."""
        if level == 0:
            return whole
        kept = self._kept(kind, layer, level)
        if not kept:
            return torch.zeros_like(whole)
        inputs = torch.tensor(kept) if kind == MLP else channels_of(kept, self.config.kv_channels)
        fitted = self._tensors(kind, layer)[f"{level}.weight"].to(whole.device, whole.dtype)
        return torch.zeros_like(whole).index_copy_(1, inputs.to(whole.device), fitted)


Job = tuple[int, str, Tensor, Tensor]
"""A half of a layer: number, kind, weight and second moments of its inputs."""
Step = tuple[tuple[int, ...], Tensor]
"""Units that stay, and the inputs of the linear that they are."""


def attention_steps(config: Any, layer: int, linear: Reconstruction, levels: list[Level]) -> Iterator[Step]:
    """Heads and their inputs at every level but the first and the last; `linear` is refitted to each in turn."""
    groups: tuple[int, ...] = tuple(range(levels[0].groups))
    kept: dict[int, list[int]] = {group: list(heads_of(config, layer, group)) for group in groups}
    for level in levels[1:-1]:
        if level.groups < len(kept):
            stay = groups_to_keep(config, layer, linear, level.groups, tuple(kept))
            kept = {group: kept[group] for group in stay}
        if level.heads < len(next(iter(kept.values()))):
            stay = heads_to_keep(config, layer, linear, kept, level.heads)
            kept = {group: [head for head in heads if head in stay] for group, heads in kept.items()}
        heads = tuple(sorted(head for group in kept.values() for head in group))
        yield heads, channels_of(heads, config.kv_channels)


def mlp_steps(config: Any, layer: int, linear: Reconstruction, levels: list[Level]) -> Iterator[Step]:
    """As `attention_steps`, neurons one by one."""
    del config, layer
    for level in levels[1:-1]:
        kept = linear.shrink(level.ffn)
        yield tuple(kept.tolist()), kept
