"""Learnable masks in JAX against those in PyTorch, through files: words, values, gradients, the rows they count by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.kernels import philox
from megatron_prune.kernels.gumbel import Draw, Position, masked_weight, patterns
from megatron_prune.maxtext import keys, layout
from megatron_prune.model import convert
from megatron_prune.model.families import FAMILIES, ModelConfig
from tests.maxtext import environment

CASES: dict[str, tuple[int, int, bool, bool, float]] = {
    "2:4": (2, 4, False, True, 0.0),
    "2:4 hard": (2, 4, True, True, 0.0),
    "2:4 regularised": (2, 4, False, True, 0.3),
    "1:4": (1, 4, False, True, 0.1),
    "4:8": (4, 8, False, True, 0.0),
    "no noise": (2, 4, False, False, 0.1),
}
"""n, m, hard, noise, regularization"""
SCALE, TEMPERATURE, DRAW = 37.0, 0.9, (5, 17, 0, 2**33 + 6)
ROWS = torch.tensor([3, 4, 1000, 57000, 0])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What both made of the same inputs."""
    environment.python()
    folder = tmp_path_factory.mktemp("gumbel")
    given: dict[str, Any] = {
        "cases": list(CASES),
        "counter": [0, 1, 2**31, 2**32 - 1],
        "key": np.uint32([7, 2**32 - 9]),
    }
    expected: dict[str, Any] = {}
    for case, (n, m, hard, noise, regularization) in CASES.items():
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(5, 64, generator=generator, requires_grad=True)
        logits = torch.randn(5, 64 // m, len(patterns(n, m)), generator=generator).mul_(0.05).requires_grad_()
        grad = torch.randn(5, 64, generator=generator)
        value = masked_weight(
            weight, logits, n=n, m=m, scale=SCALE, temperature=TEMPERATURE, hard=hard, regularization=regularization,
            draw=Draw(*DRAW) if noise else None, position=Position(ROWS, 0, 64 // m), implementation="eager",
        )  # fmt: skip
        value.backward(grad)
        expected |= {f"{case} value": value, f"{case} grad_weight": weight.grad, f"{case} grad_logits": logits.grad}
        given |= {f"{case} weight": weight, f"{case} logits": logits, f"{case} grad": grad, f"{case} rows": ROWS}
        given |= {f"{case} shape": (n, m, hard, noise), f"{case} draw": DRAW}
        given[f"{case} schedule"] = (SCALE, TEMPERATURE, regularization)
    plain = {key: value.detach().numpy() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    np.savez(folder / "given.npz", **plain)
    environment.run(folder, [["call", "tests.maxtext.gumbel_jax", "compare", folder / "given.npz", folder / "out.npz"]])
    arrays = dict(np.load(folder / "out.npz"))
    return arrays | {f"torch {key}": value.detach().numpy() for key, value in expected.items()}


def test_words_are_equal(found: dict[str, np.ndarray]) -> None:
    counter = torch.zeros(4, 4, dtype=torch.int64)
    counter[:, 0] = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert np.array_equal(philox.philox4x32(counter, (7, 2**32 - 9)).numpy(), found["words"].astype(np.int64))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["value", "grad_weight", "grad_logits"])
def test_values_and_gradients_are_equal(found: dict[str, np.ndarray], case: str, what: str) -> None:
    wanted, given = found[f"torch {case} {what}"], found[f"{case} {what}"]
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(given, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


def test_another_draw_gives_another_mask(found: dict[str, np.ndarray]) -> None:
    """Control."""
    assert np.abs(found["2:4 value"] - found["no noise value"]).max() > 0.1


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_are_those_of_the_megatron_weight(scaled: bool) -> None:
    """Through the converter: a weight whose rows are numbered as Megatron numbers them, in MaxText's order."""
    rope = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **layout.LLAMA3}} if scaled else {}
    hf = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 51, "max_position_embeddings": 64}
    config: ModelConfig = FAMILIES["llama"].from_hf(hf | {"rms_norm_eps": 1e-5} | rope)
    rows = {name: ids for map in FAMILIES["llama"].weights(config) if map.prunable
            for name, ids in convert.row_blocks(map, config).items()}  # fmt: skip
    for leaf in layout.LEAVES:
        if leaf.prunable:
            ids = rows[leaf.hf.format(layer=0)].numpy()
            weight = np.repeat(ids[:, None], layout.weight_shape(leaf, config)[1], 1).astype(np.float32)
            kernel = layout.kernel(leaf, weight, config)
            inputs = layout.weight_shape(leaf, config)[1]
            assert np.array_equal(kernel.reshape(inputs, -1)[0], keys.row_ids(leaf, config)), leaf.path
