"""When a killed run counts as the one that was left alone: to the bit, or within a tolerance."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.kill_test import alike, near, other_bits

CURVE = [{"step": 1, "loss": 4.0, "grad_norm": 0.5}, {"step": 2, "loss": 3.9, "grad_norm": 0.0}]


def changed(step: int, **values: float) -> list[dict[str, float]]:
    """The curve with other numbers at one place."""
    return [record | values if place == step else record for place, record in enumerate(CURVE)]


def test_without_a_tolerance_not_a_bit_may_differ() -> None:
    assert near(CURVE, CURVE, 0.0)
    assert not near(changed(0, loss=4.0 + 1e-15), CURVE, 0.0) and not near(CURVE[:1], CURVE, 0.0)


@pytest.mark.parametrize(
    ("found", "agrees"),
    [
        (changed(0, loss=4.003), True),
        (changed(0, loss=4.005), False),
        (changed(1, grad_norm=0.002), False),
        (changed(1, loss=float("nan")), False),
        (changed(1, more=1.0), False),
        (CURVE[:1], False),
    ],
)
def test_with_one_each_number_may_by_its_share(found: list[dict[str, float]], agrees: bool) -> None:
    assert near(found, CURVE, 1e-3) is agrees


def test_share_of_other_bits() -> None:
    masks = {"a": b"\x0f\x00", "b": b"\xff\xff"}
    assert other_bits(masks, masks) == 0.0
    assert other_bits({"a": b"\x0e\x00", "b": b"\xff\x7f"}, masks) == 2 / 32
    assert other_bits({}, {}) == other_bits({"a": b"\x0f\x00"}, masks) == other_bits({"a": b"\x0f"}, {"a": b""}) == 1.0


@pytest.mark.parametrize(("tolerance", "agrees"), [(0.0, False), (1e-4, False), (1e-2, True)])
def test_runs_that_differ_a_little(tmp_path: Path, tolerance: float, agrees: bool) -> None:
    for run, loss, bits in (("killed", 4.001, b"\x01"), ("whole", 4.0, b"\x00")):
        (tmp_path / run / "decision").mkdir(parents=True)
        (tmp_path / run / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}, "step_s": {loss}}}\n')
        (tmp_path / run / "decision" / "layer.safetensors").write_bytes(bits + bytes(99))
    same = alike(tmp_path / "killed", tmp_path / "whole", tolerance)
    assert same == {"curve": agrees, "masks": tolerance >= 1 / 800}
