"""Weights that train beside their masks: each kind by its own settings, and what is removed fades."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.target import NM
from megatron_prune.kernels.gumbel import decode
from megatron_prune.log import MetricsLog
from megatron_prune.model.checkpoint import load_model
from megatron_prune.option_groups import Training
from megatron_prune.training.joint import MaskedDecay, WeightTraining
from megatron_prune.training.learning import LearningRunner
from megatron_prune.training.loop import Trainer
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve, reopened, saved_tensors

STEPS, SAVED = 6, 3
JOINT = (
    *("--train-weights", "--train-norms", "--weight-lr-multiplier", "0.5", "--weight-eps", "1e-8"),
    *("--weight-clip", "0.7", "--weight-gradient", "dense", "--masked-decay", "100", "--decay-warmup", "0.5"),
)
SETTINGS = WeightTraining(lr_factor=0.5, eps=1e-3, clip=0.05, decay=40.0, decay_warmup=0.5, norms=True)
LR, EPS, CLIP, MULTIPLIER = 1e-2, 1e-5, 0.02, 2.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both types, and a joint run of each."""
    root = tmp_path_factory.mktemp("joint")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    for dtype in ("float32", "bfloat16"):
        assert main(["import", "--input", str(root / "hf"), "--output", str(root / dtype), "--dtype", dtype]) == 0
        assert main(learn(root, dtype, f"joint_{dtype}", *JOINT, "--teacher", str(root / dtype))) == 0
    return root


def learn(root: Path, source: str, output: str, *more: str) -> list[str]:
    """Learning on a few words."""
    places = ["--input", str(root / source), "--output", str(root / output), "--data", str(root / "words.jsonl")]
    sizes = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", str(STEPS), "--lr", "1e-3"]
    choice = ["--method", "maskllm", "--target", "2:4", "--prior", "magnitude", "--temperature-end", "2"]
    return ["prune", *choice, *places, *sizes, "--save-interval", str(SAVED), "--keep-checkpoints", "9", *more]


class Words:
    """Seeded random windows."""

    def sample(self, index: int) -> Tensor:
        """`[17]` token ids."""
        return torch.randint(257, (17,), generator=torch.Generator().manual_seed(index))


class Steps:
    """A few steps of the trainer beside an Adam of torch's that gets the same gradients and other settings by hand."""

    def __init__(self, root: Path, folder: Path, weights: WeightTraining) -> None:
        self.training = Training(
            seq_length=16, global_batch_size=2, train_iters=4, lr=LR, min_lr=LR, lr_decay_style="constant"
        )
        self.training = Training(**{**vars(self.training), "clip_grad": CLIP, "adam_eps": EPS})
        model = load_model(root / "float32", backend.Layout())
        self.runner = LearningRunner(model, self.training, Words(), folder, writer=lambda: None, log=MetricsLog(folder))
        self.draw = self.runner.learn_masks(NM(2, 4), weights)
        for linear in model.linears():
            with torch.no_grad():
                linear.module.mask_logits.normal_(generator=torch.Generator().manual_seed(linear.tensor_id))
        self.step, self.share = 0, 0.0
        self.trainer = Trainer(
            model, self.training, Words(), {"*mask_logits": MULTIPLIER}, before_update=self.look, weights=weights
        )
        self.decay = MaskedDecay(model, self.trainer.optimizer)
        self.linears = model.linears()
        trained = dict(model.chunks[0].named_parameters())
        self.trained = {name: parameter for name, parameter in trained.items() if parameter.requires_grad}
        self.expected = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.adams = {
            kind: torch.optim.Adam(
                [each for name, each in self.expected.items() if name.endswith("mask_logits") == (kind == "logits")],
                lr=lr, eps=eps, betas=(0.9, 0.95),
            )
            for kind, lr, eps in (("logits", LR * MULTIPLIER, EPS), ("weights", LR * weights.lr_factor, weights.eps))
        }  # fmt: skip

    def look(self) -> None:
        """What the trainer does before an update; the same by hand."""
        self.decay.apply(self.share)
        for linear in self.linears:
            name = next(name for name, parameter in self.trained.items() if parameter is linear.module.weight)
            mask = decode(self.expected[name.replace("weight", "mask_logits")], 2, 4)
            self.expected[name] *= torch.where(mask, 1.0, 1.0 - self.share)
        for name, parameter in self.trained.items():
            self.expected[name].grad = parameter.main_grad.clone()  # type: ignore[attr-defined]

    def take(self, share: float, limits: tuple[float, ...]) -> float:
        """One step; by hand gradients are clipped to `limits`: of logits and of weights, or of all. The norm told."""
        self.share = share
        norm = self.trainer.step(self.step).grad_norm
        self.step += 1
        groups = [[each for group in adam.param_groups for each in group["params"]] for adam in self.adams.values()]
        for parameters, limit in zip([sum(groups, [])] if len(limits) == 1 else groups, limits, strict=True):
            torch.nn.utils.clip_grad_norm_(parameters, limit)
        for adam in self.adams.values():
            adam.step()
        return norm

    def differences(self) -> Iterator[tuple[str, float]]:
        """Of each parameter: the largest, against how far it has come."""
        for name, parameter in self.trained.items():
            yield name, float((parameter.detach() - self.expected[name]).abs().max())


def test_steps_are_those_of_adam_by_hand(root: Path, tmp_path: Path) -> None:
    with backend.running(backend.Layout()):
        steps = Steps(root, tmp_path, SETTINGS)
        norms = [steps.take(share, (CLIP, SETTINGS.clip)) for share in (0.0, 0.1, 0.4)]
        assert min(norms) > SETTINGS.clip > CLIP, "both limits are in force"
        assert {name.rsplit(".", 1)[1] for name in steps.trained} == {"weight", "mask_logits"}
        assert sum("layernorm" in name for name in steps.trained) == 5
        for name, difference in steps.differences():
            assert difference < 2e-6, name


@pytest.mark.parametrize(
    ("change", "limits"),
    [({"clip": 0.0}, (CLIP,)), ({"clip": 0.0}, (CLIP, SETTINGS.clip)), ({"eps": 0.0}, (CLIP, SETTINGS.clip))],
)
def test_other_settings_are_other_steps(
    root: Path, tmp_path: Path, change: dict[str, Any], limits: tuple[float, ...]
) -> None:
    """Clipped together, as by hand; and two negative controls: by hand the limits, or the epsilon, are others."""
    with backend.running(backend.Layout()):
        weights = WeightTraining(**{**vars(SETTINGS), **change})
        steps = Steps(root, tmp_path, weights)
        if "eps" in change:
            for group in steps.adams["weights"].param_groups:
                group["eps"] = SETTINGS.eps
        steps.take(0.0, limits)
        largest = max(difference for name, difference in steps.differences() if name.endswith(".weight"))
        assert largest < 2e-6 if len(limits) == 1 else largest > 1e-5


def test_without_an_epsilon_of_their_own_weights_have_that_of_all(root: Path, tmp_path: Path) -> None:
    with backend.running(backend.Layout()):
        steps = Steps(root, tmp_path, WeightTraining())
        found = {group["eps"] for group in steps.trainer.optimizer.param_groups}
        assert found == {EPS}
        assert steps.trainer.learning_rates() == pytest.approx({"mask_logits": LR * MULTIPLIER, "weights": LR})


def test_the_decay_rises_to_its_size() -> None:
    weights = WeightTraining(decay=20.0, decay_warmup=0.5)
    shares = [weights.decay_at(step, 8, 1e-2) for step in range(8)]
    assert shares == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2])
    assert WeightTraining(decay=20.0, decay_warmup=0.0).decay_at(0, 8, 1e-2) == pytest.approx(0.2)


def test_what_is_removed_fades_and_the_rest_does_not(root: Path) -> None:
    """Under masks that stand still the share of removed weights falls with the decay, and hardly without."""
    still = ("--train-weights", "--lr-multiplier", "1e-3")
    more = ("--masked-decay", "400", "--decay-warmup", "0")
    assert main(learn(root, "float32", "faded", *still, *more)) == 0
    assert main(learn(root, "float32", "kept", *still)) == 0
    faded, kept = (curve(root / name, "removed_squares_fraction") for name in ("faded", "kept"))
    assert faded[-1] < 0.1 * faded[0] and kept[-1] > 0.7 * kept[0] and len(faded) == STEPS
    assert curve(root / "faded", "masked_decay")[0] == pytest.approx(0.4)
    assert curve(root / "faded", "learning_rate/weights")[0] == pytest.approx(1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_bit_identical(root: Path, dtype: str) -> None:
    run = reopened(root / f"joint_{dtype}", root / f"again_{dtype}", SAVED)
    assert main(learn(root, dtype, run.name, *JOINT, "--teacher", str(root / dtype), "--resume")) == 0
    whole = root / f"joint_{dtype}"
    assert curve(run) == curve(whole) and curve(run, "removed_squares_fraction")
    step = f"checkpoints/step_{STEPS:07d}"
    found, expected = saved_tensors(run / step), saved_tensors(whole / step)
    assert found.keys() == expected.keys() and any("layernorm" in name for name in found)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_small_shares_add_up_in_bf16(root: Path) -> None:
    """Masters fade, so that shares which a bfloat16 weight would round away do not get lost."""
    state = saved_tensors(root / "joint_bfloat16" / "checkpoints" / f"step_{STEPS:07d}")
    weight, master = (state[f"{kind}decoder.layers.mlp.linear_fc2.weight"] for kind in ("", "optimizer.master."))
    assert weight.dtype == torch.bfloat16 and torch.equal(master.bfloat16(), weight)
    assert not torch.equal(master, weight.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_result_ends_in_exact_zeros(root: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Trimmed, verified and exported; the teacher was what the run began with, in a copy."""
    run = root / f"joint_{dtype}"
    assert main(["trim", "--input", str(run), "--output", str(root / f"small_{dtype}")]) == 0
    assert main(["verify", "--input", str(root / f"small_{dtype}")]) == 0
    assert "pattern 2:4: holds" in capsys.readouterr().out
    assert main(["export", "--input", str(root / f"small_{dtype}"), "--output", str(root / f"hf_{dtype}")]) == 0
    from safetensors.torch import load_file

    found, before = (load_file(root / name / "model.safetensors") for name in (f"hf_{dtype}", "hf"))
    masks = Masks.load(run / "decision")
    for name in masks.names():
        mask = masks.get(name)
        assert torch.equal(found[name] == 0, ~mask) and not torch.signbit(found[name][~mask]).any(), name
        assert not torch.equal(found[name].float()[mask], before[name].to(found[name].dtype).float()[mask]), name
    norms = [name for name in found if "norm" in name]
    assert len(norms) == 5 and all(not torch.equal(found[name].float(), before[name]) for name in norms)
    assert all(math.isfinite(loss) for loss in curve(run, "distillation_loss"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--weight-eps", "1e-8"), "--weight-eps was given and has no effect without --train-weights"),
        (("--train-weights", "--decay-warmup", "0.1"), "has no effect without --masked-decay"),
        (("--train-weights", "--masked-decay", "-1"), "masked_decay -1.0 was given; allowed: 0 or more"),
        (("--train-weights", "--masked-decay", "1", "--decay-warmup", "2"), "decay_warmup 2.0 was given"),
        (("--train-weights", "--weight-gradient", "none"), "'none' was given; allowed: masked, dense"),
        (("--train-weights", "--weight-lr-multiplier", "0"), "weight_lr_multiplier 0.0 was given; allowed: above 0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    root: Path, given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(learn(root, "float32", "mistake", *given)) == 2
    assert said in capsys.readouterr().err and not (root / "mistake").exists()
