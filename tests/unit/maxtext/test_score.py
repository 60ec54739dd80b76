"""What MaxText is asked, without MaxText: shapes that it compiles for once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_prune.data.requests import Request
from megatron_prune.maxtext.score import _among_equals, _up, read_requests, write_requests


def test_targets_of_one_place_have_columns_of_their_own() -> None:
    asked = np.array([2, 0, 2, 1, 2, 0])
    assert _among_equals(asked).tolist() == [0, 0, 1, 0, 2, 1]
    assert _among_equals(asked[:0]).tolist() == []


def test_rows_and_places_are_filled_up() -> None:
    assert [_up(number, 64) for number in (1, 64, 65)] == [64, 64, 128]


def test_requests_travel_in_files(tmp_path: Path) -> None:
    requests = [Request([1, 2], [3]), Request([4], [5, 6])]
    write_requests(tmp_path / "requests.npz", requests)
    assert read_requests(tmp_path / "requests.npz") == requests
