"""The road of every family: each method prunes a random model, the export loads in transformers and is the dense model
with zeros, and nothing but prunable weights has changed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import prunable_shapes
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import FAMILIES
from tests.models import byte_tokenizer, tiny_model, words

pytestmark = pytest.mark.slow
METHODS = ("magnitude", "wanda", "sparsegpt", "maskllm")
OPTIONS = {
    "magnitude": [],
    "wanda": ["--calibration-samples", "4", "--calibration-seq-length", "16"],
    "sparsegpt": ["--calibration-samples", "4", "--calibration-seq-length", "16", "--no-update-weights"],
    "maskllm": ["--seq-length", "16", "--global-batch-size", "1", "--train-iters", "2", "--prior", "magnitude"],
}


def verb(*words: object) -> None:
    """Run a verb that must succeed."""
    assert main([str(word) for word in words]) == 0, words


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents for calibration and training."""
    return words(tmp_path_factory.mktemp("text") / "words.jsonl", documents=8)


@pytest.fixture(scope="module", params=sorted(FAMILIES.keys() - {"llama"}))
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A model of one family pruned to 2:4 by every method and exported."""
    root = tmp_path_factory.mktemp(request.param)
    byte_tokenizer(tiny_model(root / "hf", request.param, vocab_size=257))
    verb("import", "--input", root / "hf", "--output", root / "dense")
    for method in METHODS:
        data = [] if method == "magnitude" else ["--data" if method == "maskllm" else "--calibration", text]
        words = ["--input", root / "dense", "--output", root / method, "--method", method, *data, *OPTIONS[method]]
        verb("prune", "--target", "2:4", *words)
        verb("trim", "--input", root / method, "--output", root / f"{method}_sparse")
        verb("export", "--input", root / f"{method}_sparse", "--output", root / f"{method}_hf")
    return root


@pytest.mark.parametrize("method", METHODS)
def test_the_export_is_the_sparse_model(root: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb("verify", "--input", root / f"{method}_sparse", "--against", root / f"{method}_hf", "--tolerance", "1e-4")
    assert "pattern 2:4: holds" in capsys.readouterr().out
    verb("verify", "--input", root / f"{method}_hf", "--target", "2:4")


@pytest.mark.parametrize("method", METHODS)
def test_half_of_the_prunable_weights_stay_and_all_else_is_untouched(root: Path, method: str) -> None:
    readers = [HFReader(root / folder) for folder in ("hf", f"{method}_hf")]
    dense, sparse = ({name: reader.read(name) for name in reader.names()} for reader in readers)
    prunable = prunable_shapes(readers[0].model_config)
    assert dense.keys() == sparse.keys() >= prunable.keys()
    for name, before in dense.items():
        after = sparse[name]
        kept = after != 0 if name in prunable else torch.ones_like(before, dtype=torch.bool)
        assert torch.equal(after[kept], before[kept]), name
        assert name not in prunable or int(kept.sum()) == before.numel() // 2


def test_a_mask_file_gives_the_same_model(root: Path) -> None:
    """Packed masks are in the shape of the Hugging Face tensor, also where that is `[in, out]`."""
    verb("export", "--input", root / "magnitude", "--output", root / "masks.npz", "--format", "mask-npz")
    verb("import", "--input", root / "hf", "--output", root / "from_mask", "--mask", root / "masks.npz")
    verb("verify", "--input", root / "from_mask", "--target", "2:4", "--against", root / "magnitude_hf")


def test_sequences_beyond_learned_positions_are_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(byte_tokenizer(tiny_model(tmp_path / "hf", "gpt2", vocab_size=257, n_positions=32)))
    data = ["--data", str(text), "--seq-length", "33"]
    learn = ["prune", "--method", "maskllm", "--target", "2:4", "--output", str(tmp_path / "run"), *data]
    for command in (["verify", "--against", model, "--seq-length", "33"], learn):
        assert main([*command, "--input", model]) == 2
        assert "learned positions for 32: use 32 or less" in capsys.readouterr().err
