"""What a path holds that a verb cannot take, in words, and the next step: the one place that every refusal asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prune.data.text import SUFFIXES
from megatron_prune.errors import UserError, shown

Wanted = Literal["checkpoint", "hugging face", "model", "run", "decision", "ours", "reported"]
"""What a verb needs: a Megatron checkpoint, a Hugging Face directory, either of them, a run folder, a decision; what
`inspect` shows, what `report` does.
"""
_NEEDED: Mapping[Wanted, str] = {
    "checkpoint": "a Megatron checkpoint is needed",
    "hugging face": "a Hugging Face directory with config.json and *.safetensors is needed",
    "model": "a Megatron checkpoint or a Hugging Face directory is needed",
    "run": "a run folder of prune or train is needed",
    "decision": "a run folder of prune, or its decision, is needed",
    "ours": "a Megatron checkpoint, a run folder, a decision, a mask .npz or a Hugging Face directory is needed",
    "reported": "run folders, Megatron checkpoints, Hugging Face directories and results of verbs (JSON) are needed",
}
_FALLBACK: Mapping[Wanted, str] = {
    "checkpoint": "import makes one from a Hugging Face model, trim one from a run",
    "hugging face": "give a directory that save_pretrained or export has written, or a hub id",
    "model": "give what import, trim, export or save_pretrained has written",
    "run": "give the --output of prune or train",
    "decision": "give the --output of prune",
    "ours": "give what import, prune, train, trim or export has written",
    "reported": "give what verbs have written with --output",
}


@dataclass(frozen=True)
class Kind:
    """Something that a path may hold."""

    name: str
    holds: Callable[[Path], bool]
    steps: Mapping[Wanted, str]
    """What to do with it where something else is wanted; {path} and {above} stand for it and its folder."""
    otherwise: str | None = None
    """The step for what is not in `steps`."""


def has(*names: str) -> Callable[[Path], bool]:
    """Whether one of these files is in the folder."""
    return lambda path: any(os.path.isfile(path / name) for name in names)


def ends(*suffixes: str) -> Callable[[Path], bool]:
    """Whether the path is a file with such an end, or a folder that holds one."""
    return lambda path: (
        (os.path.isfile(path) and path.name.endswith(suffixes))
        or (os.path.isdir(path) and any(name.endswith(suffixes) for name in os.listdir(path)))
    )


def is_file(*suffixes: str) -> Callable[[Path], bool]:
    """Whether the path is a file with such an end."""
    return lambda path: os.path.isfile(path) and path.name.endswith(suffixes)


_PRUNE = "prune it first, and give the run"
_PRUNE_IT: Mapping[Wanted, str] = {"run": _PRUNE, "decision": _PRUNE}
_TRIM = "trim --input {path} --output CHECKPOINT first, and give that checkpoint"
_OF_A_RUN = "trim the run that it is of, {above}, and give that checkpoint"
KINDS = (
    Kind(
        "a run folder",
        has("run.json"),
        {"checkpoint": _TRIM, "model": _TRIM, "hugging face": _TRIM + ", or what export makes of it"},
    ),
    Kind(
        "the decision of a run",
        has("decision.json", "trim.json"),
        {"checkpoint": _OF_A_RUN, "model": _OF_A_RUN, "hugging face": _OF_A_RUN, "run": "give its run, {above}"},
    ),
    Kind(
        "a Megatron checkpoint",
        has("megatron_prune.json"),
        {
            "hugging face": "export --input {path} --output DIRECTORY makes one; prune and train take it as it is",
            "run": "nothing is left to trim in it: give it to export, or prune it first",
            "decision": _PRUNE,
        },
    ),
    Kind(
        "a training state of a run",
        lambda path: path.parent.name == "checkpoints" and path.name.startswith("step_"),
        {},
        "finish its run with --resume, and give the run to trim",
    ),
    Kind(
        "a model for MaxText",
        has("megatron_prune_maxtext.json"),
        {},
        "give the checkpoint or the run that it was exported from",
    ),
    Kind("a checkpoint of fms", has("fms_config.json"), _PRUNE_IT, "import --input {path} makes a checkpoint of it"),
    Kind(
        "a Hugging Face directory",
        has("config.json"),
        {"checkpoint": "import makes one: import --input {path} --output CHECKPOINT", **_PRUNE_IT},
    ),
    Kind(
        "an adapter without its model",
        has("adapter_config.json"),
        {},
        "merge it: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW_DIR)",
    ),
    Kind("in GGUF, which is quantised", ends(".gguf"), {}, "give the Hugging Face directory that it was made from"),
    Kind(
        "a repository of the hub's cache",
        lambda path: os.path.isdir(path / "snapshots") and os.path.isdir(path / "blobs"),
        {},
        "give a folder in {path}/snapshots",
    ),
    Kind(
        "the form of the model's authors",
        lambda path: has("params.json")(path) and ends(".pth", "consolidated.safetensors")(path),
        {},
        "give the repository's Hugging Face form, or convert it with transformers' script for the model",
    ),
    Kind(
        "a checkpoint of Megatron-LM or NeMo",
        lambda path: has("latest_checkpointed_iteration.txt", ".metadata")(path) or ends(".nemo")(path),
        {},
        "convert it to a Hugging Face directory with the tools that it comes from",
    ),
    Kind("preprocessed text", lambda path: is_file(".idx")(path) or _is_prefix(path), {}, "give it to --data"),
    Kind("a mask file", is_file(".npz"), {}, "give it to import --mask, or to prune --prior"),
    Kind("text", is_file(*SUFFIXES), {}, "give it to --data or --calibration"),
    Kind("a tokenizer without a model", has("tokenizer.json", "tokenizer.model", "tokenizer_config.json"), {}),
    Kind("a folder without a config.json", ends(".safetensors"), {}, "fetch the whole model again"),
    Kind("a folder of pickle files", ends(".bin", ".pt", ".pth"), {}, "fetch the whole model, as safetensors, again"),
    Kind("an empty folder", lambda path: os.path.isdir(path) and not os.listdir(path), {}),
    Kind("a file", os.path.isfile, {}),
    Kind("no ordinary file", lambda path: not os.path.isdir(path) and not os.path.isfile(path), {}),
)
"""From the plainest sign on: the first that holds is the answer."""


def _is_prefix(path: Path) -> bool:
    return all(os.path.isfile(str(path) + suffix) for suffix in (".bin", ".idx"))


def wrong(path: Path, wanted: Wanted) -> UserError:
    """The error of a verb that needs something else than what is at `path`: what that is, and what to do with it."""
    if not os.path.lexists(path) and not _is_prefix(path):
        return UserError(f"{shown(str(path))} does not exist; {_NEEDED[wanted]}: {_FALLBACK[wanted]}")
    what, step = "something else", _FALLBACK[wanted]
    kind = next((kind for kind in KINDS if kind.holds(path)), None)
    if kind is not None:
        what, step = kind.name, kind.steps.get(wanted) or kind.otherwise or step
    where, above = shown(str(path)), shown(str(path.parent))
    return UserError(f"{where} is {what} and {_NEEDED[wanted]}: {step.format(path=where, above=above)}")
