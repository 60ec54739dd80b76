"""examples/fsdp_recovery: its script starts a command that the package reads, on one node and on many."""

from __future__ import annotations

import pytest

from megatron_prune.command_line import parse
from megatron_prune.config import TrainConfig
from tests.unit.examples.test_launch import ROOT, command, flag, run

SCRIPT = ROOT / "examples" / "fsdp_recovery" / "recover.sh"
PLACES = ("a pruned model", "dense", "c4", "out")
NODES = "--nnodes 4 --node-rank 1 --master-addr n0 --nproc-per-node 8".split()


@pytest.mark.parametrize("options", [[], NODES, [*NODES, "--", "--train-iters", "50"]])
def test_the_command_is_one_that_the_package_reads(options: list[str]) -> None:
    words = command(SCRIPT, *PLACES, "--dry-run", *options)
    config = parse(TrainConfig, words[words.index("train") + 1 :], "train")
    assert (str(config.input), str(config.losses.teacher), str(config.output)) == ("a pruned model", "dense", "out")
    assert config.engine == "fsdp" and config.keep_zeros and config.restartable
    assert config.training.train_iters == (50 if "--" in options else 1000)
    assert [config.training.num_microbatches(processes) for processes in (8, 32)] == [16, 4]
    assert flag(words, "--max-restarts") == "3", "what dies is started again"
    if options:
        assert (flag(words, "--nnodes"), flag(words, "--nproc-per-node")) == ("4", "8")
        assert flag(words, "--rdzv-endpoint") == "n0:29500"


def test_a_missing_word_is_told() -> None:
    done = run(SCRIPT, "pruned")
    assert done.returncode == 2 and "allowed: recover.sh PRUNED TEACHER DATA OUTPUT" in done.stderr
    assert len(done.stderr.splitlines()) == 1
