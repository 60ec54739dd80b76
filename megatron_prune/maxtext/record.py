"""What a run on TPUs tells: the files that every run folder has, so that `report` and TensorBoard read it.

run.json            what was asked; `state` says whether it is done
config.yaml         the options; environment.json versions and devices
metrics.jsonl       a line a step; TensorBoard events are in tensorboard/

Written by the first host. A run that goes on forgets what was written about steps after its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_prune.decision.run_folder import RunDescription, write_run
from megatron_prune.files import write_json, write_text
from megatron_prune.foreign import parse_json
from megatron_prune.maxtext.model import replaced
from megatron_prune.options import Options, save_yaml

METRICS = "metrics.jsonl"
PACKAGES = ("jax", "jaxlib", "libtpu", "maxtext", "flax", "optax", "orbax-checkpoint", "numpy")
MAXTEXTS = {
    "loss": "learning/loss",
    "grad_norm": "learning/grad_norm",
    "learning_rate": "learning/current_learning_rate",
    "tokens_per_s_per_device": "perf/per_device_tokens_per_sec",
    "seconds": "perf/step_time_seconds",
}
"""Our name of a number that MaxText's trainer tells, and its name there."""


class RunRecord:
    """The files of one run folder; on other hosts than the first nothing is written."""

    def __init__(self, folder: Path, description: RunDescription, config: Options, done: int) -> None:
        """`done`: steps of the checkpoint that the run goes on from."""
        import jax

        self.folder = folder
        self.description = description
        self.steps = int(getattr(config, "steps", 0))
        self._events: Any = None
        self._speaks = jax.process_index() == 0
        if not self._speaks:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, description)
        save_yaml(config, folder / "config.yaml")
        write_json(folder / "environment.json", _environment())
        forget_after(folder, done)

        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """A step that is done, counted from 1."""
        if not self._speaks:
            return
        record = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        for key, value in numbers.items():
            self._events.add_scalar(key, value, step)
        print(
            f"step {step}/{self.steps} " + " ".join(f"{key} {value:.4g}" for key, value in numbers.items()), flush=True
        )

    def close(self, state: str) -> None:
        """The end, for now; `state` is that of `RunDescription`."""
        if self._speaks:
            self._events.close()
            write_run(self.folder, RunDescription(**(vars(self.description) | {"state": state})))


def forget_after(folder: Path, done: int) -> None:
    """Leave the metrics of the first `done` steps, and no line without its end."""
    file = folder / METRICS
    if file.is_file():
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        records = [parse_json(line.encode(), str(file), dict[str, Any], "remove it") for line in lines]
        kept = [line for line, record in zip(lines, records, strict=True) if record["step"] <= done]
        write_text(file, "".join(line + "\n" for line in kept))


@contextmanager
def watched(
    write: Callable[[int, Mapping[str, float]], None], weighted: Mapping[str, tuple[str, float]]
) -> Iterator[None]:
    """While active, what MaxText's trainer finds in a step is handed to `write`; its own lines are left out.

    `weighted`: our name of a number -> that of MaxText, and what it is times there.
    """
    from absl import logging
    from maxtext.common.metric_logger import MetricLogger

    numbers = {name: (theirs, 1.0) for name, theirs in MAXTEXTS.items()} | dict(weighted)
    usual = MetricLogger.write_metrics

    def write_metrics(self: Any, metrics: Any, step: int, metric_type: str = "train") -> None:
        if metrics and metric_type == "train":
            found = metrics["scalar"]
            told = {ours: float(found[key]) / times for ours, (key, times) in numbers.items() if key in found}
            write(step + 1, told)
        usual(self, metrics, step, metric_type)

    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with replaced(MetricLogger, "write_metrics", write_metrics):
            yield
    finally:
        logging.set_verbosity(before)


def _environment() -> dict[str, Any]:
    import jax

    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ImportError:
            continue
    devices = [f"{device.device_kind} {device.platform}" for device in jax.devices()]
    about = {"python": platform.python_version(), "packages": found, "devices": devices}
    return about | {"processes": jax.process_count(), "platform": f"{sys.platform} {platform.machine()}"}
