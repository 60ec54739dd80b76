"""Whether a run that trains begins, goes on or is finished already.

`--resume`, `--restartable` and a launcher that starts lost processes again come together here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import psutil

import megatron_prune.backend as backend
from megatron_prune.claims import refuse_existing
from megatron_prune.decision.run_folder import FINISHED, RunDescription, read_run, write_run
from megatron_prune.errors import UserError
from megatron_prune.files import new_folder
from megatron_prune.log import METRICS, read_metrics, write_environment
from megatron_prune.options import Options, save_yaml
from megatron_prune.ranks import disk_fault, from_leader


class Resumable(Protocol):
    """What is asked of the options of a verb whose run may go on."""

    @property
    def output(self) -> Path:
        """The run folder."""

    @property
    def resume(self) -> bool:
        """Go on from the last checkpoint."""

    @property
    def restartable(self) -> bool:
        """Begin, or go on with whatever run the output holds."""


def may_go_on(config: Resumable) -> bool:
    """Whether the output may exist; where it may not and does, UserError."""
    allowed = config.resume or config.restartable or backend.restarted()
    if not allowed:
        refuse_existing(config.output)
    return allowed


def goes_on(config: Resumable) -> bool:
    """Whether the output holds the run that this process is to continue. Collective.

    Rank 0 looks: a shared file system shows a new folder on some nodes later. Without --restartable only the run of
    the launch that restarted this process will do, any other output is refused.
    """
    if config.resume:
        return True
    exists, own = from_leader((config.output.exists(), config.restartable or _of_this_launch(config.output)))
    if exists and not own:
        refuse_existing(config.output)
    return exists


def _of_this_launch(folder: Path) -> bool:
    """Whether a run was written by the launcher that started this process; jobs of other days may share its name."""
    file = folder / "run.json"
    if not file.exists() or file.stat().st_mtime < psutil.Process(os.getppid()).create_time():
        return False
    return read_run(folder).launch == backend.launch()


def finished_by_this_launch(output: Path, about: RunDescription) -> bool:
    """Whether the run that processes were restarted for is complete. Collective.

    Rank 0 looks, and says whether it was restarted: on a node that is new to the job processes are started first.
    """
    own = backend.restarted() and _of_this_launch(output)
    finished = from_leader(own and read_run(output).state in FINISHED)
    if finished:
        check_same(output, about)
    return finished


def check_same(output: Path, about: RunDescription) -> None:
    """UserError when the output holds another run than the one asked for."""
    found = read_run(output)
    if (found.input, found.method, found.asked or found.target) != (about.input, about.method, about.target):
        found = replace(found, target=found.asked or found.target)  # as it was given
        raise UserError(
            f"--resume: {output} is a {found.kind} run of {found.input}; {about.kind} of {about.input} was given: give "
            "the same, or a new --output"
        )


def check_resume(output: Path, about: RunDescription) -> None:
    """The run that is resumed must be the same one, unfinished."""
    check_same(output, about)
    if read_run(output).state in FINISHED:
        raise UserError(f"--resume: the run {output} is finished; trim or evaluate it, or give a new --output")


@contextlib.contextmanager
def begun(config: Any, about: RunDescription) -> Iterator[None]:
    """Make the run folder of `config`, or note that its run goes on, for the work in the block. Collective.

    A run that is refused before it has anything worth keeping is as if it had never been begun: its folder goes. One
    that was to go on and did not is as it was.
    """
    note, before = None, None
    if config.resume:
        note, before = note_resumption(config, config.output), _progress(config.output)
    else:
        with new_folder(config.output) as new:
            if backend.rank() == 0:
                describe(new, config, about)
    try:
        yield
    except Exception as error:
        kept = _can_go_on(config.output) or (not disk_fault(error) and bool(_steps_taken(config.output)))
        if backend.rank() == 0 and not config.resume and not kept:
            shutil.rmtree(config.output, ignore_errors=True)
        if note is not None and _progress(config.output) == before:
            note.unlink(missing_ok=True)
        raise


MADE = ("checkpoints/step_*[0-9]", "database/*.safetensors", "replacements.json", "judged.safetensors")
"""What a run goes on from: checkpoints, or parts of what a search makes first."""


def _can_go_on(run: Path) -> bool:
    """Whether a run has a checkpoint, or a part of what a search makes first."""
    return any(True for pattern in MADE for _ in run.glob(pattern))


def _progress(run: Path) -> dict[Path, int]:
    """When what a run has done was last written, in nanoseconds."""
    return {file: file.stat().st_mtime_ns for pattern in (*MADE, METRICS) for file in run.glob(pattern)}


def _steps_taken(run: Path) -> int:
    """Steps with metrics, which say where a run went wrong."""
    try:
        return sum(1 for record in read_metrics(run) if record.get("step"))
    except UserError:
        return 0


def note_resumption(config: Options, folder: Path) -> Path | None:
    """Keep what a run is resumed with: the learning rate, say, may differ from what it was begun with.

    By rank 0, which gets the file's name.
    """
    if backend.rank() != 0:
        return None
    number = len(list(folder.glob("config.resumed.*.yaml"))) + 1
    save_yaml(config, folder / f"config.resumed.{number}.yaml")
    return folder / f"config.resumed.{number}.yaml"


def describe(folder: Path, config: Options, about: RunDescription) -> None:
    """Write what a run is; its configuration and environment, too, when it begins. By one process."""
    write_run(folder, replace(about, launch=backend.launch()))
    if not (folder / "config.yaml").exists():
        save_yaml(config, folder / "config.yaml")
        write_environment(folder)
