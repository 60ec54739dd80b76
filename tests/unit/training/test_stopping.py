"""When a run is asked to end: by a signal in the main thread, by its time limit in any."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megatron_prune.training.stopping import REASONS, StopRequest


def test_a_signal_is_noticed_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.code() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert REASONS[stop.code()] == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_ends_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert REASONS[stop.code()] == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_only_the_time_limit_counts() -> None:
    seen: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        for minutes in (None, 0.0):
            with StopRequest(minutes) as stop:
                seen.append(stop.code())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [REASONS[code] for code in seen] == ["", "time limit"]
    assert signal.getsignal(signal.SIGTERM) is before
