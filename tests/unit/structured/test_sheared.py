"""Hard-concrete masks, their constraint, the masked model and the cut one, and what bad requests are told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.command_line import parse
from megatron_prune.config import PruneConfig, TrainConfig
from megatron_prune.data.training import first_windows, held_out_windows
from megatron_prune.decision.pruned import cut
from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import Shape, parse_any_target
from megatron_prune.errors import UserError
from megatron_prune.log import MetricsLog, read_metrics
from megatron_prune.methods.base import get_method, methods
from megatron_prune.methods.fit import check_target
from megatron_prune.model.cost import parameters
from megatron_prune.model.families import family_of
from megatron_prune.model.forward import logits
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.training import hard_concrete
from megatron_prune.training.gates import Gates, fold
from megatron_prune.training.loop import Trainer
from megatron_prune.training.shearing import ShearingRunner
from megatron_prune.training.stopping import Stopped, StopRequest
from megatron_prune.training.unit_masks import UnitMasks, axes, units_of
from tests.models import byte_tokenizer, tiny_blocks, tiny_model, words

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "sheared_llama"
TARGET = Shape(num_layers=3, hidden_size=24, ffn_hidden_size=40, num_attention_heads=2, num_query_groups=2)
SIZES = dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


def load(path: Path, family: str = "llama", **sizes: Any) -> PrunableModel:
    given = {"n_layer": 4, "n_head": 8} if family == "gpt2" else SIZES
    return open_model(tiny_model(path, family, **(given | sizes))).load(backend.Layout())


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 1.2, 4.0])
def test_masks_are_distributed_as_stated(log_alpha: float) -> None:
    """The closed form of P(z > 0) against the integral over u; z rises with u, through the median at 1/2."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    z = hard_concrete.sample(torch.full_like(u, log_alpha), u)
    assert float(z.min()) == 0 and float(z.max()) == 1 and bool((z.diff() >= 0).all())
    scalar = torch.tensor(log_alpha, dtype=torch.float64)
    assert float((z > 0).double().mean()) == pytest.approx(float(hard_concrete.open_probability(scalar)), abs=1e-5)
    assert float(z.median()) == pytest.approx(float(hard_concrete.median(scalar)), abs=1e-4)


def test_expectations_are_those_of_the_paper() -> None:
    """Louizos et al. 2018, section 2.2: u -> s -> stretched to (-0.1, 1.1) -> clamped, at a temperature of 2/3, and the
    share of the closed ones along the last axis, by counting over a fine grid of u.
    """
    log_alpha = torch.tensor([[-2.0, 0.3, 4.5], [1.0, -0.7, 0.0]], dtype=torch.float64)
    u = ((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)[:, None, None]
    s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + log_alpha) / (2 / 3)))
    z = (s * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(hard_concrete.sample(log_alpha.expand_as(z), u.expand_as(z)), z)
    torch.testing.assert_close(hard_concrete.median(log_alpha), z.median(0).values, rtol=0, atol=1e-4)
    opened = (z > 0).double().mean(0)
    torch.testing.assert_close(hard_concrete.open_probability(log_alpha), opened, rtol=0, atol=1e-5)
    torch.testing.assert_close(hard_concrete.sparsity(log_alpha), 1 - opened.mean(1), rtol=0, atol=1e-5)


def test_uniform_numbers_are_a_function_of_key_and_place() -> None:
    found = hard_concrete.uniform((50, 401), 1, 2, 3)
    assert torch.equal(found, hard_concrete.uniform((50, 401), 1, 2, 3))
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01) and float(found.var()) == pytest.approx(1 / 12, abs=0.01)
    assert 0 < float(found.min()) < float(found.max()) < 1
    assert not any(torch.equal(found, hard_concrete.uniform((50, 401), *key)) for key in [(0, 2, 3), (1, 3, 3), (1, 2)])


def test_the_lagrangian_is_a_mean_over_sets() -> None:
    closed = torch.tensor([0.5, 0.1])
    found = hard_concrete.lagrangian(closed, 0.2, torch.tensor(2.0), torch.tensor(3.0))
    assert float(found) == pytest.approx((2 * 0.3 + 3 * 0.09 - 2 * 0.1 + 3 * 0.01) / 2)


def test_what_is_asked_for_rises_to_the_target() -> None:
    assert [hard_concrete.ramp(step, 10, 0.4) for step in range(6)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert hard_concrete.ramp(0, 10, 0) == 1


def test_axes_of_a_target(tmp_path: Path) -> None:
    config = load(tmp_path).config
    found = axes(config, TARGET)
    assert {kind: (axis.shape, axis.kept) for kind, axis in found.items()} == {
        "layer": ((4,), 3),
        "hidden": ((32,), 24),
        "group": ((4, 4), 2),
        "head": ((4, 4, 2), 1),
        "ffn": ((4, 64), 40),
    }
    assert axes(config, Shape(num_query_groups=2)).keys() == {"group"}
    assert axes(config, Shape(num_attention_heads=4)).keys() == {"head"}
    with pytest.raises(UserError, match="is the shape that the model has"):
        axes(config, Shape(num_layers=4, num_query_groups=4))


def test_the_constraint_reaches_the_target_and_useless_units_go(tmp_path: Path) -> None:
    """Opening a mask lowers the loss, but not those of some units of every kind; in every layer they go."""
    config = load(tmp_path).config
    masks = UnitMasks(config, TARGET, 5.0, seed=0)
    rises = {kind: torch.full(axis.shape, -1.0) for kind, axis in masks.axes.items()}
    for kind, axis in masks.axes.items():
        rises[kind][..., : axis.shape[-1] - axis.kept] = 0.0
    for step in range(400):
        drawn = masks.draw(step)
        assert all(float(z.min()) >= 0 and float(z.max()) <= 1 for z in (x.detach() for x in drawn.values()))
        masks.update(step, rises, hard_concrete.ramp(step, 400, 0.2), 0.1)
    report = masks.report()
    for kind, axis in masks.axes.items():
        assert report[f"sparsity/{kind}"] == pytest.approx(axis.sparsity, abs=0.05), kind
    units = units_of(config, masks.decided())
    assert units.layers == (1, 2, 3) and units.hidden == tuple(range(8, 32))
    assert all(block.groups == (2, 3) and block.heads == (5, 7) for block in units.blocks)
    assert all(block.ffn == tuple(range(24, 64)) for block in units.blocks)


def soft_masks(config: Any) -> dict[str, Tensor]:
    """Decided masks of every kind with values between 0 and 1."""
    target = TARGET if config.family != "gpt2" else Shape(num_layers=3, hidden_size=24, ffn_hidden_size=40)
    masks = UnitMasks(config, target, 0.3, seed=1)
    with torch.no_grad():
        for number, log_alpha in enumerate(masks.log_alpha.values()):
            log_alpha += torch.randn(log_alpha.shape, generator=torch.Generator().manual_seed(number))
    return masks.decided()


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("nemotron", {}),
        ("gpt2", {}),
        ("gemma3_text", {}),
        ("gemma3_text", {"tie_word_embeddings": False}),
    ],
)
def test_the_masked_model_is_the_cut_one(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    """With masks on activations, folded into weights, and cut: the same logits, which those of the whole are not."""
    model = load(tmp_path, family, **sizes)
    tokens = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(3))
    whole = logits(model, tokens)
    z = soft_masks(model.config)
    gates = Gates(model)
    assert torch.equal(logits(model, tokens), whole)
    gates.set(z)
    masked = logits(model, tokens)
    gates.remove()
    assert torch.equal(logits(model, tokens), whole)
    assert float((masked - whole).abs().max()) > 0.1
    fold(model, z)
    smaller = cut(model, units_of(model.config, z))
    assert (smaller.config.num_layers, smaller.config.hidden_size, smaller.config.ffn_hidden_size) == (3, 24, 40)
    torch.testing.assert_close(logits(smaller, tokens), masked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["layer", "hidden", "group", "head", "ffn"])
def test_gradients_of_masks_are_slopes_of_the_loss(tmp_path: Path, kind: str) -> None:
    """Against the difference between two losses, over two micro-batches, along a random direction."""
    model = load(tmp_path)
    generator = torch.Generator().manual_seed(0)
    z = {key: torch.rand(axis.shape, generator=generator) / 2 + 0.4 for key, axis in axes(model.config, TARGET).items()}
    direction = torch.randn(z[kind].shape, generator=generator)
    direction /= direction.norm()
    gates = Gates(model)
    slopes: list[float] = []

    def measure() -> None:
        slopes.append(float((gates.gradients()[kind] * direction).sum()))

    trainer = Trainer(model, training(lr=1e-12, min_lr=0.0), Cycle(), before_update=measure)

    def loss(step: float) -> float:
        gates.set({key: (x + step * direction if key == kind else x.clone()).requires_grad_() for key, x in z.items()})
        return trainer.step(0).loss

    loss(0.0)
    assert slopes[0] == pytest.approx((loss(0.01) - loss(-0.01)) / 0.02, rel=0.02, abs=2e-3)
    assert abs(slopes[0]) > 0.01


def test_norms_of_another_package_are_replaced(tmp_path: Path) -> None:
    """By ones that can leave channels out, with the same parameters."""
    model = load(tmp_path)
    tokens = torch.randint(128, (1, 24))
    whole = logits(model, tokens)
    layer = model.chunks[0].decoder.layers[1]
    other = torch.nn.RMSNorm(32, model.config.layernorm_epsilon)
    other.weight = layer.pre_mlp_layernorm.weight
    layer.pre_mlp_layernorm = other
    gates = Gates(model)
    assert layer.pre_mlp_layernorm is not other and layer.pre_mlp_layernorm.weight is other.weight
    assert len(gates.norms) == 9
    torch.testing.assert_close(logits(model, tokens), whole)


class Cycle:
    """Windows that count modulo 16 from random starts: quickly learned."""

    def sample(self, index: int) -> Tensor:
        return (torch.arange(17) + index * 7) % 16


def training(**options: Any) -> Training:
    given = dict(seq_length=16, global_batch_size=4, micro_batch_size=2, train_iters=60, lr=1e-2, min_lr=1e-3)
    return Training(**(given | options))  # type: ignore[arg-type]


USELESS = range(0, 64, 2)


def taught(path: Path) -> PrunableModel:
    """A model that can count, after which half of each MLP's neurons write nothing any more."""
    model = load(path, num_hidden_layers=2)
    t = training()
    trainer = Trainer(model, t, Cycle())
    for step in range(t.train_iters):
        loss = trainer.step(step).loss
    assert loss < 0.5
    for layer in range(2):
        map = model.by_name[f"decoder.layers.{layer}.mlp.linear_fc2.weight"]
        whole = model.whole(map)
        model.assign(map, whole.index_fill(1, torch.tensor(USELESS), 0.0))
    return model


def runner(model: PrunableModel, folder: Path, stop: StopRequest | None = None, **options: Any) -> ShearingRunner:
    resume = options.pop("resume", False)
    windows = torch.stack([Cycle().sample(index)[:-1] for index in range(4)])
    log = MetricsLog(folder)
    return ShearingRunner(
        model, training(**options), Cycle(), folder, log=log, eval_windows=windows, resume=resume, stop=stop
    )


def test_neurons_that_do_nothing_go_and_the_loss_stays(tmp_path: Path) -> None:
    """By training, and to exactly the target; what held-out text costs is told of the model that comes out."""
    model = taught(tmp_path / "model")
    method = get_method("sheared_llama", mask_lr=0.2)
    session = runner(model, tmp_path / "run", lr=1e-5, min_lr=1e-6, train_iters=200)
    units = method.decide(SimpleNamespace(shear=lambda: session), Shape(ffn_hidden_size=32))  # type: ignore[arg-type]
    assert all(len(block.ffn) == 32 for block in units.blocks)
    assert sum(len(set(block.ffn) & set(USELESS)) for block in units.blocks) <= 16  # of 64; by chance 32, deviation 4
    last = read_metrics(tmp_path / "run")
    held_out = [record["eval_loss"] for record in last if "eval_loss" in record]
    assert held_out[-1] < 1.0
    smaller = cut(model, units)
    windows = torch.stack([Cycle().sample(index)[:-1] for index in range(4)])
    assert Trainer(smaller, training(), Cycle()).evaluate(windows) == pytest.approx(held_out[-1], abs=1e-4)
    trained = [record for record in last if "loss" in record]
    assert trained[-1]["sparsity/ffn"] == pytest.approx(0.5, abs=0.1)
    assert [record["target_sparsity/ffn"] for record in trained[::20]] == pytest.approx([0, 0.25, *[0.5] * 8])


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """Weights, masks, multipliers and their optimizer: bit for bit what a run left alone does."""
    given = dict(train_iters=4, save_interval=2, lr=1e-3, min_lr=1e-4)
    method = get_method("sheared_llama", mask_start=0.5, mask_lr=0.3)

    def go(name: str, stop: StopRequest | None = None, resume: bool = False) -> tuple[Any, PrunableModel]:
        model = load(tmp_path / f"{name}{resume}")
        session = runner(model, tmp_path / f"run_{name}", stop, resume=resume, **given)
        return method.decide(SimpleNamespace(shear=lambda: session), TARGET), model  # type: ignore[arg-type]

    units, model = go("whole")
    with pytest.raises(Stopped):
        go("parts", StopRequest(0))
    again, other = go("parts", resume=True)
    assert units == again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters.values(), other.parameters.values(), strict=True))
    shown = ("step", "loss", "eval_loss", "lagrangian", "sparsity/head", "multiplier_linear/ffn")
    runs = [
        [{key: x.get(key) for key in shown} for x in read_metrics(tmp_path / f"run_{n}")] for n in ("whole", "parts")
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 6
    assert math.isfinite(runs[0][-1]["eval_loss"])


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_road(tmp_path: Path, tied: bool) -> None:
    """Pruned, trimmed and exported, transformers finds the held-out loss that the run's last line says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    byte_tokenizer(tiny_model(tmp_path / "hf", "llama", **SIZES, vocab_size=257, tie_word_embeddings=tied))
    text = words(tmp_path / "words.jsonl", documents=8)
    read = Training(data=(text,), eval_data=(text,), eval_windows=3, seq_length=32)
    flags = [f"--data={text}", f"--eval-data={text}", "--eval-windows=3", "--seq-length=32"]
    flags += ["--train-iters=6", "--global-batch-size=1", "--lr=1e-3", "--mask-start=0.5", "--mask-lr=0.5"]
    run, trimmed, out = (str(tmp_path / name) for name in ("run", "trimmed", "out"))
    places = ["--input", str(tmp_path / "hf"), "--output", run]
    assert main(["prune", "--method", "sheared_llama", "--target", str(TARGET), *places, *flags]) == 0
    assert main(["trim", "--input", run, "--output", trimmed]) == 0
    assert main(["export", "--input", trimmed, "--output", out]) == 0
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.num_hidden_layers == 3 and model.config.tie_word_embeddings == tied
    windows = held_out_windows(read, AutoTokenizer.from_pretrained(out), 257)
    tokens = first_windows(windows, 3)
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    (*_, last) = (record["eval_loss"] for record in read_metrics(tmp_path / "run") if "eval_loss" in record)
    assert float(loss) == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mask_lr": 0.0}, "mask_lr 0.0 was given; allowed: above 0"),
        ({"mask_start": float("nan")}, "mask_start nan was given; allowed: -10 to 10"),
        ({"target_warmup": 1.5}, "target_warmup 1.5 was given; allowed: 0 to 1"),
        ({"mask_lr": float("inf")}, "mask_lr inf was given; allowed: above 0"),
        ({"mask_start": -10.5}, "mask_start -10.5 was given; allowed: -10 to 10"),
        ({"mask_start": 10.5}, "mask_start 10.5 was given; allowed: -10 to 10"),
        ({"target_warmup": -0.1}, "target_warmup -0.1 was given; allowed: 0 to 1"),
        ({"refit": "none"}, "leave them out"),
        ({"norm_gain": False}, "leave them out"),
    ],
)
def test_bad_requests(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        get_method("sheared_llama", **options)


def test_options_may_be_as_large_and_small_as_they_are_said_to_be() -> None:
    for start, warmup in ((-10.0, 0.0), (10.0, 1.0)):
        made = get_method("sheared_llama", mask_start=start, target_warmup=warmup, mask_lr=1e-9)
        assert (made.mask_start, made.target_warmup) == (start, warmup)  # type: ignore[attr-defined]
    (info,) = [info for info in methods() if info.name == "sheared_llama"]
    shown = {knob.name: knob.default for knob in info.hyperparameters}
    assert (shown["mask_start"], shown["mask_lr"], shown["target_warmup"]) == (5.0, 1.0, 0.2)  # the paper's


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--target", "num_layers=4", "--data", "x.txt"], "target num_layers=4 is the shape that the model has"),
        (["--target", "num_layers=3"], "method sheared_llama learns from text and none was given"),
        (["--target", "parameters=1000", "--data", "x.txt"], "cannot prune to parameters=1000"),
        (
            ["--target", "num_layers=3", "--data", "x.txt", "--calibration", "x.txt"],
            "--calibration was given and method",
        ),
        (["--target", "num_layers=3", "--data", "x.txt", "--prior", "wanda"], "--prior was given and method"),
    ],
)
def test_what_cannot_begin_leaves_nothing(
    tmp_path: Path, given: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer(tiny_model(tmp_path / "hf", "llama", **SIZES, vocab_size=257))
    places = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]
    assert main(["prune", "--method", "sheared_llama", *places, *given]) == 2
    assert why in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_layers_must_be_equal(tmp_path: Path) -> None:
    config = open_model(tiny_blocks(tmp_path)).config
    with pytest.raises(UserError, match="layers of this model differ in size"):
        axes(config, Shape(num_layers=2))


@pytest.mark.parametrize(("name", "millions"), [("2.7b", 2700), ("1.3b", 1345), ("370m", 374)])
def test_recipes_make_the_published_models(tmp_path: Path, name: str, millions: int) -> None:
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    whole = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, **sizes}
    config = family_of(whole).from_hf(whole)
    file = EXAMPLE / f"prune_{name}.yaml"
    words = ["--config", str(file), "--input", str(tmp_path), "--output", str(tmp_path / "run")]
    target = parse_any_target(parse(PruneConfig, words, "prune").target)
    assert isinstance(target, Shape)
    check_target(config, target)
    assert all(axis.kept < axis.shape[-1] for axis in axes(config, target).values())
    smaller = dataclasses.replace(config, **target.given())
    assert parameters(smaller) // 10**6 == pytest.approx(millions, abs=2)
    parse(TrainConfig, ["--config", str(EXAMPLE / "continue.yaml"), *words[2:]], "train")
