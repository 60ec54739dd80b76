"""Masks that learn while some weights stay dense: gradients, which weights, the road of a run, and what it brings."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune import workbench
from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import NM, parse_target
from megatron_prune.model.context import positions
from megatron_prune.model.families import get_family
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import LocalLinear, PrunableModel
from megatron_prune.training.learning import LearningRunner
from tests.models import c4_documents, small_models, stories260k
from tests.runs import curve, four_steps, reopened, saved_tensors
from tests.unit.test_gpu_path import model

VALUES_AND_MORE = "v_proj+up_proj+layers.0.mlp+layers.1.self_attn.o_proj"
"""A part of the queries, keys and values; a part of a gated MLP; all of a linear."""
TARGET = f"2:4,dense={VALUES_AND_MORE}"
SAVED = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, text, and one run of four steps."""
    root = tmp_path_factory.mktemp("learned_dense")
    small_models(root)
    assert main(learn(root, root / "run", "--prior", "magnitude")) == 0
    return root


learn = functools.partial(four_steps, target=TARGET, save_interval=SAVED)


def calibrated(root: Path) -> list[str]:
    """A prior that looks at text."""
    text = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", "4", "--calibration-seq-length", "16"]
    return ["--prior", "sparsegpt", *text]


def left_dense(masks: Masks) -> set[str]:
    """Names of the weights of which everything is kept; every other one is 2:4."""
    found = {name for name in masks.names() if masks.get(name).all()}
    as_rows = get_family(masks.info.family).as_rows  # GPT-2 stores its weights transposed
    for name in set(masks.names()) - found:
        assert bool((as_rows(masks.get(name)).unflatten(1, (-1, 4)).sum(2) == 2).all()), name
    return found


# ---- gradients -----------------------------------------------------------------------------------------


def learning(per_step: bool = False, regularization: float = 0.0) -> PrunableModel:
    """A small LLaMA with random logits, and weights that train."""
    network = model()
    draw = MaskDraw(2, 4, seed=1, scale=3.0, temperature=0.8, regularization=regularization, step=5, per_step=per_step)
    network.learn_masks(draw, NM(2, 4, tuple(VALUES_AND_MORE.split("+"))).leaves)
    for linear in network.masked_linears():
        with torch.no_grad():
            linear.module.mask_logits.normal_(generator=torch.Generator().manual_seed(linear.tensor_id))
    network.chunks[0].train()
    return network


def loss(network: PrunableModel) -> Tensor:
    tokens = torch.arange(24).view(2, 12)
    return network.chunks[0](tokens, positions(12).expand(2, -1), None).double().square().mean()


def gradients(network: PrunableModel) -> dict[str, Tensor]:
    """By the names of linears and, of mask logits, theirs."""
    loss(network).backward()
    found = {}
    for linear in network.linears():
        linear.module.finish_step()
        parameters = {"": linear.module.weight}
        if linear.module.mask_draw is not None:
            parameters[" logits"] = linear.module.mask_logits
        found |= {linear.name + end: parameter.grad for end, parameter in parameters.items()}
    return found


@pytest.mark.parametrize("per_step", [False, True])
def test_gradients_are_finite_differences(per_step: bool) -> None:
    """Along themselves, of the logits and of the weights of each linear."""
    with backend.running(backend.Layout()):
        network = learning(per_step)
        found = gradients(network)
        for linear in network.linears():
            for end, parameter in (("", "weight"), (" logits", "mask_logits")):
                gradient = found.get(linear.name + end)
                if gradient is None:
                    continue
                tensor, norm = getattr(linear.module, parameter), gradient.norm()
                step, values = 2e-2 * gradient / norm, []
                with torch.no_grad():
                    for nudge in (step, -2 * step):
                        tensor += nudge
                        linear.module.shared = None
                        values.append(float(loss(network)))
                    tensor += step
                assert (values[0] - values[1]) / 4e-2 == pytest.approx(float(norm), rel=0.02), linear.name + end


def rows_of(linear: LocalLinear, target: NM) -> Tensor:
    """Which rows of an unsharded linear stay dense, by where LLaMA's matrices lie in Megatron's."""
    names, count = linear.map.hf, linear.map.shape[0]
    if len(names) == 3:  # for each of 2 groups the queries of 2 heads, then a key, then a value
        kinds = [0, 0, 1, 2] * 2
        return torch.tensor([target.leaves(names[kind]) for kind in kinds]).repeat_interleave(count // len(kinds))
    return torch.tensor([target.leaves(name) for name in names]).repeat_interleave(count // len(names))


@pytest.mark.parametrize("per_step", [False, True])
def test_nothing_pulls_at_the_logits_of_rows_that_stay_dense(per_step: bool) -> None:
    """Nor does the regularisation of what is masked."""
    target = NM(2, 4, tuple(VALUES_AND_MORE.split("+")))
    with backend.running(backend.Layout()):
        network = learning(per_step, 1e-3)
        found, kinds = gradients(network), set()
        for linear in network.linears():
            rows, logits = rows_of(linear, target), found.get(f"{linear.name} logits")
            kinds.add((bool(rows.any()), bool(rows.all())))
            assert (logits is None) == bool(rows.all())
            if logits is not None:
                moved = logits.flatten(1).count_nonzero(1) > 0
                assert torch.equal(moved, ~rows), linear.name
            mask = linear.module.decided_mask()
            assert bool(mask[rows].all()) and torch.equal(
                mask.float().mean(1)[~rows], torch.full((int((~rows).sum()),), 0.5)
            )
    assert kinds == {(False, False), (True, False), (True, True)}


# ---- which weights -------------------------------------------------------------------------------------


def test_named_weights_stay_dense(root: Path) -> None:
    masks, prior = (Masks.load(root / "run" / folder) for folder in ("decision", "prior"))
    target = NM(2, 4, tuple(VALUES_AND_MORE.split("+")))
    assert left_dense(masks) == {name for name in masks.names() if target.leaves(name)} == left_dense(prior)
    assert masks.info.target == TARGET
    moved = curve(root / "run", "differs_from_start_fraction")[-1]
    groups = [
        (masks.get(name) != prior.get(name)).unflatten(1, (-1, 4)).any(2)
        for name in masks.names()
        if not target.leaves(name)
    ]
    assert 0 < moved == pytest.approx(float(torch.cat([each.flatten() for each in groups]).float().mean()), abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_share_is_chosen_as_the_prior_would_choose_it(root: Path, tmp_path: Path, family: str) -> None:
    """By the method in one shot that makes the prior, or by a run of it."""
    share = "2:4,dense=40%"
    assert main(learn(root, tmp_path / "made", *calibrated(root), family=family, target=share)) == 0
    given = ["--method", "sparsegpt", "--target", share, *calibrated(root)[2:], "--no-update-weights"]
    assert main(["prune", str(root / family), str(tmp_path / "one_shot"), *given]) == 0
    prior = ["--prior", str(tmp_path / "one_shot")]
    assert main(learn(root, tmp_path / "given", *prior, family=family, target=share)) == 0
    found = {name: Masks.load(tmp_path / name / "decision") for name in ("made", "one_shot", "given")}
    chosen = left_dense(found["one_shot"])
    assert 0 < len(chosen) < len(found["one_shot"].names())
    for name in ("made", "given"):
        assert left_dense(found[name]) == chosen and found[name].target == found["one_shot"].target
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["asked"] == share and record["target"] == str(found[name].target)
    assert all(torch.equal(found["made"].get(name), found["given"].get(name)) for name in found["made"].names())


MISTAKES = {
    "a share of other logits": ("2:4,dense=5%", ["--initial-logits", "ROOT/run"], "give at least as much"),
    "no prior": ("2:4,dense=40%", [], "a method that learns does not choose the weights that stay dense; give --prior"),
    "a prior that looks at no text": (
        "2:4,dense=40%",
        ["--prior", "magnitude"],
        "a one-shot method that looks at text",
    ),
    "a run without any": ("2:4,dense=40%", ["--prior", "ROOT/plain"], "or with a run that leaves weights dense"),
    "a run with more": ("2:4,dense=5%", ["--prior", "ROOT/run"], "of the weights dense; give at least as much"),
    "tiles, too": ("2:4@0.5,tile=8x8,dense=v_proj", [], "tiles are learned of all linears; leave dense= or @0.5 out"),
    "other logits": (
        "2:4,dense=v_proj",
        ["--initial-logits", "ROOT/run"],
        "the target is 2:4,dense=v_proj: give a run of",
    ),
    "fewer logits": ("2:4", ["--initial-logits", "ROOT/run"], "the target is 2:4: give a run of 2:4"),
    "more logits": (TARGET, ["--initial-logits", "ROOT/plain"], "has learned 2:4 and the target is"),
}


@pytest.fixture(scope="module")
def plain(root: Path) -> Path:
    """A run that leaves nothing dense."""
    assert main(learn(root, root / "plain", "--prior", "magnitude", target="2:4")) == 0
    return root / "plain"


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(
    root: Path, plain: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target, more, message = MISTAKES[case]
    capsys.readouterr()
    given = [each.replace("ROOT", str(root)) for each in more]
    assert main(learn(root, tmp_path / "x", *given, target=target)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list(tmp_path.glob("x/decision"))


# ---- the road of such a run ----------------------------------------------------------------------------


def test_logits_of_an_earlier_run_are_a_start(root: Path, tmp_path: Path) -> None:
    """In whatever order the weights are named that stay dense, and by a share that holds them."""
    other = "2:4,dense=" + "+".join(reversed(VALUES_AND_MORE.split("+")))
    names = "+".join(left_dense(Masks.load(root / "run" / "decision")))
    targets = {"same": TARGET, "turned": other, "all": f"2:4,dense={names}", "share": "2:4,dense=80%"}
    for name, target in targets.items():
        given = ["--lr", "1e-12", "--min-lr", "0", "--initial-logits", str(root / "run")]
        assert main(learn(root, tmp_path / name, *given, target=target)) == 0
        found, before = (Masks.load(run / "decision") for run in (tmp_path / name, root / "run"))
        assert all(torch.equal(found.get(name), before.get(name)) for name in found.names())


def test_weights_that_are_masked_again_start_from_the_largest(root: Path, tmp_path: Path) -> None:
    """A prior that leaves more dense than the target says nothing of which to keep."""
    run = tmp_path / "run"
    assert main(learn(root, run, "--lr", "1e-12", "--min-lr", "0", "--prior", str(root / "run"), target="2:4")) == 0
    plain = ["prune", str(root / "llama"), str(tmp_path / "plain"), "--method", "magnitude", "--target", "2:4"]
    assert main(plain) == 0
    found, largest, before = (Masks.load(path / "decision") for path in (run, tmp_path / "plain", root / "run"))
    dense = left_dense(before)
    assert dense
    for name in found.names():
        assert torch.equal(found.get(name), (largest if name in dense else before).get(name)), name


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", TARGET),
        ("llama", "2:4,dense=40%"),
        ("qwen3_moe", "2:4,dense=layers.0.mlp.experts.*.up_proj+layers.1.mlp.experts.1.+v_proj"),
    ],
)
def test_a_run_that_was_stopped_goes_on(
    root: Path, tmp_path: Path, family: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; what was chosen to stay dense is not chosen again."""
    whole, prior = tmp_path / "whole", calibrated(root) if "%" in target else ["--prior", "magnitude"]
    command = learn(root, whole, *prior, family=family, target=target)
    assert main(command) == 0
    run = reopened(whole, tmp_path / "again", SAVED)

    def never(*_: object) -> None:
        raise AssertionError("what stays dense was chosen before")

    monkeypatch.setattr(workbench.Workbench, "_with_dense", never)
    assert main([str(run) if word == str(whole) else word for word in command] + ["--resume"]) == 0
    for key in ("loss", "grad_norm", "max_probability", "differs_from_start_fraction"):
        assert curve(run, key) == curve(whole, key) and len(curve(run, key)) == 4
    tensors = [saved_tensors(each / "checkpoints" / "step_0000004") for each in (run, whole)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    masks = [Masks.load(each / "decision") for each in (run, whole)]
    assert masks[0].target == masks[1].target
    assert all(torch.equal(masks[0].get(name), masks[1].get(name)) for name in masks[0].names())


class Killed(BaseException):
    """As if the process had been killed: nothing of ours catches it."""


def test_a_run_that_is_killed_while_it_chooses_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    share = "2:4,dense=40%"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(workbench, "costs", killed)
        main(learn(root, tmp_path / "run", *calibrated(root), target=share))
    assert (tmp_path / "run" / "all_pruned").exists()
    assert main(learn(root, tmp_path / "run", *calibrated(root), "--resume", target=share)) == 0
    assert main(learn(root, tmp_path / "whole", *calibrated(root), target=share)) == 0
    found, expected = (Masks.load(tmp_path / name / "decision") for name in ("run", "whole"))
    assert found.target == expected.target
    assert all(torch.equal(found.get(name), expected.get(name)) for name in expected.names())
    assert not (tmp_path / "run" / "all_pruned").exists()


@pytest.mark.parametrize("made", [False, True], ids=["given", "made"])
def test_what_stays_dense_is_settled_before_the_first_step(
    root: Path, tmp_path: Path, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed there and goes on with another prior keeps it."""
    share, run = "2:4,dense=40%", tmp_path / "run"
    for name in ("k_proj", "v_proj"):
        given = ["--method", "magnitude", "--target", f"2:4,dense={name}"]
        assert main(["prune", str(root / "llama"), str(tmp_path / name), *given]) == 0

    def killed(*_: object, **__: object) -> None:
        raise Killed

    prior = calibrated(root) if made else ["--prior", str(tmp_path / "k_proj")]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LearningRunner, "optimize", killed)
        main(learn(root, run, *prior, target=share))
    about = json.loads((run / "run.json").read_text())
    assert about["asked"] == share and about["state"] == "learning"
    assert made or about["target"] == "2:4,dense=k_proj"
    assert main(learn(root, run, "--prior", str(tmp_path / "v_proj"), "--resume", target=share)) == 0
    found = Masks.load(run / "decision")
    assert str(found.target) == about["target"]
    assert left_dense(found) == {name for name in found.names() if parse_target(about["target"]).leaves(name)}


def test_another_prior_changes_nothing_of_a_run_that_goes_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stays dense was settled when it began."""
    share = "2:4,dense=40%"
    for name in ("k_proj", "v_proj"):
        given = ["--method", "magnitude", "--target", f"2:4,dense={name}"]
        assert main(["prune", str(root / "llama"), str(tmp_path / name), *given]) == 0
    assert main(learn(root, tmp_path / "whole", "--prior", str(tmp_path / "k_proj"), target=share)) == 0
    run = reopened(tmp_path / "whole", tmp_path / "run", SAVED)
    assert json.loads((run / "run.json").read_text())["target"] == "2:4,dense=k_proj"
    capsys.readouterr()
    assert main(learn(root, run, "--prior", str(tmp_path / "k_proj"), "--resume", target="2:4,dense=30%")) == 2
    assert f"is a maskllm {share} run of" in capsys.readouterr().err
    assert main(learn(root, run, "--prior", str(tmp_path / "v_proj"), "--resume", target=share)) == 0
    found, expected = (Masks.load(each / "decision") for each in (run, tmp_path / "whole"))
    assert found.target == expected.target
    assert all(torch.equal(found.get(name), expected.get(name)) for name in expected.names())


def test_weights_train_beside_their_masks(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that stay dense, too; they lose nothing of themselves."""
    run = tmp_path / "run"
    more = ["--train-weights", "--masked-decay", "500", "--weight-gradient", "dense", "--prior", "magnitude"]
    assert main(learn(root, run, *more)) == 0
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    assert main(["verify", str(tmp_path / "hf"), "--target", TARGET]) == 0
    assert "holds" in capsys.readouterr().out
    before, after = (load_file(path / "model.safetensors") for path in (root / "llama", tmp_path / "hf"))
    for name in left_dense(Masks.load(run / "decision")):
        assert not torch.equal(after[name], before[name]), name
        assert float(after[name].norm()) == pytest.approx(float(before[name].norm()), rel=0.1), name


EXPERTS = "2:4,dense=experts.1.+layers.0.mlp.experts.*.down_proj"


@pytest.mark.parametrize(("family", "target"), [("llama", TARGET), ("qwen3_moe", EXPERTS)])
def test_plan_counts_what_learns(root: Path, tmp_path: Path, family: str, target: str) -> None:
    """Logits as a model has them that was given its masks; of a mask for the whole step nothing is kept twice."""
    found = {}
    for name, pattern, more in (("all", "2:4", []), ("some", target, []), ("once", target, ["--mask-draw", "step"])):
        command = ["plan", "--input", str(root / family), "--method", "maskllm", "--target", pattern, *more]
        assert main([*command, "--processes", "1", "--seq-length", "16", "--output", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name).read_text())["stages"][0]
    with backend.running(backend.Layout()):
        network = open_model(root / family).load(backend.Layout())
        network.learn_masks(MaskDraw(2, 4, 0), parse_target(target).leaves)
        masked = [linear.module for linear in network.masked_linears()]
        logits = sum(module.mask_logits.nbytes for module in masked)
        weights = sum(module.weight.nbytes for module in masked)
    assert found["some"]["mask_logits"] == logits < found["all"]["mask_logits"]
    assert found["some"]["optimizer"] == 2 * logits
    assert found["once"]["masked_weights"] == found["once"]["masked_gradients"] == weights


def test_other_plans_refuse(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "--input", str(root / "llama"), "--method", "maskllm"]
    for target, more, message in (
        (TARGET, ["--tpu", "v5p-8"], "MaxText learns masks of all linears: leave dense= out"),
        ("2:4,dense=40%", ["--processes", "1"], "does not say which weights stay dense"),
        ("2:4,dense=40%", ["--gpus", "8", "--gpu-memory", "80"], "does not say which weights stay dense"),
        ("2:4,dense=nosuch", ["--gpus", "8", "--gpu-memory", "80"], "no prunable weight has nosuch in its name"),
    ):
        assert main([*base, "--target", target, *more]) == 2
        assert message in capsys.readouterr().err


# ---- what it is good for -------------------------------------------------------------------------------


def test_learned_masks_beside_dense_weights_are_better_than_those_in_one_shot(tmp_path: Path) -> None:
    """With as much kept, of a trained model; and what stays dense is not what learning would have made up for."""
    model = stories260k(tmp_path / "stories")
    seen, other = c4_documents(tmp_path / "seen.jsonl", 0, 400), c4_documents(tmp_path / "other.jsonl", 400, 500)
    text = ["--data", str(seen), "--eval-data", str(other), "--eval-windows", "32", "--seq-length", "128"]
    prior = ["--prior", "sparsegpt", "--calibration", str(seen), "--calibration-samples", "8"]
    steps = ["--calibration-seq-length", "128", *"--global-batch-size 4 --train-iters 20 --recipe short".split()]
    losses = {}
    for target in ("2:4", "2:4,dense=25%"):
        run = tmp_path / target
        command = ["prune", str(model), str(run), "--method", "maskllm", "--target", target]
        assert main([*command, *text, *prior, *steps]) == 0
        losses[target] = curve(run, "eval_loss")
        kept = [sum(row.kept for row in Masks.load(run / each).summary()) for each in ("prior", "decision")]
        assert kept[0] == kept[1]
    first, last = losses["2:4,dense=25%"]
    assert last < first - 0.3 and last < losses["2:4"][-1] - 0.05
