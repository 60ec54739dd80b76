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
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from megatron_prune.decision.target import StructuredTarget, Target, parse_any_target, title
from megatron_prune.errors import UserError, one_line
from megatron_prune.files import write_json
from megatron_prune.foreign import read_json, strict
from megatron_prune.model import given
from megatron_prune.schema import Count, PathText, TargetText, Word

DESCRIPTION = "run.json"
RECORDS = ("decision.json", "trim.json")
"""What says whose a decision is: masks, or units that stay."""
TRAINED = "trained"
FINISHED = ("decided", TRAINED)
"""States of a run that nothing is left to do for."""


@dataclass(frozen=True)
class RunDescription:
    """What a run folder says about itself."""

    __pydantic_config__ = strict()

    input: PathText
    """The model that was pruned or trained."""
    method: Word
    """A pruning method, or `train`."""
    target: TargetText | None
    """None: trained without one."""
    state: Annotated[str, Field(pattern="^(learning|searching|decided|training|trained)$")]
    """`learning` or `decided`; of recovery training `training` or `trained`."""
    asked: TargetText | None = None
    """The target as it was given, where that leaves weights dense which the run chose."""
    launch: Word | None = None
    """The launch that began or finished the run, as `backend.launch` names it."""

    @property
    def kind(self) -> str:
        """What was done, in words."""
        return " ".join(filter(None, (self.method, self.target and one_line(title(self.target)))))


class Step(TypedDict):
    """What is read of a file that says how far a run is."""

    step: Count


class Decided(TypedDict):
    """What is read of a decision to know whose it is."""

    method: Word
    target: TargetText


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of `prune` or `train`."""
    return (folder / DESCRIPTION).is_file()


def write_run(folder: Path, description: RunDescription) -> None:
    """Record what a run is; atomic."""
    write_json(folder / DESCRIPTION, asdict(description))


def read_run(folder: Path) -> RunDescription:
    """The description of a run; UserError when `folder` is none."""
    if not is_run(folder):
        raise given.wrong(folder, "run")
    found: RunDescription = read_json(folder / DESCRIPTION, "a pruning run", RunDescription)
    return found


def target_of(run: Path) -> Target | StructuredTarget | None:
    """What a run has made of a model; None: trained it without a target."""
    found = read_run(run).target
    return None if found is None else parse_any_target(found)


def latest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, as the run has noted it; None while there is none."""
    file = folder / "checkpoints" / "latest.json"
    return read_json(file, "a run", Step)["step"] if file.is_file() else None


def decision_of(folder: Path) -> Path:
    """The decision of a run (or the folder itself when it is a decision); UserError while there is none yet."""
    if any((folder / name).is_file() for name in RECORDS):
        return folder
    if not is_run(folder):
        raise given.wrong(folder, "decision")
    description = read_run(folder)
    if description.method == "train":
        raise UserError(f"run {folder} has trained weights and decided nothing: give {folder / 'weights'}")
    if description.state != "decided":
        raise UserError(
            f"run {folder} has no decision yet (its {description.method} run has not finished): finish it with "
            "prune --resume"
        )
    decision = folder / "decision"
    for file in (decision / name for name in RECORDS if (decision / name).is_file()):
        _check_same(folder, description, file)
    return decision


def _check_same(folder: Path, run: RunDescription, file: Path) -> None:
    """UserError when a decision in a run folder is another run's."""
    found: Decided = read_json(file, "a pruning decision", Decided)
    same = found["method"] == run.method and parse_any_target(found["target"]) == parse_any_target(run.target)
    if not same:
        raise UserError(
            f"run {folder} contradicts itself: {DESCRIPTION} says {run.kind}, decision/{file.name} "
            f"{found['method']} {found['target']}: copy the run again, or prune again"
        )


def trained_model(path: Path) -> Path:
    """Where the model of a run of `train` is; anything else is where it is."""
    return weights_of(path) if is_run(path) and read_run(path).method == "train" else path


def weights_of(folder: Path) -> Path:
    """The model whose weights a run's masks apply to, or that it has trained; UserError while it trains."""
    weights = folder / "weights"
    if read_run(folder).state == "training":
        raise UserError(f"run {folder} has not finished training: finish it with train --resume")
    return weights if weights.is_dir() else Path(read_run(folder).input)
