"""What calibration sees: the earlier layers pruned, and with `sequential` the earlier linears of a layer too."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import NM
from megatron_prune.methods.base import get_method
from megatron_prune.model.prunable import LINEARS
from megatron_prune.option_groups import Calibration
from megatron_prune.statistics import runner as runner_module
from megatron_prune.statistics import walk
from megatron_prune.statistics.activations import InputNorm
from megatron_prune.statistics.runner import Runner, WholeLinear, row_span
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
        settings = SimpleNamespace(calibration=calibration, output=tmp_path, apply_chat_template=False)
        drawn = Workbench(settings, source, backend.Layout(), get_method("sparsegpt"), NM(2, 4)).calibration  # type: ignore[arg-type]
        assert drawn.tokens.shape == (2, used)
        assert drawn.info()["length"] == used


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
def test_masks_are_those_of_transformers_matrices_and_removed_weights_stay(
    tmp_path: Path, corrected: bool, sequential: bool
) -> None:
    """What is above zero is kept, and doubled where the method corrects it; the first layer is told before the next."""
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    before = load_file(hf / "model.safetensors")
    written: dict[int, dict[str, Tensor]] = {}
    layers: list[int] = []
    with backend.running(backend.Layout()):
        model = open_model(hf).load(backend.Layout())
        writer: Any = SimpleNamespace(add_layer=lambda number, masks: written.update({number: masks}))
        runner = Runner(model, None, writer, lambda count: layers.append(count))
        for linear in runner.layerwise(None, sequential=sequential):
            assert linear.statistic is None and len(written) == len(layers) == int(linear.name.split(".")[2])
            weight = linear.weight()
            linear.keep(weight > 0, 2 * weight if corrected else None)
        after = dict(model.hf_weights())
    assert list(written) == [0, 1] and layers == [1, 1] and runner.weights_changed == corrected
    masks = {name: mask for found in written.values() for name, mask in found.items()}
    assert set(masks) == {name for name in before if name.endswith("proj.weight")}
    for name, weight in before.items():
        kept = masks.get(name, torch.zeros(weight.shape, dtype=torch.bool))
        assert name not in masks or torch.equal(kept, weight > 0)
        assert torch.equal(after[name], torch.where(kept, 2 * weight, weight) if corrected else weight)
    found = runner.masks()
    assert (found.kept, found.size) == (
        sum(int(m.sum()) for m in masks.values()),
        sum(m.numel() for m in masks.values()),
    )


def test_a_linear_that_is_left_undecided_is_named(tmp_path: Path) -> None:
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    with backend.running(backend.Layout()):
        runner = Runner(open_model(hf).load(backend.Layout()), None, None)
        with pytest.raises(RuntimeError, match=r"left decoder.layers.0.self_attention.linear_qkv.weight undecided"):
            for _ in runner.layerwise(None):
                pass


@pytest.mark.parametrize(("rows", "parts"), [(12, 1), (12, 4), (10, 3), (7, 5), (2, 4)])
def test_rows_are_shared_out_in_order_and_evenly(rows: int, parts: int) -> None:
    spans = [row_span(rows, part, parts) for part in range(parts)]
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("rows", [12, 10, 2])
@pytest.mark.parametrize("x", [torch.float32, torch.bool, torch.int64])
def test_rows_of_all_ranks_are_joined(rows: int, x: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, of which some may have a row more, or none: each gives its own and gets the whole."""
    whole = (torch.arange(5 * rows).view(rows, 5) % 3).to(x)
    given: dict[int, Tensor] = {}
    monkeypatch.setattr(runner_module.convert, "row_blocks", lambda *_: {})
    fake: Any = SimpleNamespace(model=SimpleNamespace(config=None), megatron="w", layer=0)

    def gathered(rank: int) -> Tensor:
        def shared(parts: list[Tensor], mine: Tensor) -> None:
            assert len(parts) == 3 and all(part.shape == mine.shape and part.dtype == mine.dtype for part in parts)
            given[rank] = mine
            for number, theirs in given.items():
                parts[number].copy_(theirs)

        known = {"get_rank": lambda: rank, "get_world_size": lambda: 3, "all_gather": shared}
        monkeypatch.setattr(runner_module, "dist", SimpleNamespace(**known))
        linear = WholeLinear(fake, fake, torch.randn(rows, 4), None)
        return linear.gather(linear.local(whole))

    for rank in range(3):
        gathered(rank)  # until everybody has given something
    for rank in range(3):
        assert gathered(rank).dtype == x and torch.equal(gathered(rank), whole)
