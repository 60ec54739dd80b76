"""Comparisons on held-out windows: none of them was fitted to, and only what is beyond its error counts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from scipy.stats import ttest_rel
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import Budget
from megatron_prune.errors import UserError
from megatron_prune.methods import depth
from megatron_prune.methods.base import get_method
from megatron_prune.methods.minitron import Minitron
from megatron_prune.model.cost import parameters
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.search.held_out import split
from megatron_prune.search.racing import better, looks, race, standard_error
from megatron_prune.statistics.passes import Passes
from megatron_prune.statistics.store import StatisticsStore
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrunableModel]:
    path = tiny_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=4)
    with backend.running(backend.Layout()):
        yield open_model(path).load(backend.Layout())


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(128, (12, 24), generator=torch.Generator().manual_seed(3))


def test_better_is_a_paired_t_test() -> None:
    rng, decided = random.Random(0), []
    for _ in range(300):
        windows = rng.choice([2, 3, 4, 16, 64])
        common = [rng.gauss(0, 5) for _ in range(windows)]
        ours, theirs = ([x + rng.gauss(shift, 1) for x in common] for shift in (rng.choice([-1, 0, 0.3]), 0))
        decided.append(better(ours, theirs))
        assert decided[-1] == (ttest_rel(ours, theirs, alternative="less").pvalue < 0.1)
    assert 30 < sum(decided) < 270
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0) and math.isinf(standard_error([1.0]))


@pytest.mark.parametrize(
    ("scores", "others", "expected"),
    [([1.0], [2.0], False), ([1.0, math.nan], [2.0, 2.0], False), ([1.0, 1.0], [math.inf, 2.0], True)],
)
def test_what_tells_nothing_is_not_better(scores: list[float], others: list[float], expected: bool) -> None:
    assert better(scores, others) is expected


@pytest.mark.parametrize("strange", [math.inf, math.nan])
def test_what_overflows_has_no_error_that_tells_anything(strange: float) -> None:
    assert math.isinf(standard_error([1.0, strange, 2.0])) and math.isinf(standard_error([strange] * 3))


def test_looks_double() -> None:
    assert looks(3, 20) == [3, 6, 12, 20] and looks(8, 5) == [5] and looks(4, 4) == [4]


def test_a_race_drops_what_is_clearly_worse_and_ends_with_the_best() -> None:
    """Every window is asked for once; whoever is undecided gets more."""
    means = [0.0, -0.2, 5.0, 0.1, 4.0, 3.0, -0.15, 6.0]
    rng = random.Random(1)
    noise = [[rng.gauss(0, 0.5) for _ in range(64)] for _ in means]
    asked: dict[int, list[slice]] = {n: [] for n in range(len(means))}

    def judged(n: int, windows: slice) -> list[float]:
        asked[n].append(windows)
        return [means[n] + x for x in noise[n][windows]]

    left = race(judged, len(means), looks(4, 64), 3)
    assert next(iter(left)) == 1 and set(left) <= {0, 1, 6} and all(len(scores) == 64 for scores in left.values())
    assert all(asked[n] == [slice(0, 4)] for n in (2, 4, 5, 7))
    assert asked[1] == [slice(0, 4), slice(4, 8), slice(8, 16), slice(16, 32), slice(32, 64)]


def test_the_best_drops_whom_it_is_clearly_better_than_however_few_are_left() -> None:
    clear = race(lambda n, windows: [float(n)] * (windows.stop - windows.start), 2, [2, 4], 2)
    assert clear == {0: [0.0] * 4}
    assert race(lambda n, windows: [math.nan if n else 5.0] * (windows.stop - windows.start), 3, [2], 3) == {
        0: [5.0] * 2
    }


def test_half_of_the_undecided_go_on_or_the_fewest() -> None:
    """Windows that say the opposite of each other in turn: all means are equal, and the first of equal ones lead."""
    asked: list[tuple[int, slice]] = []

    def judged(n: int, windows: slice) -> list[float]:
        asked.append((n, windows))
        return [(n + 1.0) * (-1) ** w for w in range(windows.start, windows.stop)]

    left = race(judged, 8, [4, 8, 16], 3)
    assert list(left) == [0, 1, 2] and all(len(scores) == 16 for scores in left.values())
    numbers = {start: [n for n, windows in asked if windows.start == start] for start in (0, 4, 8)}
    assert numbers == {0: list(range(8)), 4: [0, 1, 2, 3], 8: [0, 1, 2]}


def test_luck_is_not_selected() -> None:
    """Of eight children, all a little worse, the lowest estimate nearly always beats the parent; a race seldom."""
    rng = random.Random(0)
    lucky = raced = 0
    for _ in range(200):
        children = [[rng.gauss(0.05, 1) for _ in range(16)] for _ in range(8)]
        best = min(children, key=lambda scores: sum(scores[:4]))
        lucky += sum(best[:4]) < 0
        raced += all(sum(best[:count]) < 0 for count in looks(4, 16)) and better(best, [0.0] * 16)
    assert lucky > 180 and raced < 60


def test_held_out_windows_are_none_of_the_fit(model: PrunableModel, tokens: Tensor) -> None:
    fit, judging = split(Passes(model, tokens))
    assert torch.equal(torch.cat([fit.tokens, judging.tokens]), tokens) and len(judging.tokens) == 3  # type: ignore[list-item, arg-type]
    assert [len(part.tokens) for part in split(Passes(model, tokens[:3]))] == [1, 2]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has 2 windows.*give --calibration-samples 3 or more"):
        split(Passes(model, tokens[:2]))


def test_shapes_are_fitted_and_judged_on_different_windows(
    model: PrunableModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is kept of the fit lies beside what is kept of all windows, and serves the next search."""
    seen: list[tuple[str, Tensor | None]] = []
    for name in ("observe_each", "window_losses"):
        whole = getattr(Passes, name)

        def watched(self: Passes, *given: Any, name: str = name, whole: Any = whole) -> Any:
            seen.append((name, self.tokens))
            return whole(self, *given)

        monkeypatch.setattr(Passes, name, watched)
    method, target = get_method("minitron", depth="block_influence"), Budget(int(0.8 * parameters(model.config)))
    assert isinstance(method, Minitron)
    store = StatisticsStore(tmp_path / "kept", model, tokens)
    units = method.choose(model.config, Passes(model, tokens, store=store), target)
    judged = [windows for name, windows in seen if name == "window_losses"]
    assert torch.equal(seen[0][1], tokens[:9]) and seen[0][0] == "observe_each"  # type: ignore[arg-type]
    assert len(judged) > 3 and all(torch.equal(windows, tokens[9:]) for windows in judged)  # type: ignore[arg-type]
    monkeypatch.setattr(StatisticsStore, "write", lambda *_: pytest.fail("measured again"))
    again = Passes(model, tokens, store=StatisticsStore(tmp_path / "kept", model, tokens))
    assert method.choose(model.config, again, target) == units


class Losses:
    """Stands for passes: the losses without each set of layers, by window."""

    def __init__(self, table: dict[frozenset[int], Sequence[float]]) -> None:
        self.table = table

    def losses_without(self, sets: Sequence[frozenset[int]]) -> list[float]:
        return [sum(found) / len(found) for found in self.window_losses_without(sets)]

    def window_losses_without(self, sets: Sequence[frozenset[int]]) -> list[list[float]]:
        return [list(self.table.get(found, [9.0] * 8)) for found in sets]


def test_layers_are_exchanged_when_other_windows_confirm_it() -> None:
    chosen, other = frozenset({0, 1}), frozenset({0, 2})
    finding: Any = Losses({chosen: [2.0] * 8, other: [1.0] * 8})
    base = [3.0, 1.0, 2.0, 2.0, 4.0, 0.5, 1.5, 2.0]
    unsure = [x + d for x, d in zip(base, (0.5, -1, 0.7, -0.6, 0.2, -0.4, 0.6, -0.5), strict=True)]
    for held_out, expected in (([x - 0.1 for x in base], other), (unsure, chosen), ([x + 0.1 for x in base], chosen)):
        judging: Any = Losses({chosen: base, other: held_out})
        assert depth.exchanged(finding, judging, chosen, [1.0, 1.0, 1.0, 1.0], frozenset()) == expected
