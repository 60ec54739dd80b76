"""The other environment: MaxText on Python 3.12 (tools/setup_maxtext.sh), in processes of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from megatron_prune.errors import UserError
from megatron_prune.exporting.maxtext import maxtext_python

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=180 --xla_cpu_collective_timeout_seconds=180"
"""Of devices that are simulated where others are busy too: after 40 s XLA would end the process."""
STUCK = "seconds exceeded. Exiting to ensure a consistent program state"
"""What XLA says when threads of simulated devices wait for each other for good, as they do once in many runs."""
WORKER = Path(__file__).with_name("worker.py")


def python() -> Path:
    """Its python; skips the test where there is none."""
    try:
        return maxtext_python()
    except UserError as error:
        pytest.skip(f"no environment for MaxText: {error}")


def run(folder: Path, calls: list[list[object]], hosts: int = 1, devices: int = 1) -> list[str]:
    """Make calls (see worker.py) one after the other in one process, and return what each of them said or returned.

    `hosts`: that many processes do so together, of `devices` each; their answers follow each other. Where simulated
    devices of one process got stuck, all of it is made once more, from the files that were there before.
    """
    before = set(folder.rglob("*"))
    try:
        return _run(folder, calls, hosts, devices)
    except AssertionError as error:
        if devices == 1 or STUCK not in str(error):
            raise
    print("simulated devices got stuck in XLA: once more")
    for path in sorted(set(folder.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return _run(folder, calls, hosts, devices)


def _run(folder: Path, calls: list[list[object]], hosts: int, devices: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [_start(folder, calls, number, hosts, devices, address) for number in range(hosts)]
    answers: list[str] = []
    for number, process in enumerate(running):
        try:
            said, complaint = process.communicate(timeout=1800)
            assert process.returncode == 0, said[-3000:] + complaint[-20000:]
        except BaseException:
            for other in running:
                other.kill()
            raise
        answers += json.loads((folder / f"answers_{number}.json").read_text())
    return answers


def _start(
    folder: Path, calls: list[list[object]], number: int, hosts: int, devices: int, address: str
) -> subprocess.Popen[str]:
    words = [[str(word).replace("HOST", str(number)) for word in call] for call in calls]
    (folder / f"calls_{number}.json").write_text(json.dumps(words))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    if devices > 1:  # each waits for the slowest within every collective of a step, and needs a thread for each
        environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "NPROC": str(64 * devices), "XLA_FLAGS": PATIENCE}
    if hosts > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
        environment |= {"JAX_PROCESS_ID": str(number), "RANK": str(number)}
    files = [str(folder / f"{what}_{number}.json") for what in ("calls", "answers")]
    pipe = subprocess.PIPE
    return subprocess.Popen([str(python()), str(WORKER), *files], env=environment, stdout=pipe, stderr=pipe, text=True)
