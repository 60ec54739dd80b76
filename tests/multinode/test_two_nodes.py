"""Two nodes with addresses of their own learn masks together; one is killed, started again, and the run goes on.

A node is a network namespace. Each runs tools/launch.sh with two processes, as a user does on a cluster: tensor
parallel inside the node, data or pipeline parallel across the cable between them. The other node's launcher stays up
while one is dead: its processes start again and wait for the one that is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prune.log import read_metrics
from tests.distributed.launch import environment as common
from tests.distributed.launch import launch, must_pass
from tests.models import byte_tokenizer, tiny_llama, words
from tests.multinode.network import Node, two_nodes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 18
SAVED = 6
TIMEOUT_S = 900


def learn(root: Path, name: str, *more: str) -> list[str]:
    """A mask-learning run of four windows a step with a checkpoint every SAVED steps."""
    options = {
        "--input": str(root / "model"),
        "--output": str(root / name),
        "--data": str(root / "words.jsonl"),
        "--seq-length": "32",
        "--global-batch-size": "4",
        "--train-iters": str(STEPS),
        "--lr": "4e-4",
        "--temperature-end": "2",
        "--save-interval": str(SAVED),
        "--eval-interval": "1000",
    }
    pairs = [word for pair in options.items() for word in pair]
    return ["prune", "--method", "maskllm", "--target", "2:4", *pairs, *more]


class Job:
    """The launchers of one run, one a node."""

    def __init__(self, root: Path, nodes: tuple[Node, Node], verb: list[str]) -> None:
        self.root, self.nodes, self.verb = root, nodes, verb
        self.launchers = [self.start(rank) for rank in range(len(nodes))]

    def start(self, rank: int) -> subprocess.Popen[bytes]:
        """Start the launcher on one node; what it says is appended to `node_RANK.txt`."""
        node, head = self.nodes[rank], self.nodes[0]
        flags = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "2", "--master-addr", head.address]
        flags += ["--local-addr", node.address, "--interface", node.interface]
        environment = {**common(), "PYTHON": sys.executable}
        with self.output(rank).open("ab") as output:
            return subprocess.Popen(
                node.command([str(ROOT / "tools" / "launch.sh"), *flags, *self.verb]),
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self, rank: int) -> Path:
        """What one node's launchers said."""
        return self.root / f"node_{rank}.txt"

    def wait_for(self, path: Path) -> None:
        """Until a file exists; fails when a launcher ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not path.exists():
            ended = [launcher.poll() for launcher in self.launchers]
            assert ended == [None, None], f"launchers ended with {ended}:\n{self.said()}"
            assert time.monotonic() < deadline, f"{path} did not appear:\n{self.said()}"
            time.sleep(0.02)

    def finish(self) -> None:
        """Until both launchers have ended well."""
        ended = [launcher.wait(TIMEOUT_S) for launcher in self.launchers]
        assert ended == [0, 0], f"launchers ended with {ended}:\n{self.said()}"

    def said(self) -> str:
        """The end of both nodes' output."""
        return "\n".join(self.output(rank).read_text(errors="replace")[-3000:] for rank in range(len(self.nodes)))


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    """Both nodes."""
    with two_nodes() as pair:
        yield pair


@pytest.fixture(scope="module")
def root(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that both nodes see, with a model and its run on one process."""
    root = tmp_path_factory.mktemp("nodes")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, hidden_size=64, intermediate_size=128))
    imported = ["import", "--input", str(root / "hf"), "--output", str(root / "model")]
    must_pass(launch(1, [imported, learn(root, "one")], root / "commands"))
    return root


def losses(root: Path, name: str) -> list[float]:
    """The loss of every step; each was logged once."""
    records = [line for line in read_metrics(root / name) if "loss" in line]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


def test_nodes_reach_each_other_only_by_cable(nodes: tuple[Node, Node]) -> None:
    listen = "import socket, sys; s = socket.create_server((sys.argv[1], 0)); print(s.getsockname()[0])"
    first, second = (
        subprocess.run(nodes[0].command([sys.executable, "-c", listen, node.address]), capture_output=True, text=True)
        for node in nodes
    )
    assert first.stdout.strip() == nodes[0].address
    assert second.returncode != 0, "node 0 has the address of node 1: they are one node"


def test_pipeline_across_nodes(nodes: tuple[Node, Node], root: Path) -> None:
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    Job(root, nodes, learn(root, "pipeline", *layout)).finish()
    assert losses(root, "pipeline") == pytest.approx(losses(root, "one"), abs=1e-5)


@pytest.mark.nightly
def test_replicas_across_nodes_and_a_dead_node(nodes: tuple[Node, Node], root: Path) -> None:
    run = root / "replicas"
    job = Job(root, nodes, learn(root, "replicas", "--tensor-model-parallel-size", "2", "--restartable"))
    job.wait_for(run / "checkpoints" / "latest.json")
    killed = nodes[1].kill()
    assert killed >= 3, "a launcher and two processes were expected on the node"
    assert job.launchers[1].wait(30) != 0
    saved = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
    assert SAVED <= saved < STEPS and job.launchers[0].poll() is None, "the run had ended before the node was killed"
    job.launchers[1] = job.start(1)
    job.finish()
    said = job.output(0).read_text() + job.output(1).read_text()
    assert said.count(f"step 1/{STEPS}") == 2, (
        "the run began again instead of going on"
    )  # this one and the other test's
    assert losses(root, "replicas") == pytest.approx(losses(root, "one"), abs=1e-5)
