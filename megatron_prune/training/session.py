"""The optimizer steps of one run folder: metrics, held-out loss, checkpoints, stopping and resuming.

What is trained, and towards what, is the subclass's: `learning.LearningRunner` learns masks, `recovery.RecoveryRunner`
trains weights, `shearing.ShearingRunner` both. A resumed run needs no generator state (noise and data are functions of
the step, and of the shares of domains where these change) and may continue in another layout.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch.distributed as dist
from torch import Tensor

from megatron_prune.data.domains import DomainWindows
from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import fenced
from megatron_prune.log import MetricsLog, device_names, say
from megatron_prune.model.checkpoint import ShardedSave, load_sharded
from megatron_prune.model.families import ModelConfig
from megatron_prune.option_groups import Training
from megatron_prune.training.checkpoints import Checkpoints, read_about
from megatron_prune.training.loop import Samples, StepResult, Steps
from megatron_prune.training.stopping import REASONS, Stopped, StopRequest, largest
from megatron_prune.training.throughput import GIB, flops_per_token, known_peak_tflops, peak_memory, speed

SHOWN = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "peak_memory_gib")
"""Metrics of a step on the console; metrics.jsonl and TensorBoard have all."""


class Configured(Protocol):
    """A model, in whatever form it is trained."""

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""


class TrainingSession:
    """Takes the steps that are left of the run in `folder`; subclasses say what else is measured and checked."""

    trained = "weights"
    """Parameter group whose learning rate is logged."""
    sharded_save: type[ShardedSave] = ShardedSave
    """How a checkpoint's state is written, and read again:"""
    sharded_load = staticmethod(load_sharded)

    def __init__(
        self,
        model: Configured,
        training: Training,
        data: Samples,
        folder: Path,
        *,
        log: MetricsLog,
        eval_windows: Tensor | None = None,
        resume: bool = False,
        stop: StopRequest | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        """`identity`: plain values that a resumed run must share with the one that wrote its checkpoint."""
        self.identity = identity or {}
        self.model = model
        self.training = training
        self.data = data
        self.folder = folder
        self.log = log
        self.eval_windows = eval_windows
        self.resume = resume
        self.stop = stop or StopRequest()
        self.checkpoints = Checkpoints(folder, training.keep_checkpoints, training.async_save, self.sharded_save)
        self.flops = flops_per_token(model.config, training.seq_length)
        self.peak_tflops = training.peak_tflops or known_peak_tflops(device_names()[0], model.config.dtype)
        self.restored: Path | None = None
        """The checkpoint that the run goes on from."""
        self.step_times: list[float] = []
        """Seconds of the steps since the last line of metrics."""

    def measure(self) -> dict[str, float]:
        """Metrics of the subclass, for a step that is logged. Collective."""
        return {}

    def held_out_loss(self, trainer: Steps, windows: Tensor) -> float:
        """Mean next-token loss over held-out windows `[n, seq_length]`. Collective."""
        return trainer.evaluate(windows)

    def domain_loss(self, trainer: Steps, windows: Tensor) -> float:
        """Mean next-token loss by which a domain gets its share. Collective."""
        return self.held_out_loss(trainer, windows)

    def check_state(self, when: str) -> dict[str, float]:
        """Called before a state is saved and after one was loaded; UserError when it must not be used.

        Returns what to log. Collective.
        """
        return {}

    def take_steps(self, trainer: Steps, on_step: Callable[[int, int], dict[str, float]]) -> None:
        """Run the optimizer steps that are left, logging, saving and evaluating at their intervals.

        `on_step(step, steps)` is called before each, and returns what to log with it. Raises Stopped.
        """
        first = self._resume(trainer) if self.resume else 0
        self.log.resume_at(first, self.restored)
        if first == 0:
            self._evaluate(trainer, 0)
        with self.stop, self.log.steps(self.training.train_iters):
            try:
                for step in range(first, self.training.train_iters):
                    self._step(trainer, step, on_step)
            except UserError:  # all ranks raise it: what is being written is still good
                self.checkpoints.finish()
                raise

    def _step(self, trainer: Steps, step: int, on_step: Callable[[int, int], dict[str, float]]) -> None:
        steps, done = self.training.train_iters, step + 1
        values = on_step(step, steps)
        began = time.perf_counter()
        result = trainer.step(step)
        self.step_times.append(time.perf_counter() - began)
        if done % self.training.log_interval == 0 or done == steps:
            self._log_step(done, result, values)
        if done % self.training.eval_interval == 0 or done == steps:
            self._evaluate(trainer, done)
        self._mix_domains(trainer, done)
        self._save_or_stop(trainer, done)

    def _mix_domains(self, trainer: Steps, done: int) -> None:
        """Change the shares of the data's domains when it is time; before the checkpoint, which has them."""
        data = self.data
        if not isinstance(data, DomainWindows) or done % data.interval or done == self.training.train_iters:
            return
        record = data.update(done, [self.domain_loss(trainer, domain.held_out) for domain in data.domains])
        self.log.write({"step": done, **record}, [key for key in record if key.startswith("domain_weight/")])

    def _data_state(self) -> dict[str, Any]:
        """Of data that are no function of the step alone."""
        return {"domains": self.data.state()} if isinstance(self.data, DomainWindows) else {}

    def _save_or_stop(self, trainer: Steps, done: int) -> None:
        """Save when it is time; Stopped, after saving, when any rank was asked to end before the last step."""
        last = done == self.training.train_iters
        reason, busy = largest(self.stop.code(), self.checkpoints.busy())
        if not busy:
            self.checkpoints.finish()
        if reason or last or done % self.training.save_interval == 0:
            checked = self.check_state(f"after step {done}")
            if checked:
                self.log.write({"step": done, **checked})
            self.log.sync()
            state = {**trainer.state(is_loading=False), **self._data_state(), "step": done}
            self.checkpoints.save(self._about(done), state)
        if reason or last:
            self.checkpoints.finish()
        if reason and not last:
            raise Stopped(f"{REASONS[reason]}: saved after step {done} of {self.training.train_iters}")

    def _about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself: how far it is, and what must be the same when it is resumed."""
        t = self.training
        return {
            "step": step,
            "samples": step * t.global_batch_size,
            "seed": t.seed,
            "seq_length": t.seq_length,
            "global_batch_size": t.global_batch_size,
            "micro_batch_size": t.micro_batch_size,
            "train_iters": t.train_iters,
            **self.identity,
        }

    def _log_step(self, done: int, result: StepResult, values: dict[str, float]) -> None:
        """Write the metrics of a step; times are means over the steps since the last line. Collective."""
        seconds, count = sum(self.step_times), len(self.step_times)
        self.step_times = []
        record = {
            "step": done,
            "loss": result.loss,
            **result.parts,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rates.get(self.trained, 0.0),
            "tokens": result.tokens * done,
            **speed(result.tokens * count, seconds, self.flops, dist.get_world_size(), self.peak_tflops),
            "step_s": seconds / count,
            "peak_memory_gib": largest(peak_memory())[0] / GIB,
            **values,
            **self.measure(),
        }
        self.log.write(record, SHOWN)

    def _evaluate(self, trainer: Steps, done: int) -> None:
        if self.eval_windows is None:
            return
        loss = self.held_out_loss(trainer, self.eval_windows)
        self.log.write({"step": done, "eval_loss": loss, "eval_windows": int(self.eval_windows.shape[0])})

    def _resume(self, trainer: Steps) -> int:
        """Load the newest good checkpoint of this run; the number of steps it has done, 0 without one."""
        path = self.checkpoints.newest()
        if path is None:
            return 0
        found = {"engine": "megatron", **read_about(path)}
        for key, given in self._about(found["step"]).items():
            if found.get(key) != given:
                raise UserError(f"--resume: {path} has {key} {found.get(key)} and {given} was given: give the same")
        done = self.load(trainer, path)
        if done != found["step"]:
            raise UserError(f"checkpoint {path} holds step {brief(done)}: it is damaged; use another checkpoint")
        self.check_state(f"in {path}")
        self.restored = path
        say(f"resumed from {path}")
        return done

    def load(self, trainer: Steps, path: Path) -> int:
        """Take over a checkpoint; the number of steps it has done. Collective."""
        state = self.sharded_load(path, {**trainer.state(is_loading=True), **self._data_state(), "step": 0})
        with fenced(f"checkpoint {path} does not fit this run", "use another checkpoint"):
            trainer.load_state(state)
            if isinstance(self.data, DomainWindows):
                self.data.load(state["domains"])
            return int(state["step"])
