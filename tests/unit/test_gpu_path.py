"""What is done otherwise on a GPU, as far as a machine without one can show it."""

from __future__ import annotations

import importlib.util
import logging
import os
from types import SimpleNamespace
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prune.kernels import gumbel
from megatron_prune.model import build
from megatron_prune.model.context import positions
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.training import learning, state
from tests.unit.test_backend import config


@pytest.mark.parametrize(
    ("layout", "given", "expected"),
    [
        (backend.Layout(tensor=2), None, "1"),
        (backend.Layout(context=2), None, "1"),
        (backend.Layout(pipeline=2), None, None),
        (backend.Layout(), "8", "8"),
        (backend.Layout(tensor=2), "8", "8"),
    ],
)
def test_a_gpu_has_one_queue_only_where_layers_are_split(
    monkeypatch: pytest.MonkeyPatch, layout: backend.Layout, given: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(backend, "_own_queue", given is None)
    monkeypatch.setenv(backend.QUEUES, given or "1")
    backend._set_queues(layout)
    assert os.environ.get(backend.QUEUES) == expected


def test_no_process_groups_are_made_besides_those_in_use() -> None:
    with backend.running(backend.Layout()), pytest.raises(AssertionError):
        parallel_state.get_data_parallel_group_gloo()


def model(**fields: Any) -> PrunableModel:
    """A small LLaMA with random weights."""
    layout = backend.Layout()
    chunks = build.build_model(config(), layout, torch.float32, **fields)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.normal_(std=0.3)
    return PrunableModel(config(), layout, chunks)


def test_the_fused_activation_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every gradient; it is taken on a GPU for SwiGLU alone."""
    tokens = torch.arange(24).view(2, 12)
    found: list[list[Tensor]] = []
    with backend.running(backend.Layout()):
        for fused in (False, True):
            network = model(bias_activation_fusion=fused)
            output = network.chunks[0](tokens, positions(12).expand(2, -1), None)
            output.square().mean().backward()
            found.append([output.detach(), *(p.grad for p in network.chunks[0].parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for plain, fused_one in zip(*found, strict=True):
        torch.testing.assert_close(fused_one, plain, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    assert build.transformer_config(config(), backend.Layout(), torch.float32).bias_activation_fusion


@pytest.mark.parametrize("engine", [False, True])
def test_an_engine_that_is_left_out_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, engine: bool
) -> None:
    """Installed and of no use to megatron-core: other rounding and another speed, which nobody would look for."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    build._tell_modules.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            build._tell_modules(engine)
    build._tell_modules.cache_clear()
    assert [record.name for record in caplog.records] == ([] if engine else [build.__name__])


def test_torchs_adam_is_fused_and_others_are_left_alone() -> None:
    ours = SimpleNamespace(optimizer=torch.optim.AdamW([torch.zeros(2)]))
    other = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{}]))
    state.use_fused_kernel(SimpleNamespace(chained_optimizers=[ours, other]))
    assert ours.optimizer.param_groups[0]["fused"] is True and other.optimizer.param_groups == [{}]


def test_the_step_count_goes_to_the_device_of_the_parameter() -> None:
    """The fused kernel of a GPU refuses one in the host's memory."""
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    slot = state.Slot(torch.optim.AdamW([parameter]), parameter)
    state._fill(slot, {kind: torch.empty(3, device="meta") for kind in state.MOMENTS}, 7)
    assert slot.state["step"].device == parameter.device


def test_a_random_start_does_not_hang_on_how_many_logits_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with backend.running(backend.Layout()):
        network = model()
        network.learn_masks(MaskDraw(2, 4, 0))
        linear = network.linears()[0]
        runner = SimpleNamespace(training=SimpleNamespace(seed=3))
        whole = learning.LearningRunner._noise(runner, linear)  # type: ignore[arg-type]
        monkeypatch.setattr(learning, "NOISE_AT_ONCE", 7 * whole[0].numel())
        assert torch.equal(learning.LearningRunner._noise(runner, linear), whole)  # type: ignore[arg-type]
        assert len({tuple(row) for row in whole.flatten(1).tolist()}) == len(whole)


def test_what_every_pass_asks_is_made_once() -> None:
    assert gumbel.patterns(2, 4) is gumbel.patterns(2, 4)
