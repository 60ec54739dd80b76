"""The whole road on a real trained model of 1 MB: Hugging Face in, learned 2:4 Hugging Face out, proof all along."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks
from megatron_prune.log import read_metrics
from tests.models import C4_SAMPLE as C4
from tests.models import c4_sample, stories260k

pytestmark = pytest.mark.slow


def verb(*words: object) -> None:
    """Run a verb that must succeed."""
    assert main([str(word) for word in words]) == 0, words


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage of the road, once."""
    c4_sample()
    root = tmp_path_factory.mktemp("road")
    documents = [json.loads(line)["text"] for line in C4.read_text().splitlines()]
    (root / "held_out.txt").write_text("\n\n".join(documents[1624:1680]))
    stories260k(root / "hf")
    verb("import", "--input", root / "hf", "--output", root / "dense")
    calibration = ["--calibration", C4, "--calibration-documents", 1624, "--calibration-samples", 32]
    prior = ["--method", "sparsegpt", "--no-update-weights", "--target", "2:4", "--calibration-seq-length", 256]
    verb("prune", "--input", root / "dense", "--output", root / "prior", *prior, *calibration)
    learn(root, "learned", "--prior", root / "prior", "--train-iters", 60)
    learn(
        root, "transferred", "--initial-logits", root / "learned", "--train-iters", 4, "--data-documents", "1700:2030"
    )
    for run in ("prior", "learned"):
        verb("trim", "--input", root / run, "--output", root / f"{run}_sparse")
    verb("export", "--input", root / "learned_sparse", "--output", root / "learned_hf")
    verb("export", "--input", root / "learned", "--output", root / "learned.npz", "--format", "mask-npz")
    for model in ("dense", "prior_sparse", "learned_sparse", "learned_hf"):
        text = ["--text", root / "held_out.txt", "--window", 256, "--windows", 64]
        verb("evaluate", "--input", root / model, *text, "--output", root / f"{model}.json")
    return root


def learn(root: Path, output: str, *more: object) -> None:
    """A mask-learning run on C4; a short one, so the temperature starts low and the learning rate is high."""
    schedule = ["--scale-start", 1000, "--scale-end", 10000, "--temperature-start", 10, "--temperature-end", 6]
    steps = ["--seq-length", 256, "--global-batch-size", 4, "--lr", "1e-3", "--min-lr", "1e-4", "--adam-eps", "1e-6"]
    words = ["--input", root / "dense", "--output", root / output, "--data", C4, *schedule, *steps]
    documents = [] if "--data-documents" in more else ["--data-documents", 1624]
    verb("prune", "--method", "maskllm", "--target", "2:4", "--lr-multiplier", 3, *words, *documents, *more)


def perplexity(root: Path, model: str) -> float:
    """Held-out perplexity."""
    return float(json.loads((root / f"{model}.json").read_text())["perplexity"])


def test_learned_masks_beat_their_prior(root: Path) -> None:
    """The dense model is no bound here: it never saw such text, and the masks are learned on it."""
    prior, learned = perplexity(root, "prior_sparse"), perplexity(root, "learned_sparse")
    assert math.log(prior) - math.log(learned) > 0.05


def test_both_softwares_measure_the_same(root: Path) -> None:
    assert perplexity(root, "learned_hf") == pytest.approx(perplexity(root, "learned_sparse"), rel=1e-3)


def test_a_result_says_how_it_was_measured(root: Path) -> None:
    result = json.loads((root / "dense.json").read_text())
    assert result["text"]["window"] == result["text"]["stride"] == 256
    assert result["text"]["windows"] == 64 and result["predicted_tokens"] == 64 * 255
    assert len(result["text"]["sha256"]) == 64


def test_the_start_is_the_prior_and_learning_moves_away_from_it(root: Path) -> None:
    records = read_metrics(root / "learned")
    assert records[0]["differs_from_start_fraction"] < 0.01
    assert records[-1]["differs_from_start_fraction"] > records[0]["differs_from_start_fraction"]
    assert records[-1]["max_probability"] > records[0]["max_probability"]
    assert records[-1]["weight_regularization"] == 0.0
    needed = {"loss", "grad_norm", "learning_rate", "max_probability", "changed_fraction", "tokens_per_s"}
    assert needed <= records[0].keys()


def test_tensorboard_events_are_written(root: Path) -> None:
    assert list((root / "learned" / "tensorboard").glob("events.*"))


def test_verify_proves_the_export(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb("verify", "--input", root / "learned_sparse", "--against", root / "learned_hf")
    said = capsys.readouterr().out
    assert "pattern 2:4: holds" in said and "0 of them stored as -0.0" in said and "equal" in said
    verb("verify", "--input", root / "learned_hf", "--target", "2:4", "--against", root / "learned")


def test_verify_notices_a_broken_pattern(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative control: the dense model is not 2:4, a learned one is not 1:4."""
    assert main(["verify", "--input", str(root / "dense"), "--target", "2:4"]) == 1
    assert main(["verify", "--input", str(root / "learned_hf"), "--target", "1:4"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def exported(root: Path, folder: str) -> dict[str, torch.Tensor]:
    """Tensors of an exported model."""
    from safetensors.torch import load_file

    return load_file(root / folder / "model.safetensors")


def test_zeros_are_positive_and_kept_weights_are_the_dense_ones(root: Path) -> None:
    dense, sparse = exported(root, "hf"), exported(root, "learned_hf")
    masks = Masks.load(root / "learned" / "decision")
    for name in masks.names():
        mask, weight = masks.get(name), sparse[name]
        assert torch.equal(weight[mask], dense[name][mask])
        removed = weight[~mask].view(torch.int32)
        assert not removed.any()  # all bits: +0.0
    assert torch.equal(dense["model.embed_tokens.weight"], sparse["model.embed_tokens.weight"])


def test_transformers_loads_and_generates(root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(root / "learned_hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(root / "learned_hf")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    words = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert words.shape[1] > prompt["input_ids"].shape[1]


def test_a_mask_file_applied_on_import_gives_the_same_model(root: Path) -> None:
    verb("import", "--input", root / "hf", "--output", root / "from_mask", "--mask", root / "learned.npz")
    verb("verify", "--input", root / "from_mask", "--target", "2:4", "--against", root / "learned_hf")


def test_a_mask_file_is_a_prior_too(root: Path) -> None:
    learn(root, "from_npz", "--prior", root / "learned.npz", "--train-iters", 1)
    assert agreement(root, "from_npz", "learned") > 0.999


def agreement(root: Path, a: str, b: str) -> float:
    """Share of weights on which two runs decide alike."""
    first, second = (Masks.load(root / name / "decision") for name in (a, b))
    pairs: list[Any] = [(first.get(name), second.get(name)) for name in first.names()]
    return sum(int((x == y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


def test_transfer_starts_from_the_learned_logits(root: Path) -> None:
    """Four steps on another text stay close to the earlier run, closer than to the prior both came from."""
    assert agreement(root, "transferred", "learned") > max(0.95, agreement(root, "transferred", "prior"))


def test_a_prior_can_be_named_by_its_method(root: Path) -> None:
    more = ["--calibration", C4, "--calibration-samples", 8, "--calibration-seq-length", 128]
    learn(root, "named", "--prior", "wanda", "--train-iters", 1, *more)
    prior = Masks.load(root / "named" / "prior")
    assert prior.info.method == "wanda"
    decided = Masks.load(root / "named" / "decision")
    same = [float((prior.get(name) == decided.get(name)).float().mean()) for name in prior.names()]
    assert min(same) > 0.98


def test_hard_sampling_and_no_prior(root: Path) -> None:
    learn(root, "hard", "--prior", root / "prior", "--train-iters", 2, "--hard")
    learn(root, "random", "--train-iters", 1)
    assert 0.3 < agreement(root, "random", "prior") < 0.8


@pytest.mark.parametrize("what", ["dense", "learned", "learned/decision", "learned.npz"])
def test_inspect_says_what_it_is(root: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb("inspect", "--input", root / what)
    said = capsys.readouterr().out
    assert ("llama" in said) if what == "dense" else ("2:4" in said)


def test_a_hugging_face_directory_is_pruned_as_it_is(root: Path) -> None:
    wanda = ["--method", "wanda", "--target", "2:4", "--calibration", C4, "--calibration-documents", 1624]
    for name in ("hf", "dense"):
        few = ["--calibration-samples", 4, "--calibration-seq-length", 128]
        verb("prune", "--input", root / name, "--output", root / f"wanda_of_{name}", *wanda, *few)
    masks = [Masks.load(root / f"wanda_of_{name}" / "decision") for name in ("hf", "dense")]
    for name in masks[0].names():
        assert torch.equal(masks[0].get(name), masks[1].get(name)), name
    verb("trim", "--input", root / "wanda_of_hf", "--output", root / "wanda_sparse")
    verb("verify", "--input", root / "wanda_sparse", "--target", "2:4")
