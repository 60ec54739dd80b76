"""A pruning run on disk, and what later verbs need to know of it.

run.json           what was asked: checkpoint, method, target; `state` is "learning" until the decision is there
config.yaml        the merged configuration; environment.json versions and hardware
decision/          the masks, or the units that stay
weights/           a Megatron checkpoint: the weights, where a method compensated them or `train` trained them; after
                   `train --engine fsdp` a Hugging Face directory
checkpoints/       resumable state of what is trained; metrics.jsonl and TensorBoard events beside it
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_prune.errors import UserError
from megatron_prune.files import read_json, write_json

DESCRIPTION = "run.json"
TRAINED = "trained"
FINISHED = ("decided", TRAINED)
"""States of a run that nothing is left to do for."""


@dataclass(frozen=True)
class RunDescription:
    """What a run folder says about itself."""

    input: str
    """The model that was pruned or trained."""
    method: str
    """A pruning method, or `train`."""
    target: str | None
    """None: trained without one."""
    state: str
    """`learning` or `decided`; of recovery training `training` or `trained`."""
    launch: str | None = None
    """The launch that began or finished the run, as `backend.launch` names it."""

    @property
    def kind(self) -> str:
        """What was done, in words."""
        return " ".join(filter(None, (self.method, self.target)))


def write_run(folder: Path, description: RunDescription) -> None:
    """Record what a run is; atomic."""
    write_json(folder / DESCRIPTION, asdict(description))


def read_run(folder: Path) -> RunDescription:
    """The description of a run; UserError when `folder` is none."""
    if not folder.is_dir():
        raise UserError(f"run {folder} does not exist; give a folder written by prune")
    return RunDescription(**read_json(folder / DESCRIPTION, "a pruning run"))


def decision_of(folder: Path) -> Path:
    """The decision of a run (or the folder itself when it is a decision); UserError while there is none yet."""
    if (folder / "decision.json").is_file() or (folder / "trim.json").is_file():
        return folder
    description = read_run(folder)
    if description.method == "train":
        raise UserError(f"run {folder} has trained weights and decided nothing: give {folder / 'weights'}")
    if description.state != "decided":
        raise UserError(
            f"run {folder} has no decision yet (its {description.method} run has not finished): finish it with "
            "prune --resume"
        )
    return folder / "decision"


def weights_of(folder: Path) -> Path:
    """The model whose weights a run's masks apply to, or that it has trained; UserError while it trains."""
    weights = folder / "weights"
    if read_run(folder).state == "training":
        raise UserError(f"run {folder} has not finished training: finish it with train --resume")
    return weights if weights.is_dir() else Path(read_run(folder).input)
