"""Shares of domains: their update, what is taken of each, what a resumed run needs, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from megatron_prune.data.domains import SMOOTHING, Domain, DomainWindows, reweighed
from megatron_prune.data.training import training_windows
from megatron_prune.errors import UserError
from megatron_prune.option_groups import Training
from tests.models import byte_tokenizer, tiny_llama, words

TARGETS = {"code": 1.0, "books": 2.0, "web": 3.0}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(byte_tokenizer(tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=257)))


class Numbers:
    """Windows that say which domain they are of, and which they are."""

    num_windows = 1000

    def __init__(self, domain: int) -> None:
        self.domain = domain

    def sample(self, index: int) -> Tensor:
        return torch.tensor([self.domain, index])

    def info(self) -> dict[str, Any]:
        return {}


def mixture(weights: tuple[float, ...] = (6, 3, 1)) -> DomainWindows:
    held_out = torch.zeros(1, 2, dtype=torch.int64)
    domains = [Domain(name, Numbers(n), held_out, target) for n, (name, target) in enumerate(TARGETS.items())]
    return DomainWindows(domains, weights, interval=5, batch=8)


def taken(data: DomainWindows, first: int, count: int = 40) -> list[tuple[int, int]]:
    return [tuple(data.sample(first + index).tolist()) for index in range(count)]


def test_excess_raises_a_share() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = reweighed(weights, torch.tensor([2.0, 1.0, 5.0]).double(), torch.tensor([1.0, 2.0, 5.0]).double())
    raised = torch.tensor([0.5 * torch.e, 0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(found, (1 - SMOOTHING) * raised / raised.sum() + SMOOTHING / 3)
    lost = reweighed(torch.tensor([1.0, 0.0]).double(), torch.zeros(2).double(), torch.zeros(2).double())
    assert float(lost[1]) == pytest.approx(SMOOTHING / 2)


def test_windows_come_in_their_shares_and_none_twice() -> None:
    data = mixture()
    found = taken(data, 0)
    assert [sum(domain == n for domain, _ in found) for n in range(3)] == [24, 12, 4]
    record = data.update(5, [1.0, 2.0, 3.0 + 2.0])
    share = record["domain_weight/web"]
    assert share == pytest.approx(0.1 * 7.389 / (0.9 + 0.7389), abs=1e-3) and record["domain_share/code"] == 0.6
    later = taken(data, 40)
    assert sum(domain == 2 for domain, _ in later) == pytest.approx(40 * share, abs=1)
    for domain in range(3):
        numbers = [number for where, number in found + later if where == domain]
        assert numbers == list(range(len(numbers)))
    with pytest.raises(AssertionError, match="earlier interval"):
        data.sample(39)


def test_a_resumed_mixture_goes_on() -> None:
    data, other = mixture(), mixture()
    data.update(5, [2.0, 2.5, 3.5])
    other.load(data.state())
    assert taken(data, 40) == taken(other, 40)
    losses = [1.5, 2.0, 4.0]
    assert data.update(10, losses) == other.update(10, losses) and taken(data, 80) == taken(other, 80)


def test_a_domain_without_a_loss_is_named() -> None:
    with pytest.raises(UserError, match="domain books is nan after step 5"):
        mixture().update(5, [1.0, float("nan"), 3.0])


def training(tmp_path: Path, **more: Any) -> Training:
    files = tuple(words(tmp_path / f"{name}.jsonl", documents=n) for name, n in (("a", 8), ("b", 24)))
    given = {"data": files, "eval_data": files, "domain_interval": 5, "domain_targets": (1.0, 2.0), "eval_windows": 3}
    return Training(**(given | {"seq_length": 16, "global_batch_size": 4, "train_iters": 20} | more))


def test_files_are_domains(tmp_path: Path, tokenizer: Any) -> None:
    data = training_windows(training(tmp_path), tokenizer, 257)
    assert isinstance(data, DomainWindows) and [domain.name for domain in data.domains] == ["a.jsonl", "b.jsonl"]
    assert data.weights.tolist() == pytest.approx([0.25, 0.75], abs=0.02)
    assert all(domain.held_out.shape == (3, 16) for domain in data.domains)
    assert len(data.sample(19)) == 17


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"domain_targets": (1.0,)}, "2 domains in --data, 1 --domain-targets and 2 in --eval-data given"),
        ({"eval_data": (Path("a.jsonl"),)}, "2 --domain-targets and 1 in --eval-data given"),
        ({"eval_data": ()}, "no held-out text given"),
        ({"data": (Path("a.jsonl"), Path("b/a.jsonl"))}, "allowed: two domains or more, all named apart"),
    ],
)
def test_bad_requests(tmp_path: Path, tokenizer: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        training_windows(training(tmp_path, **options), tokenizer, 257)


def test_targets_need_an_interval() -> None:
    with pytest.raises(UserError, match="--domain-targets: given without --domain-interval"):
        Training(domain_targets=(1.0,))
