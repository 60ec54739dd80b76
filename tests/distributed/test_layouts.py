"""The promise of the package: one decision in every parallel layout. Every method and target against every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.decision.masks import Masks
from megatron_prune.decision.trimming import Trim
from megatron_prune.decision.units import Units
from tests.distributed.launch import (
    DP2,
    ONE,
    PP2,
    PP2_VPP2_CP2,
    TP2_PP2_SP,
    TP2_SP,
    TP3,
    Layout,
    folder_name,
    launch,
    must_pass,
    picked,
    with_nightly,
)
from tests.models import byte_tokenizer, tiny_llama, tiny_model, words
from tests.runs import curve

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@dataclass(frozen=True)
class Case:
    """A method, its options and a target."""

    method: str
    target: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Folder name."""
        return folder_name(self.method, self.target, self.options)


CASES = [
    Case("magnitude", "2:4"),
    Case("magnitude", "1:4"),
    Case("magnitude", "0.5"),
    Case("wanda", "2:4"),
    Case("wanda", "4:8"),
    Case("wanda", "0.5"),
    Case("sparsegpt", "2:4"),
    Case("sparsegpt", "2:4", ("--no-update-weights",)),
    Case("sparsegpt", "1:4", ("--no-update-weights",)),
    Case("sparsegpt", "2:4", ("--true-sequential",)),
    Case("sparsegpt", "2:4", ("--descent-passes=3",)),
    Case("sparsegpt", "2:4,dense=up_proj+layers.0.mlp"),
    Case("sparsegpt", "2:4,dense=25%"),
    Case("wanda", "2:4@0.75,tile=24xall"),
    Case("wanda", "0.5,spread=0.1"),
    Case("sparsegpt", "2:4@0.6,tile=16x16"),
    Case("sparsegpt", "0.5"),
]
CONTROL = Case("layout_dependent", "2:4")
SEARCH = ("--levels=4", "--generations=2", "--offspring=4", "--survivors=2,1", "--fitness-tokens=64,128")
STRUCTURED = [
    Case("shortgpt", "num_layers=1"),
    Case("minitron", "num_layers=1"),
    Case("minitron", "hidden_size=48,ffn_hidden_size=96,num_query_groups=1"),
    Case("llm_pruner", "ffn_hidden_size=100,num_query_groups=1", ("--protected-first=0", "--protected-last=0")),
    Case("flap", "parameters=150000"),
    Case("darwinlm", "parameters=150000", (*SEARCH, "--training-tokens=0")),
    Case(
        "darwinlm",
        "parameters=150000",
        (*SEARCH, "--training-tokens=100,200", "--training-lr=1e-3", "--training-batch=2"),
    ),
]
STRUCTURED_CONTROL = Case("layout_dependent_units", "ffn_hidden_size=64")
ALL_CASES = [*CASES, CONTROL, *STRUCTURED, STRUCTURED_CONTROL]
LAYOUTS = [TP2_SP, PP2, DP2, TP3, TP2_PP2_SP, PP2_VPP2_CP2]
FEW = [*(CASES[number] for number in (3, 6, 12, 15)), CONTROL, *STRUCTURED[:5:2], STRUCTURED_CONTROL]
"""With every change on more than two processes, too, which take long on few cores."""


def usual(pair: tuple[Case, Layout]) -> bool:
    """What is tested with every change."""
    return pair[1].processes < 3 or pair[0] in FEW


def tried(cases: Sequence[Case], layouts: Sequence[Layout] = LAYOUTS) -> list[Any]:
    """Each case in each layout."""
    return with_nightly([(case, layout) for layout in layouts for case in cases], usual)


MODELS = {
    # 4 heads in 2 groups, untied: everything but TP=3
    "even": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=257),
    # SmolLM2's shape in small: 9 heads in 3 groups, tied embeddings, a vocabulary that 3 does not divide
    "nine": dict(
        hidden_size=144,
        intermediate_size=192,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        vocab_size=257,
    ),
}
FAMILIES = {"qwen2": TP2_SP, "gpt2": TP2_PP2_SP}
"""Other families, with biases, tied embeddings and learned positions, and the layout each is compared in."""
FAMILY_CASES = [Case("magnitude", "2:4"), Case("wanda", "2:4"), Case("sparsegpt", "2:4,dense=25%")]
STEPS = 10


def model_of(layout: Layout) -> str:
    """Which of the models a layout fits."""
    return "nine" if layout.tensor == 3 else "even"


def prune_command(root: Path, model: str, case: Case, layout: Layout) -> list[str]:
    """The `prune` verb of a one-shot case."""
    output = root / "runs" / model / layout.name / case.name
    text = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", "7", "--calibration-seq-length", "32"]
    calibration = [] if case.method in ("magnitude", "layout_dependent") else text
    return [
        *["prune", "--input", str(root / model), "--output", str(output), "--method", case.method],
        *["--target", case.target, *calibration, *case.options, *layout.flags()],
    ]


def learn_command(root: Path, model: str, layout: Layout, name: str = "learned") -> list[str]:
    """The `prune` verb of a mask-learning run: two windows a step, on one replica accumulated, on two in parallel."""
    output = root / "runs" / model / layout.name / name
    options = {
        "--seq-length": "32",
        "--global-batch-size": "2",
        "--train-iters": str(STEPS),
        "--lr": "4e-4",
        "--temperature-end": "2",
        "--save-interval": "1000",
        "--eval-interval": "1000",
        "--prior": str(root / "runs" / model / ONE.name / CASES[3].name),
    }
    words_of_options = [word for pair in options.items() for word in pair]
    inputs = ["--input", str(root / model), "--output", str(output), "--data", str(root / "words.jsonl")]
    return ["prune", "--method", "maskllm", "--target", "2:4", *inputs, *words_of_options, *layout.flags()]


def family_commands(root: Path, family: str, layout: Layout) -> list[list[str]]:
    """Every method on a model of another family."""
    return [*(prune_command(root, family, case, layout) for case in FAMILY_CASES), learn_command(root, family, layout)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with both models imported and every case run in every layout: one start-up per number of processes."""
    root = tmp_path_factory.mktemp("layouts")
    words(root / "words.jsonl")
    one: list[list[str]] = []
    for model, sizes in MODELS.items():
        byte_tokenizer(tiny_llama(root / f"{model}_hf", **sizes))
        one.append(["import", "--input", str(root / f"{model}_hf"), "--output", str(root / model)])
        layouts = [layout for layout in LAYOUTS if model_of(layout) == model]
        cases = picked(request, ALL_CASES, lambda case: any(usual((case, layout)) for layout in layouts))  # noqa: B023
        one += [prune_command(root, model, case, ONE) for case in cases]
        one.append(learn_command(root, model, ONE))
    for family in FAMILIES:
        byte_tokenizer(tiny_model(root / f"{family}_hf", family, vocab_size=257, tie_word_embeddings=True))
        one.append(["import", "--input", str(root / f"{family}_hf"), "--output", str(root / family)])
        one += family_commands(root, family, ONE)
    must_pass(launch(1, one, root / "commands"))
    for processes in (2, 3, 4):
        commands: list[list[str]] = []
        layouts = [layout for layout in LAYOUTS if layout.processes == processes]
        for layout in layouts:
            pairs = picked(request, [(case, layout) for case in ALL_CASES], usual)
            commands += [prune_command(root, model_of(layout), case, layout) for case, _ in pairs]
            commands.append(learn_command(root, model_of(layout), layout))
        for family, layout in FAMILIES.items():
            if layout.processes == processes:
                commands += family_commands(root, family, layout)
        if processes == 2:
            commands += [["control"], learn_command(root, "even", TP2_SP, "local_noise")]
        must_pass(launch(processes, commands, root / "commands"))
    return root


def masks(root: Path, layout: Layout, model: str, name: str) -> Masks:
    """The decision of a run."""
    return Masks.load(root / "runs" / model / layout.name / name / "decision")


def differing(a: Masks, b: Masks) -> float:
    """Share of the weights on which two decisions differ."""
    assert a.names() == b.names()
    pairs = [(a.get(name), b.get(name)) for name in a.names()]
    return sum(int((x != y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


def losses(root: Path, layout: Layout, model: str, name: str = "learned") -> list[float]:
    """Training loss of every step of a run."""
    return curve(root / "runs" / model / layout.name / name)


@pytest.mark.parametrize(("case", "layout"), tried(CASES), ids=lambda each: each.name)
def test_one_shot_decision_is_the_same(root: Path, case: Case, layout: Layout) -> None:
    model = model_of(layout)
    assert differing(masks(root, ONE, model, case.name), masks(root, layout, model, case.name)) == 0.0


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_comparison_can_fail(root: Path, layout: Layout) -> None:
    """Negative control: a method that draws from each rank's own generator is told from a layout-free one."""
    model = model_of(layout)
    share = differing(masks(root, ONE, model, CONTROL.name), masks(root, layout, model, CONTROL.name))
    assert share > 0.1


@pytest.mark.parametrize("layout", [TP2_SP, PP2, DP2], ids=lambda layout: layout.name)
def test_compensated_weights_are_the_same(root: Path, layout: Layout) -> None:
    import megatron_prune.backend as backend
    from megatron_prune.model.checkpoint import load_model

    with backend.running(backend.Layout()):
        name = Case("sparsegpt", "2:4").name
        a, b = (load_model(root / "runs" / "even" / x.name / name / "weights", backend.Layout()) for x in (ONE, layout))
        for parameter, other in zip(a.parameters.values(), b.parameters.values(), strict=True):
            assert torch.equal(parameter, other)


def units(root: Path, layout: Layout, case: Case) -> Units:
    """The structured decision of a run."""
    return Trim.load(root / "runs" / model_of(layout) / layout.name / case.name / "decision").units


def units_of_one(root: Path, model: str, case: Case) -> Units:
    """The same, of one process."""
    return Trim.load(root / "runs" / model / ONE.name / case.name / "decision").units


@pytest.mark.parametrize(("case", "layout"), tried(STRUCTURED), ids=lambda each: each.name)
def test_structured_decision_is_the_same(root: Path, case: Case, layout: Layout) -> None:
    assert units(root, layout, case) == units_of_one(root, model_of(layout), case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_structured_comparison_can_fail(root: Path, layout: Layout) -> None:
    control = STRUCTURED_CONTROL
    assert units(root, layout, control) != units_of_one(root, model_of(layout), control)


@pytest.mark.parametrize("layout", [TP2_SP, PP2, DP2], ids=lambda layout: layout.name)
@pytest.mark.parametrize("case", STRUCTURED[2:], ids=lambda case: case.name)
def test_refitted_weights_are_the_same(root: Path, case: Case, layout: Layout) -> None:
    """To rounding: sums over windows are float64, what is fitted is solved from them."""
    import megatron_prune.backend as backend
    from megatron_prune.model.checkpoint import load_model

    with backend.running(backend.Layout()):
        runs = (root / "runs" / "even" / x.name / case.name / "weights" for x in (ONE, layout))
        a, b = (load_model(run, backend.Layout()) for run in runs)
        for parameter, other in zip(a.parameters.values(), b.parameters.values(), strict=True):
            torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_mask_learning_follows_one_process(root: Path, layout: Layout) -> None:
    """Loss within 1e-5 for ten steps at the temperatures of a long run's start, and almost the same mask.

    Sums over ranks are rounded in another order; a temperature near 0 would make any rounding a flipped sample.
    """
    model = model_of(layout)
    expected, found = losses(root, ONE, model), losses(root, layout, model)
    assert len(expected) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)
    assert differing(masks(root, ONE, model, "learned"), masks(root, layout, model, "learned")) < 1e-3


def test_mask_learning_learns(root: Path) -> None:
    assert differing(masks(root, ONE, "even", "learned"), masks(root, ONE, "even", CASES[3].name)) > 0.001


def test_layout_dependent_noise_is_noticed(root: Path) -> None:
    """Negative control: noise numbered by local position makes another run at TP=2."""
    found = losses(root, TP2_SP, "even", "local_noise")
    assert max(abs(a - b) for a, b in zip(found, losses(root, ONE, "even"), strict=True)) > 1e-4


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_decided_alike(root: Path, family: str, case: Case) -> None:
    one, other = (masks(root, layout, family, case.name) for layout in (ONE, FAMILIES[family]))
    assert differing(one, other) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_learn_alike(root: Path, family: str) -> None:
    layout = FAMILIES[family]
    assert losses(root, layout, family) == pytest.approx(losses(root, ONE, family), abs=1e-5)
    assert differing(masks(root, ONE, family, "learned"), masks(root, layout, family, "learned")) < 1e-3
