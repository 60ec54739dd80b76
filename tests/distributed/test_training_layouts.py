"""Training in every layout follows training in one process: losses, gradient norms, held-out losses, final masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.decision.masks import Masks
from tests.distributed.launch import ONE, Layout, launch, must_pass, picked, with_nightly
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve, reopened

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
DISTRIBUTED = "--use-distributed-optimizer"
RECOMPUTE = "--recompute"
OVERLAPPED = "--overlap-grad-reduce"
WEIGHTS = "--train-weights"
ONE_DRAW = "--mask-draw=step"
TAUGHT, JOINT, TILES, DENSE = "taught", "joint", "tiles", "dense"
MEANT = {
    TAUGHT: "--teacher ROOT/dense --lm-weight 0.5 --hidden-weight 1 --distillation-temperature 2",
    JOINT: "--train-weights --train-norms --weight-lr-multiplier 0.5 --weight-eps 1e-6 --weight-clip 0.5 "
    "--weight-gradient dense --masked-decay 200 --decay-warmup 0.5 --teacher ROOT/dense",
    TILES: "--target 2:4@0.6,tile=24x24",
    DENSE: "--target 2:4,dense=v_proj+layers.0.+layers.1.+layers.2.mlp.up_proj+layers.3.self_attn.o_proj "
    "--save-interval 2 --keep-checkpoints 9",
}
"""Options by a name for them: masks that the dense model teaches, weights that train with them, tiles that may stay
dense, of which some lie on several processes, and weights that do, of which the first half of a pipeline has no other.
"""
KINDS = (WEIGHTS, ONE_DRAW, TAUGHT, JOINT, TILES, DENSE)
"""Options with which a run is another one, in any layout."""
STEPS, SAVED = 5, 2


@dataclass(frozen=True)
class Case:
    """A layout and how it trains."""

    layout: Layout
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Folder name."""
        return "_".join([self.layout.name, *(option.strip("-") for option in self.options)])

    @property
    def reference(self) -> Case:
        """The run in one process that this one must follow."""
        return Case(ONE, tuple(option for option in self.options if option in KINDS))


TP2_SP = Layout("tp2sp", 2, tensor=2, sequence_parallel=True)
PP2, CP2, DP2 = Layout("pp2", 2, pipeline=2), Layout("cp2", 2, context=2), Layout("dp2", 2)
PP2_VPP2 = Layout("pp2vpp2", 2, pipeline=2, virtual=2)
PP2_DP2, TP2_DP2_SP = Layout("pp2dp2", 4, pipeline=2), Layout("tp2dp2sp", 4, tensor=2, sequence_parallel=True)
USUAL = [
    Case(TP2_SP, (WEIGHTS, RECOMPUTE)),
    Case(PP2_VPP2, (WEIGHTS, RECOMPUTE)),
    Case(CP2, (WEIGHTS, DISTRIBUTED)),
    Case(DP2, (ONE_DRAW, RECOMPUTE)),
    Case(TP2_SP, (TAUGHT,)),
    Case(PP2, (TAUGHT,)),
    Case(CP2, (TAUGHT, ONE_DRAW)),
    Case(TP2_SP, (JOINT,)),
    Case(DP2, (JOINT, DISTRIBUTED)),
    Case(TP2_SP, (TILES, RECOMPUTE)),
    Case(DP2, (TILES, ONE_DRAW, OVERLAPPED)),
    Case(TP2_SP, (DENSE, WEIGHTS)),
    Case(PP2_VPP2, (DENSE, RECOMPUTE)),
    Case(DP2, (DENSE, ONE_DRAW, OVERLAPPED)),
    Case(PP2_DP2, (DENSE, DISTRIBUTED)),
]
"""With every change."""
CASES = [
    *USUAL,
    Case(DP2, (WEIGHTS, DISTRIBUTED, RECOMPUTE)),
    Case(DP2, (TAUGHT, OVERLAPPED)),
    Case(PP2_VPP2, (TILES,)),
    Case(Layout("tp2pp2", 4, tensor=2, pipeline=2), (TILES, WEIGHTS)),
    Case(Layout("tp2cp2sp", 4, tensor=2, context=2, sequence_parallel=True), (RECOMPUTE,)),
    Case(TP2_SP, (RECOMPUTE,)),
    Case(PP2, (RECOMPUTE,)),
    Case(PP2_VPP2),
    Case(CP2),
    Case(DP2, (DISTRIBUTED,)),
    Case(PP2, (JOINT,)),
    Case(CP2, (TILES,)),
    Case(DP2, (TILES, DISTRIBUTED)),
    Case(PP2, (DENSE,)),
    Case(DP2, (DENSE, DISTRIBUTED)),
    Case(TP2_DP2_SP, (JOINT, DISTRIBUTED)),
    Case(Layout("pp4", 4, pipeline=4)),
    Case(Layout("tp2pp2vpp2sp", 4, tensor=2, pipeline=2, sequence_parallel=True, virtual=2), (WEIGHTS,)),
    Case(Layout("pp2cp2", 4, pipeline=2, context=2), (WEIGHTS,)),
    Case(PP2_DP2, (DISTRIBUTED, RECOMPUTE)),
    Case(TP2_DP2_SP, (WEIGHTS, DISTRIBUTED)),
]


def tried(*kinds: str) -> list[Any]:
    """Cases with one of these options, or all."""
    found = [case for case in CASES if not kinds or {*kinds} & {*case.options}]
    return with_nightly(found, USUAL.__contains__)


RESUMED = [
    (Case(PP2_DP2, (DENSE, DISTRIBUTED)), TP2_SP),
    (Case(TP2_SP, (DENSE, WEIGHTS)), PP2),
]
"""Runs in which layers have not all the same parameters, and the layout in which they go on."""


def command(root: Path, case: Case) -> list[str]:
    """A mask-learning run: four windows a step, however they are spread; a held-out loss before and after."""
    options = {
        "--input": str(root / "dense"),
        "--output": str(root / case.name),
        "--data": str(root / "words.jsonl"),
        "--eval-data": str(root / "words.jsonl"),
        "--eval-windows": "3",
        "--seq-length": "32",
        "--global-batch-size": "4",
        "--train-iters": str(STEPS),
        "--lr": "4e-4",
        "--temperature-end": "2",
        "--weight-regularization": "1e-5",
        "--prior": "magnitude",
    }
    words_of_options = [word for pair in options.items() for word in pair]
    more = [word for each in case.options for word in MEANT.get(each, each).replace("ROOT", str(root)).split()]
    target = [] if {TILES, DENSE} & {*case.options} else ["--target", "2:4"]
    return [*"prune --method maskllm".split(), *target, *words_of_options, *case.layout.flags(), *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every case run, one start-up for each number of processes."""
    root = tmp_path_factory.mktemp("training_layouts")
    run = picked(request, CASES, USUAL.__contains__)
    words(root / "words.jsonl")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=257)
    byte_tokenizer(tiny_llama(root / "hf", tie_word_embeddings=True, **sizes))
    first = ["import", "--input", str(root / "hf"), "--output", str(root / "dense")]
    references = sorted({case.reference for case in CASES}, key=lambda case: case.name)
    must_pass(launch(1, [first, *(command(root, case) for case in references)], root / "commands"))
    for processes in (2, 4):
        cases = [case for case in run if case.layout.processes == processes]
        must_pass(launch(processes, [command(root, case) for case in cases], root / "commands"))
    must_pass(launch(2, [resume_command(root, *each) for each in RESUMED], root / "commands"))
    return root


def resume_command(root: Path, case: Case, layout: Layout) -> list[str]:
    """A run of one layout that goes on, from a checkpoint before its end, in another."""
    copy = reopened(root / case.name, root / f"{case.name}_resumed", SAVED)
    found = command(root, replace(case, layout=layout))
    found[found.index("--output") + 1] = str(copy)
    return [word for word in found if word != DISTRIBUTED] + ["--resume"]


@pytest.mark.parametrize(("case", "layout"), RESUMED, ids=lambda each: each.name)
def test_layers_that_differ_go_on_in_another_layout(root: Path, case: Case, layout: Layout) -> None:
    resumed = root / f"{case.name}_resumed"
    times = curve(resumed, "tokens_per_s"), curve(root / case.name, "tokens_per_s")
    assert times[0][:SAVED] == times[1][:SAVED] and times[0][SAVED:] != times[1][SAVED:]
    for key in ("loss", "grad_norm", "max_probability/linear_fc2"):
        found, expected = curve(resumed, key), curve(root / case.reference.name, key)
        assert len(found) == STEPS and found == pytest.approx(expected, abs=1e-4, rel=1e-4), key


@pytest.mark.parametrize("case", tried(), ids=lambda case: case.name)
def test_training_follows_one_process(root: Path, case: Case) -> None:
    for key, tolerance, count in (
        ("loss", 1e-5, STEPS),
        ("grad_norm", 1e-4, STEPS),
        ("learning_rate", 1e-12, STEPS),
        ("max_probability/linear_fc2", 1e-5, STEPS),
        ("eval_loss", 1e-5, 2),
    ):
        found, expected = curve(root / case.name, key), curve(root / case.reference.name, key)
        assert len(found) == count, key
        assert found == pytest.approx(expected, abs=tolerance, rel=tolerance), key
    assert min(curve(root / case.name, "learning_rate")) > 0


@pytest.mark.parametrize("case", tried(TAUGHT, JOINT), ids=lambda case: case.name)
def test_each_loss_and_what_fades_follow_one_process(root: Path, case: Case) -> None:
    own = ["lm_loss", "hidden_loss"] if TAUGHT in case.options else ["removed_squares_fraction", "masked_decay"]
    for key in ("distillation_loss", *own):
        found, expected = curve(root / case.name, key), curve(root / case.reference.name, key)
        assert len(found) == STEPS and found == pytest.approx(expected, abs=1e-5, rel=1e-5), key


@pytest.mark.parametrize("case", tried(), ids=lambda case: case.name)
def test_masks_are_those_of_one_process(root: Path, case: Case) -> None:
    found, expected = (Masks.load(root / each.name / "decision") for each in (case, case.reference))
    differing = sum(int((found.get(name) != expected.get(name)).sum()) for name in expected.names())
    assert differing <= 1e-3 * sum(expected.get(name).numel() for name in expected.names())


@pytest.mark.parametrize("case", tried(TILES), ids=lambda case: case.name)
def test_dense_tiles_are_those_of_one_process(root: Path, case: Case) -> None:
    for key in ("tile_probability", "tiles_moved_fraction"):
        found, expected = curve(root / case.name, key), curve(root / case.reference.name, key)
        assert len(found) == STEPS and found == pytest.approx(expected, abs=1e-4), key
    assert curve(root / case.reference.name, "tiles_moved_fraction")[-1] > 0.05


def test_training_moves_what_is_compared(root: Path) -> None:
    """Negative control: the tolerances above are far below what five steps and trained weights change."""
    masks, weights = Case(ONE), Case(ONE, (WEIGHTS,))
    assert abs(curve(root / masks.name, "loss")[-1] - curve(root / weights.name, "loss")[-1]) > 1e-3
    assert abs(curve(root / weights.name, "eval_loss")[0] - curve(root / weights.name, "eval_loss")[1]) > 1e-2
    taught, joint = Case(ONE, (TAUGHT,)), Case(ONE, (JOINT,))
    assert abs(curve(root / taught.name, "lm_loss")[-1] - curve(root / masks.name, "loss")[-1]) > 1e-4
    assert abs(curve(root / taught.name, "grad_norm")[-1] - curve(root / masks.name, "grad_norm")[-1]) > 1e-2
    assert abs(curve(root / joint.name, "eval_loss")[1] - curve(root / weights.name, "eval_loss")[1]) > 1e-3
    dense = Case(ONE, (DENSE,))
    assert abs(curve(root / dense.name, "loss")[-1] - curve(root / masks.name, "loss")[-1]) > 1e-3
    assert abs(curve(root / dense.name, "eval_loss")[-1] - curve(root / masks.name, "eval_loss")[-1]) > 1e-3
    sharp = curve(root / dense.name, "max_probability/linear_fc2")
    assert abs(sharp[-1] - sharp[0]) > 1e-3
    fading = curve(root / joint.name, "removed_squares_fraction")
    assert fading[0] - fading[-1] > 5e-3
