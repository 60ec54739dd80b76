"""A runner over plain matrices, with their rows shared between threads that stand for ranks.

The model is a chain: y = tanh(W x), layer after layer, so that later statistics depend on earlier pruning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_prune.decision.target import parse_target
from megatron_prune.methods.base import PruningMethod


@dataclass
class Cluster:
    """Layers `name -> W [out, in]`, calibration windows [tokens, in], and so many ranks."""

    weights: dict[str, Tensor]
    windows: list[Tensor]
    ranks: int = 1
    blocks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def prune(self, method: PruningMethod, target: object) -> Cluster:
        """Prune on all ranks at once; the pruned weights and masks, whole, are left here."""
        self.weights = {name: weight.clone() for name, weight in self.weights.items()}
        self.barrier = threading.Barrier(self.ranks)
        self.shared: list[Any] = [None] * self.ranks
        with ThreadPoolExecutor(self.ranks) as pool:
            runs = [pool.submit(self._rank, method, parse_target(target), rank) for rank in range(self.ranks)]
        for run in runs:
            run.result()
        return self

    def _rank(self, method: PruningMethod, target: Any, rank: int) -> None:
        try:
            method.decide(RankRunner(self, rank), target)  # type: ignore[arg-type]
        except BaseException:
            self.barrier.abort()
            raise

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        self.shared[rank] = value
        self.barrier.wait()
        everyone = list(self.shared)
        self.barrier.wait()
        return everyone


@dataclass
class RankRunner:
    cluster: Cluster
    rank: int

    def linears(self, statistic: Callable[[int], Any] | None, sequential: bool = False) -> Iterator[RankLinear]:
        windows = self.cluster.windows
        for name, weight in self.cluster.weights.items():
            linear = RankLinear(self, name, weight, statistic and collect(statistic, windows))
            yield linear
            linear.settle()
            windows = [torch.tanh(x @ self.cluster.weights[name].t().to(x.dtype)) for x in windows]

    def masks(self) -> Any:
        return SimpleNamespace()


def collect(statistic: Callable[[int], Any], windows: list[Tensor]) -> Any:
    collected = statistic(windows[0].shape[1])
    for x in windows:
        collected.update(x)
    return collected


class RankLinear:
    def __init__(self, runner: RankRunner, name: str, weight: Tensor, statistic: Any) -> None:
        self.runner, self.name, self.statistic, self.whole = runner, name, statistic, weight
        out, ranks = len(weight), runner.cluster.ranks
        self.rows = slice(out * runner.rank // ranks, out * (runner.rank + 1) // ranks)
        self.blocks = runner.cluster.blocks.get(name, {name: torch.arange(out)})

    def weight(self) -> Tensor:
        return self.whole[self.rows].float()

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.runner.cluster.exchange(self.runner.rank, x))

    def local(self, x: Tensor) -> Tensor:
        return x[self.rows]

    def keep(self, mask: Tensor, weight: Tensor | None = None) -> None:
        assert mask.dtype == torch.bool and mask.shape == self.weight().shape
        self.mask, self.new = mask, self.weight() if weight is None else weight

    def settle(self) -> None:
        mask, new = self.gather(self.mask), self.gather(self.new)
        self.runner.cluster.masks[self.name] = mask
        self.runner.cluster.weights[self.name] = new * mask
        self.runner.cluster.exchange(self.runner.rank, None)
