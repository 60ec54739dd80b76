"""Tiles that learn to stay dense: their start, their gradients, what they are good for, and the road of such a run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.target import NM, Tile
from megatron_prune.decision.tiles import Grid, largest
from megatron_prune.kernels import tiles as kernel
from megatron_prune.model.context import positions
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.training.tiles import TileLogits
from tests.models import small_models, stories260k
from tests.runs import curve, four_steps, refused_in_a_line, reopened, saved_tensors
from tests.unit.test_gpu_path import model

TARGET = "2:4@0.75,tile=16x16"
ROWS = "2:4@0.75,tile=4xall"
"""No tile of stories260K is cut at an edge."""
SAVED = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, text, and one run of four steps."""
    root = tmp_path_factory.mktemp("learned_tiles")
    small_models(root)
    assert main(learn(root, root / "run", "--prior", "magnitude")) == 0
    return root


learn = functools.partial(four_steps, target=TARGET, save_interval=SAVED)


def same(one: Path, other: Path) -> bool:
    """Whether two decisions are equal."""
    masks = Masks.load(one), Masks.load(other)
    return all(torch.equal(masks[0].get(name), masks[1].get(name)) for name in masks[0].names())


# ---- the start -----------------------------------------------------------------------------------------


STILL = ("--lr", "1e-12", "--min-lr", "0")


def test_it_starts_with_the_tiles_of_the_prior(root: Path, tmp_path: Path) -> None:
    """Also where the prior is of the pattern alone: those of which it removes most, as magnitude would choose them."""
    one_shot = root / "run" / "prior"
    plain = ["prune", str(root / "llama"), str(tmp_path / "plain"), "--method", "magnitude", "--target", "2:4"]
    assert main(plain) == 0
    for name, prior in (("made", "magnitude"), ("given", str(one_shot)), ("chosen", str(tmp_path / "plain"))):
        assert main(learn(root, tmp_path / name, *STILL, "--prior", prior)) == 0
        assert same(tmp_path / name / "decision", one_shot), name
    assert not same(root / "run" / "decision", one_shot)
    assert curve(root / "run", "tiles_moved_fraction")[-1] > 0


def test_it_starts_at_random_without_one(root: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(learn(root, tmp_path / name, *STILL, "--seed", seed)) == 0
    assert same(tmp_path / "a" / "decision", tmp_path / "b" / "decision")
    assert not same(tmp_path / "a" / "decision", tmp_path / "c" / "decision")


def test_logits_of_an_earlier_run_are_a_start(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--initial-logits", str(root / "run")]
    assert main(learn(root, tmp_path / "on", *STILL, *given)) == 0
    assert same(tmp_path / "on" / "decision", root / "run" / "decision")
    capsys.readouterr()
    assert main(learn(root, tmp_path / "x", *given, target="2:4")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"has learned {TARGET} and the target is 2:4: give a run of 2:4" in line


# ---- gradients -----------------------------------------------------------------------------------------


def learning(per_step: bool = False, noise: bool = True, hard: bool = False) -> tuple[PrunableModel, TileLogits]:
    """A small LLaMA with random logits of masks and tiles, before a step."""
    network = model()
    draw = MaskDraw(2, 4, seed=1, scale=3.0, temperature=0.8, step=5, per_step=per_step, noise=noise, hard=hard)
    network.chunks[0].requires_grad_(False)
    network.learn_masks(draw)
    for linear in network.linears():
        with torch.no_grad():
            linear.module.mask_logits.normal_(generator=torch.Generator().manual_seed(linear.tensor_id))
    tiles = TileLogits(network, NM(2, 4, (), 0.6, Tile(12, 8)), Training())
    tiles.start_at_random(1.0, 7)
    tiles.begin(draw)
    network.chunks[0].train()
    return network, tiles


def loss(network: PrunableModel, number: int = 0) -> Tensor:
    tokens = torch.arange(24).roll(number).view(2, 12)
    found: Tensor = network.chunks[0](tokens, positions(12).expand(2, -1), None)
    return found.double().square().mean()


def leaves(network: PrunableModel) -> list[Tensor]:
    return [linear.module.tiles.logits for linear in network.linears() if linear.module.tiles is not None]


def test_gradients_of_tiles_are_finite_differences() -> None:
    with backend.running(backend.Layout()):
        network, _ = learning(noise=False)
        loss(network).backward()
        for logits in leaves(network):
            gradient = logits.grad
            assert gradient is not None
            place, step = divmod(int(gradient.abs().argmax()), logits.shape[1]), 2e-2
            values = []
            with torch.no_grad():
                for nudge in (step, -2 * step):
                    logits[place] += nudge
                    values.append(float(loss(network)))
                logits[place] += step
            assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02)


@pytest.mark.parametrize("hard", [False, True])
def test_one_draw_for_a_step_has_the_gradients_of_one_each(hard: bool) -> None:
    with backend.running(backend.Layout()):
        found = []
        for per_step in (False, True):
            network, _ = learning(per_step, hard=hard)
            for number in range(3):
                loss(network, number).backward()
            for linear in network.linears():
                linear.module.finish_step()
            found.append([logits.grad for logits in leaves(network)])
        for each, once in zip(*found, strict=True):
            assert each is not None and each.abs().max() > 0
            torch.testing.assert_close(once, each, rtol=1e-4, atol=1e-6)


def test_an_update_is_a_step_of_adam_by_what_tiles_are_worth() -> None:
    """Beside the others of their matrix, in units of what tiles are worth on the whole."""
    with backend.running(backend.Layout()):
        network, tiles = learning()
        before = tiles.logits.clone()
        loss(network).backward()
        rows = []
        for linear, logits in zip(network.linears(), leaves(network), strict=True):
            assert logits.grad is not None
            rows += [part.flatten() for part in logits.grad.split([grid.down for grid in tiles.grids[linear.name]])]
        gradient = torch.zeros_like(tiles.sizes)
        for row, part in zip(gradient, rows, strict=True):
            row[: len(part)] = part
        gradient = kernel.centred(gradient, before.double(), tiles.sizes, tiles.threshold, tiles.sharp)
        gradient /= gradient[tiles.sizes > 0].square().mean().sqrt()
        tiles.update(1e-3)
        torch.testing.assert_close(
            tiles.logits - before, (-1e-3 * gradient / (gradient.abs() + 1)).float(), rtol=1e-3, atol=1e-6
        )
        assert (gradient > 1).any() and (gradient < -1).any()


# ---- what it is good for -------------------------------------------------------------------------------


def alone(root: Path, output: Path) -> tuple[float, float]:
    """Held-out loss before and after tiles have learned, with masks that stand still."""
    command = ["prune", str(root / "stories"), str(output), "--method", "maskllm", "--target", ROWS]
    masks = "--recipe short --lr-multiplier 1e-6 --tile-lr-multiplier 1e7 --prior magnitude".split()
    text = ["--data", str(root / "words.jsonl"), "--eval-data", str(root / "words.jsonl"), "--eval-windows", "8"]
    sizes = "--seq-length 64 --global-batch-size 4 --train-iters 8 --log-interval 8".split()
    assert main([*command, *masks, *text, *sizes]) == 0
    first, last = curve(output, "eval_loss")
    return first, last


def test_learned_tiles_are_better_than_those_in_one_shot(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equally many, with the same masks. Negative control: with gradients that point the other way they are worse."""
    stories260k(root / "stories")
    before, after = alone(root, tmp_path / "learned")
    kept = [
        sum(row.kept for row in Masks.load(tmp_path / "learned" / name).summary()) for name in ("prior", "decision")
    ]
    assert kept[0] == kept[1] and before - after > 0.2
    forth = kernel.centred
    monkeypatch.setattr(kernel, "centred", lambda *given: -forth(*given))
    assert alone(root, tmp_path / "misled")[1] > before + 0.1


# ---- the road ------------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_identical(root: Path, tmp_path: Path) -> None:
    run = reopened(root / "run", tmp_path / "again", SAVED)
    assert main(learn(root, run, "--prior", "magnitude", "--resume")) == 0
    for key in ("loss", "grad_norm", "tile_probability", "tiles_moved_fraction"):
        assert curve(run, key) == curve(root / "run", key) and len(curve(run, key)) == 4
    assert same(run / "decision", root / "run" / "decision")
    tensors = [saved_tensors(each / "checkpoints" / "step_0000004") for each in (run, root / "run")]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--tile-lr-multiplier", "3"), "has method_options"),
        (("--target", "2:4@0.5,tile=16x16"), "is a maskllm 2:4@0.75,tile=16x16 run of"),
    ],
)
def test_a_run_goes_on_with_its_own_tiles_alone(
    root: Path, tmp_path: Path, given: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = reopened(root / "run", tmp_path / "again", SAVED)
    target, more = (given[1], ()) if given[0] == "--target" else (TARGET, given)
    assert main(learn(root, run, "--prior", "magnitude", "--resume", *more, target=target)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "tile", "more"),
    [
        ("llama", "24x32", ("--train-weights", "--masked-decay", "5")),
        ("gpt2", "16xall", ("--hard",)),
        ("qwen3_moe", "allx8", ("--mask-draw", "step")),
    ],
)
def test_the_whole_road(
    root: Path, tmp_path: Path, family: str, tile: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Some matrices of the first have no room for a tile."""
    target = f"2:4@0.7,tile={tile}"
    run = learn(root, tmp_path / "run", "--prior", "magnitude", *more, family=family, target=target)
    assert main([*run, "--export", str(tmp_path / "run_hf")]) == 0
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "ck")]) == 0
    kept = [sum(row.kept for row in Masks.load(tmp_path / "run" / name).summary()) for name in ("prior", "decision")]
    assert kept[0] == kept[1]
    for form in ("run", "ck", "run_hf"):
        capsys.readouterr()
        assert main(["verify", str(tmp_path / form)]) == 0
        assert f"pattern {target}: holds" in capsys.readouterr().out


def test_plan_counts_the_logits_of_tiles(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    found: list[dict[str, Any]] = []
    for target in ("2:4", "2:4@0.75,tile=8x8"):
        output = root / f"plan_{len(found)}.json"
        command = ["plan", "--input", str(root / "llama"), "--method", "maskllm", "--target", target]
        assert main([*command, "--processes", "1", "--seq-length", "16", "--output", str(output)]) == 0
        found.append(json.loads(output.read_text())["stages"][0])
    with backend.running(backend.Layout()):
        from megatron_prune.decision.source import open_model

        network = open_model(root / "llama").load(backend.Layout())
        network.learn_masks(MaskDraw(2, 4, 0))
        tiles = TileLogits(network, NM(2, 4, (), 0.75, Tile(8, 8)), Training())
    more = {key: found[1][key] - found[0][key] for key in found[0]}
    size = tiles.logits.nbytes
    assert more == {**dict.fromkeys(more, 0), "mask_logits": size, "gradients": 2 * size, "optimizer": 2 * size}


def test_tiles_are_not_learned_by_maxtext(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = f"plan --input {root / 'llama'} --method maskllm --target {TARGET} --tpu v5p-8"
    refused_in_a_line(plan, "MaxText learns masks of whole weights: leave @0.75 out", capsys)


def test_a_rate_of_tiles_needs_tiles(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = learn(root, tmp_path / "x", "--tile-lr-multiplier", "2", target="2:4")
    assert main(command) == 2
    assert "--tile-lr-multiplier was given and has no effect without tiles that stay dense" in capsys.readouterr().err


def test_the_tiles_that_stay_are_worth_most() -> None:
    target = NM(2, 4, (), 0.5, Tile(4, 8))
    grid = Grid.of((8, 16), target)
    worth = torch.tensor([[1.0, 3.0], [3.0, 2.0]])
    assert largest(worth, grid, target).tolist() == [[False, True], [True, False]]
    assert largest(torch.ones(2, 2), grid, target).tolist() == [[False, False], [True, True]]
