"""The zeros that a checkpoint tells are those of its weights, however many processes hold a copy of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_prune.decision.masks import prunable_shapes
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import read_description
from tests.distributed.launch import EP2, ONE, TP2, launch, must_pass
from tests.models import byte_tokenizer, tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LAYOUTS = [TP2, EP2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which the linears that every tensor-parallel process holds whole, and one expert, have most zeros."""
    root = tmp_path_factory.mktemp("zeros")
    path = byte_tokenizer(tiny_model(root / "hf", "deepseek_v3", vocab_size=257))
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "q_a_proj" in name or ".experts.5." in name:
            tensor[1:] = 0.0
        elif "o_proj" in name:
            tensor[:, :4] = 0.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for layout in (ONE, *LAYOUTS):
        words = ["import", "--input", str(path), "--output", str(root / layout.name), *layout.flags()]
        must_pass(launch(layout.processes, [words], root / "commands"))
    return root


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=lambda layout: layout.name)
def test_zeros_of_copies_are_counted_once(root: Path, layout: object) -> None:
    reader = HFReader(root / "hf")
    weights = [reader.read(name) for name in prunable_shapes(reader.model_config)]
    zeros, size = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    found = read_description(root / layout.name).zeros()  # type: ignore[attr-defined]
    assert found is not None and tuple(found) == (zeros, size) and 0 < zeros < size
