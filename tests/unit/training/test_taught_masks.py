"""Masks that learn from a teacher: losses and gradients are transformers' own, and the dense model needs no copy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.source import open_model
from megatron_prune.kernels.gumbel import decode, patterns
from megatron_prune.model import convert
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.training.recovery import OwnTeacher, RecoveryLoss
from megatron_prune.training.weighting import Weighting
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve, reopened, saved_tensors

STEPS, SAVED = 6, 3
WEIGHTING = Weighting(lm=0.5, distillation=2.0, hidden=3.0, temperature=2.0)
TAUGHT = ("--lm-weight", "0.5", "--distillation-temperature", "2", "--hidden-weight", "1")
ALONE = ("self_attn.o_proj", "mlp.down_proj")
"""Linears that are one matrix under both names."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a copy of it, and one run that each of them teaches."""
    root = tmp_path_factory.mktemp("taught")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "dense")]) == 0
    shutil.copytree(root / "dense", root / "copy")
    for teacher in ("dense", "copy"):
        assert main(learn(root, f"by_{teacher}", "--teacher", str(root / teacher), *TAUGHT)) == 0
    return root


def learn(root: Path, output: str, *more: str) -> list[str]:
    """Learning on a few words, one window at a time."""
    places = ["--input", str(root / "dense"), "--output", str(root / output), "--data", str(root / "words.jsonl")]
    sizes = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", str(STEPS), "--lr", "1e-3"]
    choice = ["--method", "maskllm", "--target", "2:4", "--prior", "magnitude", "--temperature-end", "2"]
    return ["prune", *choice, *places, *sizes, "--save-interval", str(SAVED), "--keep-checkpoints", "9", *more]


def student(root: Path) -> tuple[PrunableModel, MaskDraw]:
    """The model with random logits and masks that are their best patterns."""
    model = load_model(root / "dense", backend.Layout())
    draw = MaskDraw(2, 4, seed=0, scale=3.0, temperature=0.8, noise=False, hard=True)
    for chunk in model.chunks:
        chunk.requires_grad_(False)
    model.learn_masks(draw)
    for linear in model.linears():
        with torch.no_grad():
            linear.module.mask_logits.normal_(generator=torch.Generator().manual_seed(linear.tensor_id))
    model.chunks[0].train()
    return model, draw


class Expected:
    """By transformers, on whole tensors: the sum of losses of a masked model and its dense teacher."""

    def __init__(self, root: Path, masks: dict[str, Tensor], windows: Tensor) -> None:
        from transformers import AutoModelForCausalLM

        networks = [AutoModelForCausalLM.from_pretrained(root / "hf").eval() for _ in range(2)]
        self.masked, dense = networks
        with torch.no_grad():
            for name, mask in masks.items():
                self.masked.get_parameter(name).mul_(mask)
        own, theirs = (self._outputs(network, windows[:, :-1]) for network in networks)
        t = WEIGHTING.temperature
        p, log_q = F.softmax(theirs[0].detach() / t, -1), F.log_softmax(own[0] / t, -1)
        self.parts = {
            "lm_loss": F.cross_entropy(own[0].flatten(0, 1), windows[:, 1:].flatten()),
            "distillation_loss": t**2 * (p * (p.log() - log_q)).sum(-1).mean(),
            "hidden_loss": torch.stack(
                [
                    (1 - F.cosine_similarity(a, b.detach(), dim=-1)).mean()
                    for a, b in zip(own[1:], theirs[1:], strict=True)
                ]
            ).mean(),
        }
        total = WEIGHTING.lm * self.parts["lm_loss"] + WEIGHTING.distillation * self.parts["distillation_loss"]
        (total + WEIGHTING.hidden * self.parts["hidden_loss"]).backward()
        self.dense = dense

    @staticmethod
    def _outputs(network: Any, tokens: Tensor) -> list[Tensor]:
        """Logits, and the outputs of all layers."""
        found: list[Tensor] = []
        for layer in network.model.layers:
            layer.register_forward_hook(lambda _m, _i, x: found.append(x[0] if isinstance(x, tuple) else x))
        logits = network(tokens).logits
        return [logits, *found]

    def gradient_of_logits(self, name: str, logits: Tensor) -> Tensor:
        """Of the soft mask, by autograd of the definition."""
        weight, slope = self.dense.get_parameter(name), self.masked.get_parameter(name).grad
        assert slope is not None
        leaf = logits.detach().clone().requires_grad_()
        soft = (leaf * 3.0 / 0.8).softmax(-1) @ patterns(2, 4).float()
        (soft.flatten(1) * (weight * slope).detach()).sum().backward()
        assert leaf.grad is not None
        return leaf.grad


def decoded(model: PrunableModel, draw: MaskDraw) -> dict[str, Tensor]:
    """Hugging Face name -> the mask of each weight."""
    found: dict[str, Tensor] = {}
    for linear in model.linears():
        mask = decode(linear.module.mask_logits, draw.n, draw.m)
        found.update(zip(linear.map.hf, convert.split(linear.map, mask, model.config), strict=True))
    return found


@pytest.mark.parametrize("windows", [1, 3])
def test_losses_and_gradients_are_those_of_transformers(root: Path, windows: int) -> None:
    tokens = torch.randint(257, (windows, 17), generator=torch.Generator().manual_seed(windows))
    with backend.running(backend.Layout()):
        model, draw = student(root)
        objective = RecoveryLoss(model, WEIGHTING, model, 1, draw)
        assert isinstance(objective.teacher, OwnTeacher)
        output, loss_of = objective.forward(model.chunks[0], tokens)
        loss, parts = loss_of(output)
        loss.backward()
        found = {**{name: float(value) for name, value in parts.items()}, **objective.elsewhere()}
        expected = Expected(root, decoded(model, draw), tokens)
        assert found == pytest.approx({name: value.item() for name, value in expected.parts.items()}, rel=1e-5)
        assert found["distillation_loss"] > 0.1  # a teacher with the student's masks would say the same: 0
        compared = 0
        for linear in model.linears():
            (name,) = linear.map.hf if len(linear.map.hf) == 1 else ("",)
            if name.removesuffix(".weight").endswith(ALONE):
                gradient = expected.gradient_of_logits(name, linear.module.mask_logits)
                assert (linear.module.mask_logits.grad - gradient).abs().max() < 1e-4 * gradient.abs().max(), name
                compared += 1
        assert compared == 4


def test_what_the_teacher_needs_is_put_back(root: Path) -> None:
    """Masks, training mode and the student's way of adding gradients up."""
    tokens = torch.randint(257, (1, 17), generator=torch.Generator().manual_seed(0))
    with backend.running(backend.Layout()):
        model, draw = student(root)
        (chunk,) = model.chunks
        chunk.config.no_sync_func = entered = pytest.fail  # nothing may be said of micro-batches while it reads
        RecoveryLoss(model, WEIGHTING, model, 1, draw).forward(chunk, tokens)
        assert not draw.off and chunk.training and chunk.post_process and chunk.config.no_sync_func is entered


@pytest.mark.parametrize("windows", [1, 2])
def test_a_frozen_output_layer_multiplies_all_tokens_at_once(root: Path, windows: int) -> None:
    tokens = torch.randint(257, (windows, 17), generator=torch.Generator().manual_seed(0))
    with backend.running(backend.Layout()):
        model, draw = student(root)
        output, loss_of = RecoveryLoss(model, WEIGHTING, model, 1, draw).forward(model.chunks[0], tokens)
        with torch.profiler.profile(record_shapes=True) as profiler:
            loss_of(output)[0].backward()
    products = [event for event in profiler.events() if event.name in ("aten::mm", "aten::bmm")]
    with_vocabulary = [event for event in products if any(257 in shape for shape in event.input_shapes)]
    assert with_vocabulary and {event.name for event in with_vocabulary} == {"aten::mm"}


def test_the_model_itself_teaches_what_its_copy_does(root: Path) -> None:
    """Bit for bit, in losses and in what is learned."""
    own, other = root / "by_dense", root / "by_copy"
    for key in ("loss", "lm_loss", "distillation_loss", "hidden_loss", "grad_norm"):
        assert curve(own, key) == curve(other, key) and len(curve(own, key)) == STEPS
    parts = [curve(own, key) for key in ("lm_loss", "distillation_loss", "hidden_loss")]
    assert curve(own) == pytest.approx([0.5 * a + b + c for a, b, c in zip(*parts, strict=True)])
    step = f"checkpoints/step_{STEPS:07d}"
    learned = [saved_tensors(run / step) for run in (own, other)]
    for name, tensor in learned[0].items():
        assert torch.equal(tensor, learned[1][name]), name


def test_a_second_model_is_loaded_only_where_it_is_needed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    def counted(path: Path) -> Any:
        opened = open_model(path)

        def load(*args: Any, **more: Any) -> PrunableModel:
            loaded.append(path)
            return opened.load(*args, **more)

        return replace(opened, load=load)

    for module in ("jobs.prune", "decision.pruned"):
        monkeypatch.setattr(f"megatron_prune.{module}.open_model", counted)
    teacher = ["--teacher", str(root / "dense"), "--train-iters", "1"]
    cases = {"own": [], "wide": ["--teacher-dtype", "bfloat16"], "trained": ["--train-weights"]}
    counts = {}
    for name, more in cases.items():
        loaded.clear()
        assert main(learn(root, f"count_{name}", *teacher, *more)) == 0
        counts[name] = len(loaded)
    assert counts == {"own": 1, "wide": 2, "trained": 2}


def test_a_resumed_run_is_bit_identical(root: Path) -> None:
    run = reopened(root / "by_dense", root / "again", SAVED)
    assert main(learn(root, "again", "--teacher", str(root / "dense"), *TAUGHT, "--resume")) == 0
    assert curve(run) == curve(root / "by_dense")
    found, expected = (Masks.load(each / "decision") for each in (run, root / "by_dense"))
    assert all(torch.equal(found.get(name), expected.get(name)) for name in expected.names())


@pytest.mark.parametrize(
    "given", [(), ("--teacher", "copy", *TAUGHT), ("--teacher", "dense", *TAUGHT[:-2], "--hidden-weight", "2")]
)
def test_a_run_goes_on_with_its_own_losses_alone(
    root: Path, given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / f"changed_{len(given)}{given[1:2]}"
    reopened(root / "by_dense", run, SAVED)
    words = [str(root / word) if word in ("copy", "dense") else word for word in given]
    assert main(learn(root, run.name, *words, "--resume")) == 2
    assert "has losses {'teacher': " in capsys.readouterr().err


def test_the_decision_says_what_was_lowered(root: Path) -> None:
    notes = Masks.load(root / "by_dense" / "decision").info.notes
    assert notes["losses"]["teacher"] == str((root / "dense").resolve()) and notes["losses"]["lm_weight"] == 0.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--distillation-weight", "1"), "given without --teacher"),
        (("--teacher", "dense", "--hidden-weight", "1", "--recompute"), "--hidden-weight: not with --recompute"),
        (("--teacher", "other"), "its vocabulary is not that of --input"),
        (("--teacher", "dense", "--hidden-loss", "mse"), "--hidden-loss was given and has no effect"),
    ],
)
def test_mistakes_are_one_line(
    root: Path, given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (root / "other").exists():
        byte_tokenizer(tiny_llama(root / "other", vocab_size=260))
    words = [str(root / word) if word in ("dense", "other") else word for word in given]
    assert main(learn(root, "mistake", *words)) == 2
    assert said in capsys.readouterr().err and not (root / "mistake").exists()


def test_methods_that_learn_nothing_take_no_teacher(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--input", str(root / "dense"), "--output", str(root / "mistake"), "--target", "2:4"]
    assert main(["prune", "--method", "magnitude", *places, "--teacher", str(root / "dense")]) == 2
    assert "--teacher was given and method magnitude has no use for it" in capsys.readouterr().err
