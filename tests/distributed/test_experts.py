"""Models with experts: decisions and training are the same however experts, layers and sequences are spread."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_prune.backend as backend
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.trimming import Trim
from megatron_prune.model.checkpoint import load_model
from tests.distributed.launch import (
    EP2,
    EP2_ETP2_SP,
    EP2_PP2,
    EP2_TP2_SP,
    EP4,
    ETP2,
    ONE,
    TP2_SP,
    TP2_SP_ETP1,
    Layout,
    folder_name,
    launch,
    must_pass,
    picked,
    with_nightly,
)
from tests.models import byte_tokenizer, tiny_model, words
from tests.runs import curve, reopened

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
MODELS = {
    "mixed": ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [1]}),
    "shared": ("qwen2_moe", {}),
    "sinks": ("gpt_oss", {}),
    "latent": ("deepseek_v3", {"num_hidden_layers": 4, "n_routed_experts": 16}),
}
PAIRS = [("mixed", layout) for layout in (TP2_SP, EP2, EP2_TP2_SP, EP2_ETP2_SP, EP2_PP2, EP4)]
PAIRS += [("shared", layout) for layout in (EP2, EP2_TP2_SP)] + [("sinks", EP2_TP2_SP)]
PAIRS += [("latent", layout) for layout in (EP2_TP2_SP, EP2_PP2)]
STEPS = 5


def usual(pair: tuple[str, Layout]) -> bool:
    """A model or a run that trains, and a layout, which are tested with every change."""
    name, layout = pair
    own = {"mixed": (EP2_TP2_SP, EP2_PP2), "masks_and_weights": (EP2,), "beside_dense": (EP2,)}
    return layout in own.get(name, (EP2_TP2_SP,)) and name not in ("taught", "latent_recovered", "latent_adapted")


@dataclass(frozen=True)
class Case:
    """A one-shot method and its options."""

    method: str
    target: str = "2:4"
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Folder name."""
        return folder_name(self.method, self.target, self.options)


CASES = [
    Case("magnitude"),
    Case("wanda"),
    Case("wanda", "0.5"),
    Case("sparsegpt"),
    Case("wanda", "2:4,dense=25%"),
    Case("sparsegpt", "2:4", ("--true-sequential",)),
]
REMOVED = Case("reap", "num_moe_experts=4")
"""As many as every layout divides."""
MERGED = Case("ream", "num_moe_experts=4", ("--group-size=3",))
NARROWED = Case("minitron", "num_moe_experts=4,moe_ffn_hidden_size=12,hidden_size=24,num_attention_heads=2")
SHARED = Case("minitron", "moe_shared_expert_intermediate_size=20,moe_ffn_hidden_size=12", ("--refit", "propagated"))
LATENT = Case("minitron", "hidden_size=24,num_query_groups=2", ("--refit", "propagated"))
GROUPED = Case("reap", "num_moe_experts=8")
DEPTH = Case("shortgpt", "num_layers=3")
CONTROL = Case("layout_dependent")
ALL = (*CASES, REMOVED, MERGED, NARROWED, SHARED, LATENT, GROUPED, DEPTH, CONTROL)
FEW = (CASES[1], *CASES[-2:], REMOVED, MERGED, NARROWED, GROUPED, CONTROL)
"""On four processes, which take long on few cores."""
TRAINED = {
    "learned": ["prune", "--method", "maskllm", "--target", "2:4", "--mask-draw", "step", "--temperature-end", "2"]
    + ["--prior", "magnitude", "--weight-regularization", "1e-3"],
    "taught": ["prune", "--method", "maskllm", "--target", "2:4", "--mask-draw", "step", "--temperature-end", "2"]
    + ["--prior", "magnitude", "--teacher", "ROOT/mixed", "--lm-weight", "1", "--hidden-weight", "1"],
    "masks_and_weights": ["prune", "--method", "maskllm", "--target", "2:4", "--mask-draw", "step", "--train-weights"]
    + ["--temperature-end", "2", "--prior", "magnitude", "--use-distributed-optimizer", "--masked-decay", "100"]
    + ["--weight-clip", "0.5", "--weight-eps", "1e-6"],
    "beside_dense": ["prune", "--method", "maskllm", "--mask-draw", "step", "--temperature-end", "2", "--target"]
    + ["2:4,dense=layers.0.mlp.experts.*.up_proj+layers.2.mlp.experts.1.+v_proj+layers.1.self_attn.o_proj"]
    + ["--prior", "magnitude"],
    "recovered": ["train", "--use-distributed-optimizer", "--moe-aux-loss-coeff", "0.1"],
    "adapted": ["train", "--lora-rank", "4"],
}
TRAINED |= {f"latent_{name}": TRAINED[name] for name in ("learned", "recovered", "adapted")}
"""The same of a model with latent attention."""
TRAINING = [
    *((name, EP2) for name in TRAINED),
    ("beside_dense", EP2_PP2),
    *((name, EP2_TP2_SP) for name in ("learned", "taught", "recovered", "adapted")),
    ("recovered", TP2_SP_ETP1),
    ("learned", ETP2),
    *((name, EP2_ETP2_SP) for name in ("masks_and_weights", "recovered")),
    ("learned", EP2_PP2),
    ("recovered", EP4),
    *((f"latent_{name}", EP2_TP2_SP) for name in ("learned", "recovered", "adapted")),
]
RESUMED = [
    ("masks_and_weights", EP2, ONE),
    ("recovered", EP2, ONE),
    ("masks_and_weights", ONE, EP2_TP2_SP),
    ("beside_dense", EP2, ONE),
    ("recovered", EP2_ETP2_SP, EP4),
]
"""What is gone on with in another layout than it was saved in."""


def usually_resumed(each: tuple[str, Layout, Layout]) -> bool:
    """Of `RESUMED`, with every change."""
    return each[0] != "recovered" and each[1] == EP2


def prune_command(root: Path, model: str, case: Case, layout: Layout) -> list[str]:
    """The `prune` verb of a one-shot case."""
    text = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", "7", "--calibration-seq-length", "32"]
    inputs = ["--input", str(root / model), "--output", str(root / "runs" / model / layout.name / case.name)]
    calibration = text if case.method not in ("magnitude", "layout_dependent") else []
    choice = ["prune", "--method", case.method, "--target", case.target, *case.options]
    return [*choice, *inputs, *calibration, *layout.flags()]


def train_command(root: Path, name: str, layout: Layout) -> list[str]:
    """A verb that trains, four windows a step, on a dense model or one that Wanda has pruned."""
    model = "latent" if name.startswith("latent_") else "mixed"
    source = root / (f"{model}_pruned" if TRAINED[name][0] == "train" else model)
    inputs = ["--input", str(source), "--output", str(root / "runs" / layout.name / name)]
    data = ["--data", str(root / "words.jsonl"), "--seq-length", "32", "--global-batch-size", "4"]
    steps = ["--train-iters", str(STEPS), "--lr", "1e-3", "--save-interval", "2"]
    steps += ["--eval-data", str(root / "words.jsonl"), "--eval-windows", "3", "--eval-interval", "4"]
    verb = [word.replace("ROOT", str(root)) for word in TRAINED[name]]
    return [*verb, *inputs, *data, *steps, *layout.flags()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every case run in every layout, one start-up for each number of processes."""
    root = tmp_path_factory.mktemp("experts")
    pairs, training = picked(request, PAIRS, usual), picked(request, TRAINING, usual)
    resumed = picked(request, RESUMED, usually_resumed)
    words(root / "words.jsonl")
    one: list[list[str]] = []
    for model, (family, sizes) in MODELS.items():
        byte_tokenizer(tiny_model(root / f"{model}_hf", family, vocab_size=257, **sizes))
        one.append(["import", "--input", str(root / f"{model}_hf"), "--output", str(root / model)])
        one += [prune_command(root, model, case, ONE) for case in ALL if fits(model, case)]
    for model in ("mixed", "latent"):
        pruned = root / "runs" / model / ONE.name / CASES[1].name
        one.append(["trim", "--input", str(pruned), "--output", str(root / f"{model}_pruned")])
    trained = {name for name, _ in training}
    one += [train_command(root, name, ONE) for name in TRAINED if name in trained]
    must_pass(launch(1, one, root / "commands"))
    for processes in (2, 4):
        commands: list[list[str]] = []
        for model, layout in pairs:
            if layout.processes == processes:
                commands += [prune_command(root, model, case, layout) for case in ALL if fits(model, case, layout)]
        commands += [train_command(root, name, layout) for name, layout in training if layout.processes == processes]
        must_pass(launch(processes, commands, root / "commands"))
    for processes in (1, 2):
        commands = [evaluate_command(root, layout) for layout in (ONE, EP2) if layout.processes == processes]
        must_pass(launch(processes, commands, root / "commands"))
    for processes in (1, 2, 4):
        commands = [resume_command(root, *case) for case in resumed if case[2].processes == processes]
        must_pass(launch(processes, commands, root / "commands"))
    return root


def evaluate_command(root: Path, layout: Layout) -> list[str]:
    """Perplexity of windows that two replicas cannot share out evenly."""
    text = root / "held_out.txt"
    text.write_text((root / "words.jsonl").read_text()[:4000])
    output = root / f"evaluated_{layout.name}.json"
    windows = ["--window", "32", "--windows", "5", "--micro-batch-size", "2"]
    return [
        "evaluate",
        "--input",
        str(root / "mixed"),
        "--text",
        str(text),
        *windows,
        "--output",
        str(output),
        *layout.flags(),
    ]


def fits(model: str, case: Case, layout: Layout = ONE) -> bool:
    """What a model has the parts for; on four processes few cases are run."""
    own = {"mixed": (REMOVED, MERGED, NARROWED), "shared": (SHARED,), "sinks": (NARROWED,)}
    own["latent"] = (LATENT, GROUPED, DEPTH)
    missing = {REMOVED, MERGED, NARROWED, SHARED, LATENT, GROUPED, DEPTH}.difference(own[model])
    return case not in missing and (layout.processes < 4 or case in FEW)


def resume_command(root: Path, name: str, saved: Layout, goes_on: Layout) -> list[str]:
    """A run of one layout that goes on, from a checkpoint before its end, in another."""
    copy = root / "resumed" / f"{name}_{saved.name}_{goes_on.name}"
    reopened(root / "runs" / saved.name / name, copy, 2)
    command = train_command(root, name, goes_on)
    command[command.index("--output") + 1] = str(copy)
    return [*command, "--resume"]


def differing(root: Path, model: str, case: Case, layout: Layout) -> float:
    """Share of the weights on which a layout decides otherwise than one process."""
    a, b = (Masks.load(root / "runs" / model / x.name / case.name / "decision") for x in (ONE, layout))
    assert a.names() == b.names() and any(".experts.5." in name for name in a.names()) == (model in ("mixed", "latent"))
    pairs = [(a.get(name), b.get(name)) for name in a.names()]
    return sum(int((x != y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


def named(each: Any) -> str:
    """Of a parameter of a test."""
    return each if isinstance(each, str) else each.name


def tried(*cases: Case) -> list[Any]:
    """Each in all layouts in which it is run."""
    found = [(*pair, case) for case in cases for pair in PAIRS if fits(pair[0], case, pair[1])]
    return with_nightly(found, lambda each: usual(each[:2]))


@pytest.mark.parametrize(("model", "layout", "case"), tried(*CASES), ids=named)
def test_one_shot_decision_is_the_same(root: Path, model: str, case: Case, layout: Layout) -> None:
    assert differing(root, model, case, layout) == 0.0


@pytest.mark.parametrize(("model", "layout"), with_nightly(PAIRS, usual), ids=named)
def test_the_comparison_can_fail(root: Path, model: str, layout: Layout) -> None:
    assert differing(root, model, CONTROL, layout) > 0.1


@pytest.mark.parametrize(
    ("model", "layout", "case"),
    tried(REMOVED, MERGED, NARROWED, SHARED, LATENT, GROUPED, DEPTH),
    ids=lambda each: named(each)[:16],
)
def test_the_same_units_stay(root: Path, model: str, layout: Layout, case: Case) -> None:
    found, expected = (Trim.load(root / "runs" / model / x.name / case.name / "decision").units for x in (layout, ONE))
    assert found == expected
    if model == "mixed":
        assert len(found.blocks[0].experts) == 4 and not found.blocks[1].experts
    if case == GROUPED:
        assert all(len(block.experts) in (0, 8) for block in found.blocks)
    if case in (NARROWED, SHARED):
        assert len(set(found.blocks[0].expert_ffn)) > 1


@pytest.mark.parametrize(("model", "layout", "case"), tried(MERGED), ids=named)
def test_merged_experts_are_the_same(root: Path, model: str, layout: Layout, case: Case) -> None:
    folders = [root / "runs" / model / x.name / case.name / "weights" for x in (ONE, layout)]
    with backend.running(backend.Layout()):
        whole, *found = (load_model(x, backend.Layout()).parameters for x in (root / model, *folders))
    changed = [name for name, weight in found[0].items() if not torch.equal(weight, whole[name])]
    assert changed and all(".experts." in name for name in changed)
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "layout"), with_nightly(TRAINING, usual), ids=named)
def test_training_follows_one_process(root: Path, name: str, layout: Layout) -> None:
    here, there = (root / "runs" / x.name / name for x in (layout, ONE))
    keys = {"loss": 1e-5, "grad_norm": 1e-4}
    assert curve(here, "eval_loss") == pytest.approx(curve(there, "eval_loss"), abs=1e-5)
    assert curve(here, "eval_loss")
    if name.endswith("learned"):
        kind = "linear_kv_down_proj" if name.startswith("latent_") else "linear_fc2"
        keys |= {"max_probability": 1e-5, f"max_probability/{kind}": 1e-5}
    assert curve(here, "zeros") == curve(there, "zeros")
    assert all(curve(here, "zeros")) and bool(curve(here, "zeros")) == (TRAINED[name][0] == "train")
    for key, tolerance in keys.items():
        found, expected = curve(here, key), curve(there, key)
        assert len(found) == STEPS and expected[0] != expected[-1]
        assert found == pytest.approx(expected, abs=tolerance, rel=tolerance), key


@pytest.mark.parametrize(
    ("name", "saved", "goes_on"),
    with_nightly(RESUMED, usually_resumed),
    ids=named,
)
def test_a_run_goes_on_in_another_layout(root: Path, name: str, saved: Layout, goes_on: Layout) -> None:
    """With the moments of Adam of every expert: they decide the steps that follow."""
    found = curve(root / "resumed" / f"{name}_{saved.name}_{goes_on.name}")
    assert found == pytest.approx(curve(root / "runs" / ONE.name / name), abs=1e-5)


def test_perplexity_with_shared_out_experts_is_that_of_one_process(root: Path) -> None:
    found, expected = (json.loads((root / f"evaluated_{x.name}.json").read_text()) for x in (EP2, ONE))
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert found["predicted_tokens"] == expected["predicted_tokens"] == 5 * 31


def test_adapters_and_recovery_keep_zeros(root: Path) -> None:
    for name in ("recovered", "adapted"):
        exported = root / f"{name}_hf"
        shutil.rmtree(exported, ignore_errors=True)
        run = root / "runs" / EP2_TP2_SP.name / name / "weights"
        must_pass(launch(1, [["export", "--input", str(run), "--output", str(exported)]], root / "commands"))
        after, kept = load_file(exported / "model.safetensors"), Masks.load(root / "runs/mixed/one/wanda_2-4/decision")
        for weight in kept.names():
            assert not after[weight][~kept.get(weight)].any() and after[weight].count_nonzero() > 0
