"""What learning masks costs over running the same frozen model: one optimizer step, by default of 2 x 1024 tokens.

    python benchmarks/step_overhead.py --model HF_DIRECTORY [--repeats 5] [--windows 8 --length 2048]

Four things take turns in one process, on the same model object and tokens; the median of the repeats counts:

    dense, frozen      forward and backward in which every weight is frozen and the embedding's output asks for a
                       gradient: gradients of activations through every layer, of no weight
    dense, trained     the same, and the gradients of the weights that masks are learned for
    masks              a whole step of the trainer: draw, forward, backward, sum over replicas, gradient norm and
                       clipping, Adam, and the statistics that are logged
    statistics         the last part of it alone

A mask's gradient is made of the gradient of its weight, so the matrix products of `dense, trained` are a part of
`masks` whatever the kernels do; `over dense, frozen` cannot be below what they take. Runs on the GPU where there is
one. Writes benchmarks/results/step_overhead_DEVICE_DATE.json, of which a document's table is made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from quality import HERE, hardware, versions
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.log import MetricsLog
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.training.learning import LearningRunner
from megatron_prune.training.loop import Trainer

SCALE, TEMPERATURE = 1280.0, 12.8


class RandomTokens:
    """Windows of random tokens: what they are changes no time."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def sample(self, index: int) -> Tensor:
        """`[length + 1]` int64 token ids."""
        return torch.randint(self.vocabulary, (self.length + 1,), generator=torch.Generator().manual_seed(index))


class Bench:
    """The model in its four uses."""

    def __init__(self, model: PrunableModel, folder: Path, windows: int, length: int) -> None:
        self.model = model
        training = Training(micro_batch_size=windows, global_batch_size=windows, seq_length=length)
        data = RandomTokens(model.config.vocab_size, length)
        self.runner = LearningRunner(
            model,
            training,
            data,
            folder,
            writer=lambda: None,
            log=MetricsLog(folder),  # type: ignore[arg-type]
        )
        self.draw = self.runner.learn_masks(2, 4, hard=False, train_weights=False)
        self.draw.scale, self.draw.temperature = SCALE, TEMPERATURE
        self.runner.start_logits(lambda mask: mask, std=0.01)
        self.trainer = Trainer(model, training, data, {"*mask_logits": 1.0})
        self.weights = [linear.module.weight for linear in model.linears()]
        self.batch = torch.stack([data.sample(i) for i in range(windows)]).to(backend.device())
        self.steps = 0

    def masks(self) -> None:
        """A step of the trainer and the statistics."""
        self.draw.step = self.steps
        self.trainer.step(self.steps)
        self.runner.measure()
        self.steps += 1

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
            linear.module.mask_draw = self.draw
        for weight in self.weights:
            weight.grad = None
            weight.requires_grad_(False)


def seconds(work: Callable[[], Any]) -> dict[str, float]:
    """By the clock, and of processor time over all threads."""
    began, processor = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - processor}


def measure(bench: Bench, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of every use, which take turns, after one of each that does not count."""
    uses: dict[str, Callable[[], Any]] = {
        "dense, frozen": lambda: bench.dense(trained=False),
        "dense, trained": lambda: bench.dense(trained=True),
        "masks": bench.masks,
        "statistics": bench.runner.measure,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in uses}
    for _ in range(repeats + 1):
        for name, work in uses.items():
            found[name].append(seconds(work))
    return {
        name: {key: statistics.median(each[key] for each in times[1:]) for key in times[0]}
        for name, times in found.items()
    }


def main() -> None:
    """Run it and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    given = parser.parse_args()
    layout, load = backend.Layout(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, backend.running(layout):
        model = open_model(given.model).load(layout)
        times = measure(Bench(model, Path(folder), given.windows, given.length), given.repeats)
        shape = model.config
    on_gpu = torch.cuda.is_available()
    frozen, trained = times["dense, frozen"], times["dense, trained"]
    today = datetime.date.today().isoformat()
    tokens = f"{given.windows} x {given.length}"
    result = {
        "columns": [f"one step of {tokens} tokens", "wall s", "CPU s", "over dense, frozen", "over dense, trained"],
        "rows": [
            [name, each["wall_s"], each["cpu_s"], *(each["wall_s"] / base["wall_s"] - 1 for base in (frozen, trained))]
            for name, each in times.items()
            if name != "statistics"
        ],
        "protocol": f"{shape.num_layers} layers of width {shape.hidden_size}, {shape.dtype}, forward and backward. "
        "Frozen: gradients of activations only. Trained: and of the prunable weights. Masks: a whole step with draw, "
        f"gradient norm, Adam and statistics. In turn in one process, medians of {given.repeats}, "
        f"{torch.get_num_threads()} threads.",
        "hardware": torch.cuda.get_device_name() if on_gpu else hardware(),
        "date": today,
        "load_before": load,  # other work on the machine
        "versions": versions(),
        "times": times,
    }
    path = HERE / "results" / f"step_overhead_{'cuda' if on_gpu else 'cpu'}_{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path, json.dumps(result["rows"]))


if __name__ == "__main__":
    main()
