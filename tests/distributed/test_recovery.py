"""Recovery training in every layout follows one process, and its losses and gradients are transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.gradients import WEIGHTING, RandomWindows
from tests.distributed.launch import DP2, ONE, PP2, TP2_SP, Layout, launch, must_pass
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve, reopened

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, SAVED = 10, 5
TP2, CP2 = Layout("tp2", 2, tensor=2), Layout("cp2", 2, context=2)
LAYOUTS = [TP2, TP2_SP, PP2, CP2, DP2]
KINDS = {
    "taught": "--teacher ROOT/teacher --lm-weight 0.5 --hidden-weight 1 --distillation-temperature 2 --lr 4e-4",
    "lora": "--lora-rank 4 --lora-dropout 0.2 --lr 1e-2",
}
"""Losses, and adapters on all linears."""
DISTRIBUTED = "--use-distributed-optimizer"


def train(root: Path, kind: str, layout: Layout, name: str = "") -> list[str]:
    """Ten steps of four windows from a model pruned to 2:4, a checkpoint after five."""
    places = ["--input", str(root / "pruned"), "--output", str(root / (name or f"{kind}_{layout.name}"))]
    sizes = f"--seq-length 32 --global-batch-size 4 --train-iters {STEPS} --save-interval {SAVED}".split()
    more = KINDS[kind].replace("ROOT", str(root)).split() + [DISTRIBUTED] * (layout is DP2)
    return ["train", *places, "--data", str(root / "words.jsonl"), *sizes, *more, *layout.flags()]


def gradients(root: Path, layout: Layout) -> list[str]:
    """A backward pass with all losses."""
    flags = [str(layout.tensor), str(layout.pipeline), str(layout.sequence_parallel)]
    return ["recovery_gradients", str(root / "dense"), str(root / "deep"), str(gradients_file(root, layout)), *flags]


def gradients_file(root: Path, layout: Layout) -> Path:
    """Where they are written."""
    return root / f"gradients_{layout.name}.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything run: in one process, then in two; the adapters' run also goes on in two from one's checkpoint."""
    root = tmp_path_factory.mktemp("recovery_layouts")
    words(root / "words.jsonl")
    sizes = dict(hidden_size=64, vocab_size=257)
    byte_tokenizer(tiny_llama(root / "hf", intermediate_size=128, num_hidden_layers=2, **sizes))
    byte_tokenizer(tiny_llama(root / "teacher", intermediate_size=96, num_hidden_layers=4, seed=1, **sizes))
    pairs = {"hf": "dense", "teacher": "deep"}
    imports = [["import", "--input", str(root / a), "--output", str(root / b)] for a, b in pairs.items()]
    prune = ["prune", "--input", str(root / "dense"), "--output", str(root / "pruned"), "--method", "magnitude"]
    first = [*imports, [*prune, "--target", "2:4"], *(train(root, kind, ONE) for kind in KINDS)]
    must_pass(launch(1, [*first, gradients(root, ONE)], root / "commands"))
    reopened(root / "lora_one", root / "lora_moved", SAVED)
    second = [train(root, kind, layout) for kind in KINDS for layout in LAYOUTS]
    second += [gradients(root, layout) for layout in (TP2, TP2_SP, PP2)]
    must_pass(launch(2, [*second, [*train(root, "lora", TP2_SP, "lora_moved"), "--resume"]], root / "commands"))
    return root


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_one_process(root: Path, kind: str, layout: Layout) -> None:
    found = f"{kind}_{layout.name}"
    keys = ["loss", "lm_loss"] + ["distillation_loss", "hidden_loss"] * (kind == "taught")
    for key, tolerance in [*((key, 1e-5) for key in keys), ("grad_norm", 1e-4)]:
        expected = curve(root / f"{kind}_one", key)
        assert len(expected) == STEPS
        assert curve(root / found, key) == pytest.approx(expected, abs=tolerance, rel=tolerance), key
    assert curve(root / found, "zeros") == curve(root / f"{kind}_one", "zeros")
    assert curve(root / f"{kind}_one", "loss")[0] - curve(root / found, "loss")[-1] > 0.05


def test_adapters_move_to_another_layout(root: Path) -> None:
    """Saved by one process: gate and up halves of B would be permuted on two, and the loss with them."""
    assert curve(root / "lora_moved", "loss") == pytest.approx(curve(root / "lora_one", "loss"), abs=1e-5)


class Expected:
    """Losses and gradients of `WEIGHTING`'s sum by transformers on whole tensors."""

    def __init__(self, root: Path) -> None:
        from transformers import AutoModelForCausalLM

        student, teacher = (AutoModelForCausalLM.from_pretrained(root / name).eval() for name in ("hf", "teacher"))
        windows = RandomWindows(257).tokens
        with torch.no_grad():
            said = teacher(windows[:, :-1])
        own = student(windows[:, :-1])
        t = WEIGHTING.temperature
        p, log_q = F.softmax(said.logits / t, -1), F.log_softmax(own.logits / t, -1)
        kl = (p * (p.log() - log_q)).sum(-1).mean()
        self.parts = {
            "lm_loss": F.cross_entropy(own.logits.flatten(0, 1), windows[:, 1:].flatten()),
            "distillation_loss": t**2 * kl,
            "hidden_loss": distances(student, teacher, windows[:, :-1]),
        }
        total = WEIGHTING.lm * self.parts["lm_loss"] + WEIGHTING.distillation * self.parts["distillation_loss"]
        (total + WEIGHTING.hidden * self.parts["hidden_loss"]).backward()
        self.gradients = {name: parameter.grad for name, parameter in student.named_parameters()}


def distances(student: torch.nn.Module, teacher: torch.nn.Module, tokens: Tensor) -> Tensor:
    """1 - cosine of the outputs of layers 0 and 1 of the student and 1 and 3 of the teacher, before any final norm."""
    outputs: list[Tensor] = []
    layers = [student.model.layers[0], student.model.layers[1], teacher.model.layers[1], teacher.model.layers[3]]
    hooks = [layer.register_forward_hook(lambda _m, _i, x: outputs.append(x)) for layer in layers]
    student(tokens)
    with torch.no_grad():
        teacher(tokens)
    for hook in hooks:
        hook.remove()
    a, b, c, d = (x[0] if isinstance(x, tuple) else x for x in outputs)
    return (1 - F.cosine_similarity(a, c, dim=-1)).mean() / 2 + (1 - F.cosine_similarity(b, d, dim=-1)).mean() / 2


@pytest.fixture(scope="module")
def expected(root: Path) -> Expected:
    """Computed once."""
    return Expected(root)


@pytest.mark.parametrize("layout", [ONE, TP2, TP2_SP, PP2], ids=lambda layout: layout.name)
def test_losses_and_gradients_are_those_of_transformers(root: Path, expected: Expected, layout: Layout) -> None:
    found = load_file(gradients_file(root, layout))
    for name, value in expected.parts.items():
        assert float(found.pop(name)) == pytest.approx(value.item(), rel=1e-5), name
    assert found.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-6, name
