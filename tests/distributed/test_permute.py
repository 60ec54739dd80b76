"""Channels get the same order in every layout, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.__main__ import main
from tests.distributed.launch import DP2, EP2_TP2_SP, ONE, PP2, TP2_SP, Layout, launch, must_pass
from tests.models import words
from tests.runs import imported

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("family", "layouts"),
    [("llama", (TP2_SP, PP2)), ("qwen2_moe", (EP2_TP2_SP,)), pytest.param("llama", (DP2,), marks=pytest.mark.nightly)],
    ids=["llama", "experts", "replicas"],
)
def test_the_order_is_the_same_in_every_layout(tmp_path: Path, family: str, layouts: tuple[Layout, ...]) -> None:
    """And depends on the text: the same is not said of everything."""
    imported(tmp_path, family)
    words(tmp_path / "other.jsonl", documents=4, seed=5)

    def command(layout: Layout, text: str = "w.jsonl") -> list[list[str]]:
        output = tmp_path / f"{layout.name}_{text}"
        how = ["--calibration", str(tmp_path / text), "--calibration-samples", "3", "--calibration-seq-length", "24"]
        made = ["permute", str(tmp_path / "ck"), str(output), *how, *layout.flags()]
        return [made, ["export", str(output), f"{output}_hf", *layout.flags()]]

    alone = [*command(ONE), *command(ONE, "other.jsonl")]
    assert all(main(each) == 0 for each in alone)
    must_pass(launch(2, [each for layout in layouts for each in command(layout)], tmp_path / "work"))
    expected = load_file(tmp_path / "one_w.jsonl_hf" / "model.safetensors")
    for layout in layouts:
        found = load_file(tmp_path / f"{layout.name}_w.jsonl_hf" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), layout.name
    other = load_file(tmp_path / "one_other.jsonl_hf" / "model.safetensors")
    assert any(not torch.equal(other[name], tensor) for name, tensor in expected.items())
