"""What learning masks costs over running the same frozen model: one optimizer step, by default of 2 x 1024 tokens.

    python benchmarks/step_overhead.py --model HF_DIRECTORY [--rounds 5] [--windows 8 --length 2048]

Four things take turns in one process, on the same model object and tokens; the median of the rounds counts:

    dense, frozen      forward and backward in which every weight is frozen and the embedding's output asks for a
                       gradient: gradients of activations through every layer, of no weight
    dense, trained     the same, and the gradients of the weights that masks are learned for
    masks              a whole step of the trainer: draw, forward, backward, sum over replicas, gradient norm and
                       clipping, Adam, and the statistics that are logged
    statistics         the last part of it alone

A mask's gradient is made of the gradient of its weight, so the matrix products of `dense, trained` are a part of
`masks` whatever the kernels do; `over dense, frozen` cannot be below what they take. Runs on the GPU where there is
one. Writes RESULTS/step_overhead_DEVICE_DATE.json.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.results import MODEL, arguments, option, rounds, write_result
from bench.running import Times, each, in_turns, ratios, seconds, spread

if __name__ == "__main__":
    GIVEN = arguments(
        __doc__,
        MODEL,
        rounds(5),
        option("--windows", type=int, default=2),
        option("--length", type=int, default=1024),
    )

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from bench.models import MaskLearning

from megatron_prune.decision.source import open_model
from megatron_prune.model.prunable import PrunableModel


class Uses:
    """The model in its four uses."""

    def __init__(self, model: PrunableModel, folder: Path, windows: int, length: int) -> None:
        self.model = model
        self.learning = MaskLearning(model, folder, (2, 4), windows, length, scale=1280.0, temperature=12.8)
        self.weights = [linear.module.weight for linear in model.linears()]
        self.batch = self.learning.tokens.batch(windows)

    def works(self) -> dict[str, Callable[[], Any]]:
        """What takes turns."""
        return {
            "dense, frozen": lambda: self.dense(trained=False),
            "dense, trained": lambda: self.dense(trained=True),
            "masks": self.masks,
            "statistics": self.learning.runner.measure,
        }

    def masks(self) -> None:
        """A step of the trainer and the statistics."""
        self.learning.step()
        self.learning.runner.measure()

    def dense(self, trained: bool) -> None:
        """Forward and backward without masks."""
        chunk = self.model.chunks[0]
        for linear in self.model.linears():
            linear.module.mask_draw = None
        for weight in self.weights:
            weight.requires_grad_(trained)
        hook = chunk.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
        windows, length = self.batch.shape[0], self.batch.shape[1] - 1
        places = torch.arange(length, device=self.batch.device).expand(windows, -1)
        chunk.train()
        chunk(self.batch[:, :-1], places, None, labels=self.batch[:, 1:]).float().mean().backward()
        hook.remove()
        for linear in self.model.linears():
            linear.module.mask_draw = self.learning.draw
        for weight in self.weights:
            weight.grad = None
            weight.requires_grad_(False)


def measure() -> tuple[dict[str, list[Times]], Any]:
    """Seconds of every use in every round, and the model's configuration."""
    layout, end = backend.Layout(), torch.cuda.synchronize if torch.cuda.is_available() else None
    with tempfile.TemporaryDirectory() as folder, backend.running(layout):
        model = open_model(GIVEN.model).load(layout)
        works = Uses(model, Path(folder), GIVEN.windows, GIVEN.length).works()
        runs = in_turns({name: partial(seconds, work, end) for name, work in works.items()}, GIVEN.rounds)
        return runs, model.config


def main() -> None:
    """Run it and write the result file."""
    runs, shape = measure()
    times = {name: each(statistics.median, one) for name, one in runs.items()}
    bases = ("dense, frozen", "dense, trained")
    rows = [
        [name, *found.values(), *(found["wall_s"] / times[base]["wall_s"] - 1 for base in bases)]
        for name, found in times.items()
        if name != "statistics"
    ]
    tokens = f"one step of {GIVEN.windows} x {GIVEN.length} tokens"
    protocol = (
        f"{shape.num_layers} layers of width {shape.hidden_size}, {shape.dtype}, forward and backward. Frozen: "
        "gradients of activations only. Trained: and of the prunable weights. Masks: a whole step with draw, gradient "
        f"norm, Adam and statistics. In turn in one process, medians of {GIVEN.rounds}, {torch.get_num_threads()} "
        "threads."
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    write_result(
        f"step_overhead_{'cuda' if device else 'cpu'}",
        GIVEN,
        [tokens, "wall s", "CPU s", *(f"over {base}" for base in bases)],
        rows,
        protocol,
        device=device,
        times=times,
        masks_over={base: spread(ratios(runs["masks"], runs[base], "wall_s")) for base in bases},
    )


if __name__ == "__main__":
    main()
