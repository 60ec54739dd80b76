"""What calibration sees: the earlier layers pruned, and with `sequential` the earlier linears of a layer too."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import NM
from megatron_prune.methods.base import get_method
from megatron_prune.model.prunable import LINEARS
from megatron_prune.option_groups import Calibration
from megatron_prune.statistics import walk
from megatron_prune.statistics.activations import InputNorm
from megatron_prune.statistics.runner import Runner
from megatron_prune.workbench import Workbench
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


def test_one_layers_activations_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor for each unit of windows, whichever layer is pruned."""
    length, windows = 17, 3
    monkeypatch.setattr(walk, "UNIT_TOKENS", length)
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    tokens = torch.randint(257, (windows, length), generator=torch.Generator().manual_seed(0))
    layout = backend.Layout()
    with backend.running(layout):
        runner = Runner(open_model(hf).load(layout), tokens, None)
        held = []
        for linear in runner.layerwise(InputNorm):
            held.append(sum(torch.is_tensor(x) and x.shape[:1] == (length,) and x.dim() == 3 for x in gc.get_objects()))
            linear.keep(torch.ones(linear.weight().shape, dtype=torch.bool))
    assert held == [windows] * 2 * len(LINEARS)


def test_windows_are_no_longer_than_the_model_was_made_for(tmp_path: Path) -> None:
    """And the decision says how long they were."""
    source = open_model(byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257)))
    longest = source.config.max_position_embeddings
    text = tmp_path / "text.txt"
    text.write_text("a" * 3 * longest)
    for given, used in ((longest - 1, longest - 1), (longest + 1, longest)):
        calibration = Calibration(text=(text,), samples=2, seq_length=given)
        settings = SimpleNamespace(calibration=calibration, output=tmp_path)
        drawn = Workbench(settings, source, backend.Layout(), get_method("sparsegpt"), NM(2, 4)).calibration  # type: ignore[arg-type]
        assert drawn.tokens.shape == (2, used)
        assert drawn.info()["length"] == used
