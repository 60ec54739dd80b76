"""What a method that learns masks asks for: logits on every linear, a start, optimizer steps, a decision.

`LearningRunner` owns the run folder of such a method: metrics, checkpoints, resume and the final masks. A resumed run
needs no generator state (noise and data are functions of the step) and may continue in another layout.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.apply.decision import MaskWriter
from megatron_prune.config import Training
from megatron_prune.errors import UserError
from megatron_prune.files import new_folder, read_json, write_json
from megatron_prune.kernels import gumbel
from megatron_prune.kernels.philox import gumbel_noise
from megatron_prune.log import MetricsLog
from megatron_prune.methods.base import Kept
from megatron_prune.model import convert
from megatron_prune.model.checkpoint import check_manifest, load_sharded, metadata, save_sharded, write_manifest
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import LocalLinear, PrunableModel
from megatron_prune.training.loop import Samples, StepResult, Trainer

LATEST = "latest.json"
KEPT_CHECKPOINTS = 2
INITIAL_STEP = 2**32 - 1
"""Step number under which a random start is drawn: no training step has it."""
EULER_GAMMA = 0.5772156649015329

MaskSource = Callable[[str], Tensor]
"""Hugging Face weight name -> bool mask `[out, in]`."""


class LearningRunner:
    """Learns mask logits in `folder`; `prior` and `initial_logits` say where learning starts."""

    def __init__(
        self,
        model: PrunableModel,
        training: Training,
        data: Samples,
        folder: Path,
        *,
        writer: Callable[[], MaskWriter | None],
        log: MetricsLog,
        prior: MaskSource | None = None,
        initial_logits: Path | None = None,
        eval_windows: Tensor | None = None,
        resume: bool = False,
    ) -> None:
        self.model = model
        self.training = training
        self.data = data
        self.folder = folder
        self.writer = writer
        self.log = log
        self.prior = prior
        self.initial_logits = initial_logits
        self.eval_windows = eval_windows
        self.resume = resume
        self.draw: MaskDraw | None = None
        self.microbatches = 1
        self.weights_trained = False
        self.start: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def learn_masks(self, n: int, m: int, hard: bool, train_weights: bool) -> MaskDraw:
        """Give every prunable linear mask logits and freeze everything else (but the weights, on request)."""
        for parameter in self.model.model.parameters():
            parameter.requires_grad_(False)
        self.weights_trained = train_weights
        self.draw = MaskDraw(n, m, seed=self.training.seed, hard=hard)
        self.model.learn_masks(self.draw)
        for linear in self.model.linears():
            linear.module.weight.requires_grad_(train_weights)
        return self.draw

    @torch.no_grad()
    def start_logits(self, from_mask: Callable[[Tensor], Tensor], std: float) -> None:
        """Fill the logits: from an earlier run, from the prior mask through `from_mask`, or with noise of `std`."""
        assert self.draw is not None
        if self.initial_logits is not None:
            self._load_logits(self.initial_logits)
        for linear in self.model.linears():
            logits = linear.module.mask_logits
            if self.initial_logits is None and self.prior is not None:
                masks = [self.prior(name) for name in linear.map.hf]
                whole = convert.merge(linear.map, masks, self.model.config)
                logits.copy_(from_mask(self.model.shard(linear.map, whole).to(logits.device)))
            elif self.initial_logits is None:
                logits.copy_(std * self._noise(linear))
            self.start[linear.name] = gumbel.winners(logits)
            self.last[linear.name] = self.start[linear.name]

    def _noise(self, linear: LocalLinear) -> Tensor:
        """Noise of mean 0 and variance 1 for a start without a prior, the same in every layout."""
        module, position = linear.module, linear.module.position
        assert position is not None
        _rows, groups, count = module.mask_logits.shape
        columns = position.first_group + torch.arange(groups)
        index = position.row_ids[:, None].cpu() * position.groups_per_row + columns
        key = gumbel.Draw(self.training.seed, INITIAL_STEP, 0, linear.tensor_id).key()
        noise = gumbel_noise(index, count, key).to(module.mask_logits.device)
        return (noise - EULER_GAMMA) / (math.pi / math.sqrt(6.0))

    def optimize(self, multipliers: dict[str, float], on_step: Callable[[int, int], dict[str, float]]) -> None:
        """Run the optimizer steps that are left, logging, saving and evaluating at their intervals."""
        draw = self.draw
        assert draw is not None

        def on_microbatch(step: int, number: int) -> None:
            draw.step, draw.microbatch = step, number

        trainer = Trainer(self.model, self.training, self.data, multipliers, on_microbatch)
        self.microbatches = trainer.microbatches
        first = self._resume(trainer) if self.resume else 0
        self.log.resume_at(first)
        if first == 0:
            self._evaluate(trainer, 0)
        steps = self.training.train_iters
        for step in range(first, steps):
            values = on_step(step, steps)
            began = time.perf_counter()
            result = trainer.step(step)
            seconds = time.perf_counter() - began
            done = step + 1
            if done % self.training.log_interval == 0 or done == steps:
                self._log_step(step, steps, result, values, seconds)
            if done % self.training.eval_interval == 0 or done == steps:
                self._evaluate(trainer, done)
            if done % self.training.save_interval == 0 or done == steps:
                self._save(trainer, done)

    def _log_step(self, step: int, steps: int, result: StepResult, values: dict[str, float], seconds: float) -> None:
        record = {
            "step": step + 1,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rates.get("mask_logits", 0.0),
            "tokens": result.tokens * (step + 1),
            "tokens_per_s": result.tokens / seconds,
            "step_s": seconds,
            **values,
            **self._mask_statistics(),
        }
        self.log.write(record, total=steps)

    @torch.no_grad()
    def _mask_statistics(self) -> dict[str, float]:
        """Over all groups: mean best probability, share changed since the last look and since the start."""
        assert self.draw is not None
        sums = torch.zeros(4, dtype=torch.float64, device=backend.device())
        for linear in self.model.linears():
            logits, position = linear.module.mask_logits, linear.module.position
            assert position is not None
            now = gumbel.winners(logits)
            best = gumbel.statistics(
                logits,
                linear.module.weight,
                n=self.draw.n,
                m=self.draw.m,
                scale=self.draw.scale,
                temperature=self.draw.temperature,
                draw=None,
                position=position,
            )["sum_max_probability"]
            sums += torch.tensor(
                [
                    float(best),
                    float((now != self.last[linear.name]).sum()),
                    float((now != self.start[linear.name]).sum()),
                    float(now.numel()),
                ],
                dtype=torch.float64,
                device=sums.device,
            )
            self.last[linear.name] = now
        dist.all_reduce(sums)
        return {
            "max_probability": float(sums[0] / sums[3]),
            "changed_fraction": float(sums[1] / sums[3]),
            "differs_from_start_fraction": float(sums[2] / sums[3]),
        }

    def _evaluate(self, trainer: Trainer, done: int) -> None:
        """Held-out loss with every group's best pattern."""
        if self.eval_windows is None:
            return
        assert self.draw is not None
        self.draw.decoded = True
        loss = trainer.evaluate(self.eval_windows)
        self.draw.decoded = False
        self.log.write({"step": done, "eval_loss": loss, "eval_windows": int(self.eval_windows.shape[0])})

    def checkpoint_folder(self, step: int) -> Path:
        """Where the state after `step` optimizer steps lies."""
        return self.folder / "checkpoints" / f"step_{step:07d}"

    def _save(self, trainer: Trainer, step: int) -> None:
        """Write a checkpoint, point to it, and remove those that are no longer needed."""
        path = self.checkpoint_folder(step)
        if path.exists():
            return
        with new_folder(path) as folder:
            state = {**trainer.state(is_loading=False), "step": step}
            save_sharded(folder, state)
            if backend.rank() == 0:
                write_manifest(folder)
        if backend.rank() == 0:
            write_json(self.folder / "checkpoints" / LATEST, {"step": step})
            for old in sorted((self.folder / "checkpoints").glob("step_???????"))[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        dist.barrier()

    def _resume(self, trainer: Trainer) -> int:
        """Load the newest checkpoint of this run; the number of steps it has done, 0 without one."""
        pointer = self.folder / "checkpoints" / LATEST
        if not pointer.exists():
            return 0
        path = self.checkpoint_folder(int(read_json(pointer, "a pruning run")["step"]))
        check_manifest(path)
        state = load_sharded(path, {**trainer.state(is_loading=True), "step": 0})
        trainer.load_state(state)
        for linear in self.model.linears():
            self.last[linear.name] = gumbel.winners(linear.module.mask_logits)
        return int(state["step"])

    def _load_logits(self, run: Path) -> None:
        """Take the mask logits of another run's newest checkpoint (transfer)."""
        pointer = run / "checkpoints" / LATEST
        if not pointer.exists():
            raise UserError(
                f"{run} was given as the start and has no checkpoints; give a run of a method that learns, or its mask "
                "with --prior"
            )
        path = run / "checkpoints" / f"step_{int(read_json(pointer, 'a pruning run')['step']):07d}"
        check_manifest(path)
        everything = self.model.model.sharded_state_dict(metadata=metadata())
        wanted = {key: value for key, value in everything.items() if key.endswith("mask_logits")}
        state = load_sharded(path, {"model": wanted})
        self.model.model.load_state_dict(state["model"], strict=False)

    @torch.no_grad()
    def keep(self, decide: Callable[[Tensor], Tensor]) -> Kept:
        """Decode every linear's logits and write the masks. Collective."""
        here = {linear.name: linear for linear in self.model.linears()}
        writer = self.writer()
        kept = size = 0
        for layer in range(self.model.config.num_layers):
            masks: dict[str, Tensor] = {}
            for map in self.model.maps:
                if map.layer != layer or not map.prunable:
                    continue
                local = decide(here[map.megatron].module.mask_logits) if map.megatron in here else None
                mask = self.model.gather(map, None if local is None else local.to(torch.uint8)).bool()
                kept, size = kept + int(mask.sum()), size + mask.numel()
                masks.update(zip(map.hf, convert.split(map, mask, self.model.config), strict=True))
            if writer is not None:
                writer.add_layer(layer, masks)
        if writer is not None:
            writer.close()
        return Kept(kept, size)
