"""The account of a run that is killed: every second of a process's life is in one phase, steps are kept or lost."""

from __future__ import annotations

import pytest

from tools.goodput import PHASES, Life


def test_every_second_is_in_one_phase() -> None:
    steps = [(5, 2.0, 114.0), (6, 2.0, 117.0), (7, 2.0, 119.5)]
    life = Life(began=0.0, born=100.0, first=4, ready=108.0, steps=steps, died=121.0, killed=True)
    found = life.phases(kept=6)
    assert list(found) == list(PHASES)
    assert found == {"start_up": 8.0, "load": 4.0, "kept": 4.0, "lost": 2.0, "between": 1.5, "end": 1.5}
    assert sum(found.values()) == life.died - life.born


@pytest.mark.parametrize(("ready", "start_up", "load"), [(None, 6.0, 0.0), (104.0, 4.0, 2.0)])
def test_one_that_took_no_step(ready: float | None, start_up: float, load: float) -> None:
    found = Life(began=0.0, born=100.0, ready=ready, died=106.0, killed=True).phases(kept=9)
    assert {phase: seconds for phase, seconds in found.items() if seconds} == {
        phase: seconds for phase, seconds in (("start_up", start_up), ("load", load)) if seconds
    }
