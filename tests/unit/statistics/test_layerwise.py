"""What calibration sees: the earlier layers pruned, and with `sequential` the earlier linears of a layer too."""

from __future__ import annotations

from pathlib import Path

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.model.prunable import LINEARS
from megatron_prune.model.source import open_model
from megatron_prune.statistics.activations import InputNorm
from megatron_prune.statistics.runner import Runner
from tests.models import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("sequential", [False, True])
def test_inputs_of_a_layer_whose_first_linear_is_removed(tmp_path: Path, sequential: bool) -> None:
    """Without q, k and v nothing enters the output projection, if it is calibrated after they are removed."""
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    tokens = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(0))
    layout = backend.Layout()
    with backend.running(layout):
        runner = Runner(open_model(hf).load(layout), tokens, None)
        norms = {}
        for linear in runner.layerwise(InputNorm, sequential=sequential):
            norms[linear.name] = linear.statistic.value().max().item()
            linear.keep(torch.full(linear.weight().shape, not linear.name.endswith("linear_qkv.weight")))
    first, second = ([norms[f"decoder.layers.{n}.{path}.weight"] for path in LINEARS] for n in (0, 1))
    assert [norm > 0 for norm in first] == [True, not sequential, True, True]
    assert [norm > 0 for norm in second] == [True, not sequential, True, True]
    assert runner.kept < runner.size
