"""Windows from several domains in shares that follow their held-out losses (Xia et al. 2023, arXiv:2310.06694, 2.2).

After every `interval` optimizer steps domains whose loss is above what was aimed at are given more of the text to come:

    w <- softmax(log w + max(loss - target, 0)), then w <- (1 - c) w + c / domains         c = 1e-4

Within an interval every window comes from the domain that is furthest behind its share, so no number is drawn and all
processes agree. What a resumed run needs beside its step are the shares, and what is left over from before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_prune.errors import UserError

SMOOTHING = 1e-4
"""Part c of the shares that is the same for every domain, so that none is lost for good."""


class Source(Protocol):
    """One domain's training windows."""

    num_windows: int

    def sample(self, index: int) -> Tensor:
        """Window number `index`: int64 [seq_length + 1]"""

    def info(self) -> dict[str, Any]:
        """Provenance."""


@dataclass(frozen=True)
class Domain:
    """A part of the training text."""

    name: str
    source: Source
    held_out: Tensor
    """int64 [n, seq_length]"""
    target: float
    """Held-out loss that is aimed at, in nats per token."""


def reweighed(weights: Tensor, losses: Tensor, targets: Tensor) -> Tensor:
    """The next shares `[domains]`, float64, of sum 1."""
    excess = (losses - targets).clamp(min=0)
    raised = torch.softmax(weights.log() + excess, 0)
    return (1 - SMOOTHING) * raised + SMOOTHING / len(raised)


class DomainWindows:
    """Training windows whose mixture `update` changes; index by index, from the interval that has begun."""

    def __init__(self, domains: Sequence[Domain], weights: Sequence[float], interval: int, batch: int) -> None:
        """`weights`: of any sum; `interval`: optimizer steps of `batch` windows between updates."""
        self.domains = list(domains)
        self.interval = interval
        self.length = interval * batch
        self.num_windows = sum(domain.source.num_windows for domain in domains)
        given = torch.tensor(weights, dtype=torch.float64)
        self.initial = (given / given.sum()).tolist()
        self.first = 0
        """Index of the interval's first window."""
        self.weights = given / given.sum()
        self.credit = torch.zeros_like(given)
        """Windows that each domain is behind its share, at the interval's begin; the sum is 0."""
        self.counts = torch.zeros(len(given), dtype=torch.int64)
        """Windows taken from each domain before it."""
        self._plan()

    def _plan(self) -> None:
        """Domain and number in it of the windows of this interval, and credit and counts behind it."""
        shares, credit, counts = self.weights.tolist(), self.credit.tolist(), self.counts.tolist()
        self.places: list[tuple[int, int]] = []
        for _ in range(self.length):
            credit = [behind + share for behind, share in zip(credit, shares, strict=True)]
            chosen = max(range(len(credit)), key=credit.__getitem__)
            self.places.append((chosen, counts[chosen]))
            credit[chosen] -= 1
            counts[chosen] += 1
        self.next = torch.tensor(credit, dtype=torch.float64), torch.tensor(counts)

    def sample(self, index: int) -> Tensor:
        """Window number `index`, of the interval that has begun."""
        assert index >= self.first, "an earlier interval's shares are gone"
        domain, number = self.places[index - self.first]
        return self.domains[domain].source.sample(number)

    def update(self, step: int, losses: Sequence[float]) -> dict[str, float]:
        """Begin the next interval after `step` optimizer steps, given each domain's held-out loss; what to log.

        UserError names a domain whose loss is no number.
        """
        for domain, loss in zip(self.domains, losses, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the held-out loss of domain {domain.name} is {loss} after step {step}; the last checkpoint is "
                    "kept: look at its text, or resume with a lower learning rate"
                )
        self.first += self.length
        self.credit, self.counts = self.next
        targets = torch.tensor([domain.target for domain in self.domains], dtype=torch.float64)
        self.weights = reweighed(self.weights, torch.tensor(losses, dtype=torch.float64), targets)
        self._plan()
        total = int(self.counts.sum())
        record: dict[str, float] = {}
        for domain, loss, weight, count in zip(self.domains, losses, self.weights, self.counts, strict=True):
            record |= {
                f"domain_weight/{domain.name}": float(weight),
                f"domain_loss/{domain.name}": loss,
                f"domain_share/{domain.name}": int(count) / total,
            }
        return record

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"first": self.first, "weights": self.weights, "credit": self.credit, "counts": self.counts}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.first = int(state["first"])
        self.weights, self.credit, self.counts = (state[key].clone() for key in ("weights", "credit", "counts"))
        self._plan()

    def info(self) -> dict[str, Any]:
        """Provenance, for the log."""
        return {
            "interval": self.interval,
            "weights": self.initial,
            "targets": {domain.name: domain.target for domain in self.domains},
            "domains": [domain.source.info() for domain in self.domains],
        }
