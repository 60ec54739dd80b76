"""What candidates of a search were found to be, so that none is judged twice on a window.

A divergence depends on candidate and window alone, so memory saves time and decides nothing: what is forgotten is
measured again, to the same bits. On disk, the candidates that were asked for last, the last of them last:

    RUN/judged.safetensors    genomes int32 [n, genes], trained int64 [n], counts int64 [n],
                              divergences float64 [n, windows], 0 behind the counts
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_prune.files import by_leader, from_leader, own_file
from megatron_prune.foreign import fenced
from megatron_prune.search.fitness import Genome
from megatron_prune.tensor_files import read_tensors, write_tensors

FILE = "judged.safetensors"
MOST = 1024
"""Candidates that are remembered."""
Known = OrderedDict[tuple[Genome, int], list[float]]


class Memory:
    """Divergences of candidates on a fixed list of windows, by genome and tokens of training. The same on all ranks."""

    def __init__(self, folder: Path, last: Sequence[int], windows: int) -> None:
        """`last`: the highest level of each gene. Collective."""
        self.file, self.last, self.windows = folder / FILE, last, windows
        self.found: Known = OrderedDict()
        by_leader(self._read)
        self.found = from_leader(self.found)

    def known(self, genome: Genome, trained: int) -> list[float]:
        """Divergences on the first windows of the list, as many as there are."""
        return self.found.get((genome, trained), [])

    def keep(self, trained: int, found: Mapping[Genome, list[float]]) -> None:
        """Remember these candidates, and forget those that were not asked for the longest time."""
        for genome, values in found.items():
            self.found[genome, trained] = values
            self.found.move_to_end((genome, trained))
        while len(self.found) > MOST:
            self.found.popitem(last=False)

    def save(self) -> None:
        """Write the file anew. Collective."""
        by_leader(self._write)

    def _write(self) -> None:
        divergences = torch.zeros(len(self.found), self.windows, dtype=torch.float64)
        for row, values in zip(divergences, self.found.values(), strict=True):
            row[: len(values)] = torch.tensor(values, dtype=torch.float64)
        tensors = {
            "genomes": torch.tensor([genome for genome, _ in self.found], dtype=torch.int32),
            "trained": torch.tensor([trained for _, trained in self.found], dtype=torch.int64),
            "counts": torch.tensor([len(values) for values in self.found.values()], dtype=torch.int64),
            "divergences": divergences,
        }
        with own_file(self.file) as partial:
            write_tensors(tensors, partial)

    def _read(self) -> None:
        if not self.file.exists():
            return
        with fenced(f"{self.file} is damaged", "remove it and run again"):
            tensors = read_tensors(self.file)
            genomes, trained, counts = (tensors[name].tolist() for name in ("genomes", "trained", "counts"))
            values = tensors["divergences"].tolist()
            for genome, tokens, count, row in zip(genomes, trained, counts, values, strict=True):
                self._check(genome, count, row)
                self.found[tuple(genome), tokens] = row[:count]

    def _check(self, genome: list[int], count: int, row: list[float]) -> None:
        """ValueError for what cannot be of this search."""
        sizes = len(genome) == len(self.last) and len(row) == self.windows and 0 < count <= self.windows
        if not sizes or any(not 0 <= a <= b for a, b in zip(genome, self.last, strict=True)):
            raise ValueError("it is of another search")
