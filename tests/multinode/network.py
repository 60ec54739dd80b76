"""Two nodes on one machine: Linux network namespaces with an address each, joined by a virtual cable.

A namespace lives as long as its anchor, a sleeping process. Root makes them directly, other users inside a user
namespace where the system allows that. Links and addresses are set with pyroute2: no `ip` program is needed, only
`unshare` and `nsenter` of util-linux.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

SETUP = """
import sys
from pyroute2 import IPRoute
name, address = sys.argv[1:]
with IPRoute() as network:
    for link, ip in (("lo", None), (name, address)):
        index = network.link_lookup(ifname=link)[0]
        if ip:
            network.addr("add", index=index, address=ip, prefixlen=24)
        network.link("set", index=index, state="up")
"""
CABLE = """
import sys
from pyroute2 import IPRoute
here, there, process = sys.argv[1:]
with IPRoute() as network:
    network.link("add", kind="veth", ifname=here, peer={"ifname": there, "net_ns_pid": int(process)})
"""
AS_ROOT = ["unshare", "--net"]
AS_USER = ["unshare", "--user", "--map-root-user", "--net"]


@dataclass(frozen=True)
class Node:
    """One namespace."""

    anchor: subprocess.Popen[bytes]
    prefix: list[str]
    interface: str
    address: str

    def command(self, words: list[str]) -> list[str]:
        """`words`, to be run on this node."""
        return [*self.prefix, *words]

    def kill(self) -> int:
        """SIGKILL to every process of the node but its anchor, as a power cut would; how many there were."""
        killed: set[int] = set()
        while found := self._processes():
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            killed |= found
            time.sleep(0.01)
        return len(killed)

    def _processes(self) -> set[int]:
        """Everything that runs on the node but its anchor."""
        namespace = _namespace(self.anchor.pid)
        return {p for p in psutil.pids() if p != self.anchor.pid and _namespace(p) == namespace}


def _namespace(process: int) -> str | None:
    try:
        return os.readlink(f"/proc/{process}/ns/net")
    except OSError:
        return None


def _way_in() -> list[str]:
    """The command that makes a network namespace here; skips the test where none is allowed."""
    missing = [name for name in ("unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"network namespaces need util-linux, and {' and '.join(missing)} is not installed")
    answers = []
    for way in (AS_ROOT, AS_USER):
        tried = subprocess.run([*way, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            return way
        answers.append(tried.stderr.strip())
    pytest.skip(f"this machine allows no network namespaces: {'; '.join(answers)}")


def _must(words: list[str]) -> None:
    """Run a setup command; skips the test with its answer when the kernel refuses."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"network namespaces cannot be joined here: {done.stderr.strip().splitlines()[-1]}")


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Nodes 10.77.0.1 and 10.77.0.2; everything in them ends with the block."""
    way = _way_in()
    inside = ["--user", "--preserve-credentials"] if way == AS_USER else []
    nodes: list[Node] = []
    try:
        for number in (1, 2):
            enter = ["nsenter", "--target", str(nodes[0].anchor.pid), *inside] if nodes and inside else []
            anchor = subprocess.Popen([*enter, *(AS_ROOT if nodes else way), "sleep", "infinity"])
            prefix = ["nsenter", "--target", str(anchor.pid), *inside, "--net", "--"]
            nodes.append(Node(anchor, prefix, f"cable{number}", f"10.77.0.{number}"))
            _wait_until_apart(anchor)
        first, second = nodes
        python = [sys.executable, "-c"]
        _must(first.command([*python, CABLE, first.interface, second.interface, str(second.anchor.pid)]))
        for node in nodes:
            _must(node.command([*python, SETUP, node.interface, node.address]))
        yield first, second
    finally:
        for node in nodes:
            node.kill()
            node.anchor.kill()
            node.anchor.wait()


def _wait_until_apart(anchor: subprocess.Popen[bytes]) -> None:
    """Until the anchor has left this process's namespace and runs `sleep`."""
    while anchor.poll() is None:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(anchor.pid).name() == "sleep":
                return
    pytest.skip(f"this machine allows no network namespaces: unshare ended with status {anchor.returncode}")
