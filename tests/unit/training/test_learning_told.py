"""What a run that learns masks says of how far they went."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks
from megatron_prune.log import read_metrics
from tests.models import byte_tokenizer, tiny_llama, words


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, and a prior."""
    root = tmp_path_factory.mktemp("told")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    start = ["--input", str(root / "hf"), "--output", str(root / "prior"), "--method", "magnitude", "--target", "2:4"]
    assert main(["prune", *start]) == 0
    return root


def learn(root: Path, output: Path, *more: str) -> int:
    """Four steps from the prior."""
    inputs = ["--input", str(root / "hf"), "--output", str(output), "--prior", str(root / "prior")]
    data = ["--data", str(root / "words.jsonl"), "--seq-length", "16", "--global-batch-size", "2"]
    steps = [] if "--train-iters" in more else ["--train-iters", "4"]
    return main(["prune", "--method", "maskllm", "--target", "2:4", *inputs, *data, *steps, *more])


def same(root: Path, run: Path) -> bool:
    """Whether the run's masks are the prior's."""
    prior, learned = Masks.load(root / "prior" / "decision"), Masks.load(run / "decision")
    return all(bool((prior.get(name) == learned.get(name)).all()) for name in prior.names())


def test_steps_too_small_to_change_anything(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The start is 3 x 0.01 between patterns, and 4 steps of 1e-5 x 10 close 2 x 4 x 1e-4 of it."""
    assert learn(root, tmp_path / "run", "--lr", "1e-5") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "starts 0.03 above the next, and 4 steps of --lr 1e-05 x --lr-multiplier 10 can close about 0.0008" in told
    assert "no group has left its start: the masks are those that learning began with" in told
    assert same(root, tmp_path / "run")


def test_steps_that_can(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn(root, tmp_path / "run", "--lr", "1e-2") == 0
    told = " ".join(capsys.readouterr().out.split())
    moved = read_metrics(tmp_path / "run")[-1]["differs_from_start_fraction"]
    assert f"{moved:.2%} of the groups have left their start" in told and moved > 0
    assert "warning" not in told and not same(root, tmp_path / "run")
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"{moved:.2%} of the groups have left their start" in capsys.readouterr().out


def test_the_recipe_for_few_steps_changes_masks_where_the_papers_does_not(root: Path, tmp_path: Path) -> None:
    """As many steps each; the paper's are for 2,000."""
    for recipe, moves in (("paper", False), ("short", True)):
        run = tmp_path / recipe
        assert learn(root, run, "--recipe", recipe, "--train-iters", "24") == 0
        assert (not same(root, run)) == moves
