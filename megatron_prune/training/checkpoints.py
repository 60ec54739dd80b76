"""The training checkpoints of a run: written whole or not at all, the last few kept, the newest good one found again.

    checkpoints/step_0000200/    the state after 200 optimizer steps
        checkpoint.json            step, samples seen, seed and shape of a step
        metrics.jsonl              the run's metrics until then
        common.pt __0_0.distcp ..  megatron-core's distributed checkpoint (torch_dist), any layout reads it
        checksums.json             CRC-32 of every file above
        manifest.json              size of every file above; written last
    checkpoints/latest.json      {"step": 200}; written after the folder has its name

A folder is written as `step_0000200.partial`. One that turns out to be damaged is renamed `step_0000200.damaged` and
goes when a new checkpoint is there.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_prune.backend as backend
from megatron_prune.decision.run_folder import Step
from megatron_prune.errors import UserError
from megatron_prune.files import abandon_folder, begin_folder, publish_folder, write_json
from megatron_prune.foreign import read_json
from megatron_prune.log import METRICS, say
from megatron_prune.model.checkpoint import ShardedSave, damage_of, write_manifest
from megatron_prune.ranks import by_leader, from_leader

LATEST = "latest.json"
DESCRIPTION = "checkpoint.json"
DAMAGED = ".damaged"


class Checkpoints:
    """The checkpoints of the run in `run`, of which `keep` stay; every method is collective but `busy`."""

    def __init__(self, run: Path, keep: int, in_background: bool, save: type[ShardedSave] = ShardedSave) -> None:
        """`save`: how a sharded state is written."""
        self.folder = run / "checkpoints"
        self.keep = keep
        self.in_background = in_background
        self.sharded_save = save
        self._pending: tuple[ShardedSave, Path] | None = None

    def save(self, about: dict[str, Any], state: dict[str, Any]) -> None:
        """Write a sharded state after `about["step"]` steps; in the background it is complete after `finish`."""
        self.finish()
        path = self.folder / f"step_{about['step']:07d}"
        if from_leader(path.exists()):
            return
        partial = begin_folder(path)
        try:
            save = self.sharded_save(partial, state, self.in_background)
            by_leader(lambda: self._describe(partial, about))
        except BaseException:
            abandon_folder(path)
            raise
        self._pending = (save, path)
        if not self.in_background:
            self.finish()

    def _describe(self, partial: Path, about: dict[str, Any]) -> None:
        """What the state belongs to; the metrics so far, too, so that a run that goes on has them to the bit."""
        write_json(partial / DESCRIPTION, about)
        metrics = self.folder.parent / METRICS
        if metrics.is_file():
            shutil.copyfile(metrics, partial / METRICS)

    def busy(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._pending is not None and self._pending[0].busy()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and publish it; UserError when it could not be."""
        if self._pending is None:
            return
        (save, path), self._pending = self._pending, None
        try:
            save.finish()
            by_leader(lambda: write_manifest(save.folder))
        except UserError:
            abandon_folder(path)
            raise
        publish_folder(path)
        by_leader(lambda: write_json(self.folder / LATEST, {"step": int(path.name[5:])}))
        if backend.rank() == 0:
            self._remove_old()
        dist.barrier()

    def _remove_old(self) -> None:
        kept = {LATEST, *(path.name for path in complete(self.folder)[: self.keep])}
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)  # what another program holds open goes with a later one

    def newest(self) -> Path | None:
        """The newest good checkpoint, None when there is none yet; damaged ones are named and set aside.

        UserError when there are checkpoints and all are damaged.
        """
        path, damaged = find_newest(self.folder)
        for bad in damaged:
            if backend.rank() == 0:
                shutil.rmtree(bad.with_name(bad.name + DAMAGED), ignore_errors=True)
                bad.rename(bad.with_name(bad.name + DAMAGED))
        if path is not None:  # a run may have died behind a checkpoint and before its pointer
            by_leader(lambda: write_json(self.folder / LATEST, {"step": _step(path)}))
        dist.barrier()
        return path


def complete(folder: Path) -> list[Path]:
    """The checkpoints below `folder` that were written to the end, newest first."""
    found = folder.glob("step_*") if folder.is_dir() else []
    return sorted((path for path in found if re.fullmatch(r"step_\d{7,}", path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def find_newest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest good checkpoint below `folder`, and the damaged ones above it, each told. Collective.

    All ranks get the same answer. UserError when there are checkpoints and none is good.
    """
    damaged: list[Path] = []
    told: list[str] = []
    for path in from_leader(complete(folder)):
        damage = damage_of(path) or from_leader(_misdescribed(path))
        if not damage:
            return path, damaged
        damaged.append(path)
        told.append(f"checkpoint {path} is damaged ({'; '.join(damage)})")
        say(f"{told[-1]}: it is not used")
    if told:
        raise UserError(f"{told[0]}, and no other checkpoint in {folder} is good: begin a new run")
    return None, damaged


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself; all but the step is there to be compared."""
    file, what = path / DESCRIPTION, "a training checkpoint"
    step = read_json(file, what, Step)["step"]
    if step != _step(path):
        raise UserError(f"{file}: key 'step': {step} given and the folder is {path.name}; restore it")
    return {**read_json(file, what), "step": step}


def _misdescribed(path: Path) -> list[str]:
    try:
        read_about(path)
    except UserError as error:
        return [str(error)]
    return []
