"""`evaluate --tasks` in every layout: the answers of one process, to every item."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.__main__ import main
from tests.distributed.launch import DP2, EP2, EP2_TP2_SP, PP2, TP2, TP2_SP, Layout, launch, must_pass
from tests.models import byte_tokenizer, tiny_llama, tiny_model
from tests.tasks import write_tasks
from tests.unit.evaluation.test_tasks import evaluate, largest_difference, read, samples

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LAYOUTS = [TP2, TP2_SP, PP2, DP2, Layout("pp2vpp2", 2, pipeline=2, virtual=2)]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of a model in one process and in every layout, and those of a model that differs in its seed."""
    root = tmp_path_factory.mktemp("tasks")
    write_tasks(root / "tasks", items=40)
    for name, seed in (("model", 0), ("other", 1)):
        # 257 tokens: one more than two equal shares of the vocabulary, so that one share is padded
        byte_tokenizer(tiny_llama(root / f"{name}_hf", vocab_size=257, num_hidden_layers=4, seed=seed))
        assert main(["import", "--input", str(root / f"{name}_hf"), "--output", str(root / name)]) == 0
        assert main(command(root, name, name)) == 0
    byte_tokenizer(tiny_model(root / "experts_hf", "qwen3_moe", vocab_size=257))
    assert main(["import", "--input", str(root / "experts_hf"), "--output", str(root / "experts")]) == 0
    assert main(command(root, "experts", "experts")) == 0
    commands = [[*command(root, "model", layout.name), *layout.flags()] for layout in LAYOUTS]
    commands += [[*command(root, "experts", f"experts_{x.name}"), *x.flags()] for x in (EP2, EP2_TP2_SP)]
    must_pass(launch(2, commands, root / "logs"))
    return root


def command(root: Path, model: str, name: str) -> list[str]:
    """Evaluate in batches so small that there are several for each replica."""
    files = ["--output", str(root / f"{name}.json"), *samples(root, name)]
    return evaluate(root, model, *files, "--tokens-per-batch", "256")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_answers_are_those_of_one_process(layout: Layout, root: Path) -> None:
    expected = [line["log_likelihoods"] for line in read(root / "model.jsonl")]
    assert largest_difference(read(root / f"{layout.name}.jsonl"), expected) < TOLERANCE
    one, same = (json.loads((root / f"{name}.json").read_text())["results"][0] for name in ("model", layout.name))
    for task, about in one["tasks"].items():
        assert same["tasks"][task]["right"] == about["right"]
        assert same["tasks"][task]["items_sha256"] == about["items_sha256"]
        assert same["tasks"][task]["metrics"] == pytest.approx(about["metrics"], rel=1e-5)
    assert same["layout"] != one["layout"]


@pytest.mark.parametrize("layout", [EP2, EP2_TP2_SP], ids=lambda layout: layout.name)
def test_answers_are_the_same_with_experts_shared_out(layout: Layout, root: Path) -> None:
    """Replicas whose tokens meet in an expert make the same passes, however few batches there are."""
    expected = [line["log_likelihoods"] for line in read(root / "experts.jsonl")]
    assert largest_difference(read(root / f"experts_{layout.name}.jsonl"), expected) < TOLERANCE


def test_another_model_is_told_apart(root: Path) -> None:
    expected = [line["log_likelihoods"] for line in read(root / "model.jsonl")]
    assert largest_difference(read(root / "other.jsonl"), expected) > 1000 * TOLERANCE
