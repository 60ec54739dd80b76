"""Gradients of every weight of a checkpoint in some layout, by Hugging Face name: the whole model's backward pass."""

from __future__ import annotations

from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.model import convert
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.training.loop import Trainer
from megatron_prune.training.recovery import RecoveryLoss
from megatron_prune.training.weighting import Weighting

LENGTH = 16
WINDOWS = 2
WEIGHTING = Weighting(lm=0.5, distillation=2.0, hidden=3.0, temperature=2.0)


class RandomWindows:
    """Training windows of seeded random tokens below `vocabulary`."""

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocabulary, (WINDOWS, LENGTH + 1), generator=generator)

    def sample(self, index: int) -> Tensor:
        """`[LENGTH + 1]` token ids."""
        return self.tokens[index]


def save_gradients(
    checkpoint: str, output: str, tensor: str, pipeline: str, sequence_parallel: str, *experts: str
) -> None:
    """Write the gradients of the mean loss over the windows to `output`. Collective.

    `experts`: processes that share out the experts, and those that share each of them.
    """
    shares = dict(zip(("expert", "expert_tensor"), map(int, experts), strict=False))
    layout = backend.Layout(int(tensor), int(pipeline), sequence_parallel=sequence_parallel == "True", **shares)
    with backend.running(layout):
        model = load_model(Path(checkpoint), layout)
        training = Training(seq_length=LENGTH, global_batch_size=WINDOWS, train_iters=1, clip_grad=0.0)
        Trainer(model, training, RandomWindows(model.config.vocab_size)).step(0)
        gradients = gathered(model)
        if backend.rank() == 0:
            save_file(gradients, output)


def save_recovery_gradients(
    checkpoint: str, teacher: str, output: str, tensor: str, pipeline: str, sequence_parallel: str
) -> None:
    """As `save_gradients`, of `WEIGHTING`'s sum of losses, which are written too. Collective."""
    layout = backend.Layout(int(tensor), int(pipeline), sequence_parallel=sequence_parallel == "True")
    with backend.running(layout):
        model, other = load_model(Path(checkpoint), layout), load_model(Path(teacher), layout)
        training = Training(seq_length=LENGTH, global_batch_size=WINDOWS, train_iters=1, clip_grad=0.0)
        objective = RecoveryLoss(model, WEIGHTING, other, training.num_microbatches(layout.data))
        trainer = Trainer(model, training, RandomWindows(model.config.vocab_size), objective=objective)
        parts = trainer.step(0).parts
        gradients = gathered(model)
        if backend.rank() == 0:
            save_file(gradients | {name: torch.tensor(value) for name, value in parts.items()}, output)


def gathered(model: PrunableModel) -> dict[str, Tensor]:
    """Hugging Face name -> gradient; replicas that differ between tensor-parallel ranks are an error. Collective."""
    found: dict[str, Tensor] = {}
    for map in model.maps:
        if map.megatron.endswith("router.expert_bias"):  # no gradient trains it
            continue
        parameter = model.parameters.get(map.megatron)
        whole = model.gather(map, None if parameter is None else parameter.main_grad)  # type: ignore[attr-defined]
        found.update(zip(map.hf, convert.split(map, whole.clone(), model.config), strict=True))
    return found
