"""What was given instead of what a verb takes is recognised and named, with the next step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.__main__ import main
from megatron_prune.decision import run_folder
from megatron_prune.decision.trimming import FILE as TRIM
from megatron_prune.maxtext import folder as maxtext
from megatron_prune.model import description, fms
from megatron_prune.model.given import KINDS, Wanted, wrong
from tests.models import byte_tokenizer, tiny_llama


def holding(*names: str) -> Callable[[Path], Path]:
    """Makes a folder with these files."""

    def make(root: Path) -> Path:
        folder = root / "given"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        folder.mkdir(exist_ok=True)
        return folder

    return make


def file(name: str, *others: str) -> Callable[[Path], Path]:
    """Makes files, and gives the first."""

    def make(root: Path) -> Path:
        for each in (name, *others):
            (root / each).write_text("x")
        return root / name

    return make


FORMS: dict[str, tuple[Callable[[Path], Path], str, dict[Wanted, str]]] = {
    "run": (holding("run.json"), "a run folder", {"checkpoint": "trim --input", "hugging face": "trim --input"}),
    "decision": (holding("decision.json"), "the decision of a run", {"checkpoint": "trim the run that it is of"}),
    "structured": (holding("trim.json"), "the decision of a run", {"model": "trim the run that it is of"}),
    "checkpoint": (
        holding("megatron_prune.json"),
        "a Megatron checkpoint",
        {"run": "nothing is left to trim", "decision": "prune it first", "hugging face": "export --input"},
    ),
    "state": (
        lambda root: holding("checkpoints/step_0000001/manifest.json")(root) / "checkpoints" / "step_0000001",
        "a training state of a run",
        {"checkpoint": "--resume", "run": "--resume"},
    ),
    "maxtext": (holding("megatron_prune_maxtext.json"), "a model for MaxText", {"checkpoint": "it was exported from"}),
    "fms": (holding("fms_config.json"), "a checkpoint of fms", {"checkpoint": "import --input", "run": "prune it"}),
    "hugging face": (
        holding("config.json", "model.safetensors"),
        "a Hugging Face directory",
        {"checkpoint": "import makes one", "run": "prune it first"},
    ),
    "adapter": (holding("adapter_config.json"), "an adapter without its model", {"checkpoint": "merge_and_unload"}),
    "gguf": (file("model.Q4_K_M.gguf"), "in GGUF", {"hugging face": "it was made from", "checkpoint": "made from"}),
    "folder of gguf": (holding("model.gguf"), "in GGUF", {"hugging face": "it was made from"}),
    "cache": (holding("snapshots/1/config.json", "blobs/1"), "hub's cache", {"hugging face": "given/snapshots"}),
    "authors": (holding("params.json", "consolidated.00.pth"), "authors", {"hugging face": "transformers' script"}),
    "megatron": (holding("latest_checkpointed_iteration.txt"), "Megatron-LM or NeMo", {"checkpoint": "convert it"}),
    "nemo": (file("model.nemo"), "Megatron-LM or NeMo", {"hugging face": "convert it"}),
    "tokens": (file("text.idx"), "preprocessed text", {"checkpoint": "--data"}),
    "prefix": (lambda r: file("t.bin", "t.idx")(r).with_name("t"), "preprocessed text", {"model": "--data"}),
    "masks": (file("masks.npz"), "a mask file", {"run": "--mask", "checkpoint": "--mask"}),
    "text": (file("text.jsonl"), "text", {"checkpoint": "--calibration"}),
    "tokenizer": (holding("tokenizer.json"), "a tokenizer without a model", {"checkpoint": "import makes one"}),
    "weights alone": (holding("model.safetensors"), "without a config.json", {"hugging face": "fetch the whole"}),
    "weights": (file("model.safetensors"), "without a config.json", {"hugging face": "fetch the whole model"}),
    "pickles": (holding("pytorch_model.bin"), "a folder of pickle files", {"hugging face": "fetch the whole model"}),
    "empty": (holding(), "an empty folder", {"checkpoint": "import makes one", "run": "--output of prune"}),
    "another file": (file("notes"), "a file", {"checkpoint": "import makes one"}),
    "another folder": (holding("notes"), "something else", {"checkpoint": "import makes one"}),
    "nothing": (lambda root: root / "nothing", "does not exist", {"checkpoint": "import makes one"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_was_given_is_named_with_the_next_step(tmp_path: Path, form: str) -> None:
    make, name, steps = FORMS[form]
    path = make(tmp_path)
    for wanted, step in steps.items():
        told = str(wrong(path, wanted))
        assert name in told and step in told and "{" not in told, told


def test_names_of_files_are_those_that_are_written(tmp_path: Path) -> None:
    names = (run_folder.DESCRIPTION, "decision.json", description.DESCRIPTION, maxtext.DESCRIPTION, fms.CONFIG, TRIM)
    found = [str(wrong(holding(name)(tmp_path / name), "model")) for name in names]
    assert not [told for told in found if "something else" in told]
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory, its checkpoint and a run."""
    root = tmp_path_factory.mktemp("given")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    verb = ["--input", str(root / "hf"), "--output"]
    assert main(["import", *verb, str(root / "ck")]) == 0
    assert main(["prune", *verb, str(root / "run"), "--method", "magnitude", "--target", "2:4"]) == 0
    return root


VERBS = {
    "export a decision": (["export", "--input", "run/decision", "--output", "x"], "trim the run that it is of, .*run,"),
    "export a directory": (["export", "--input", "hf", "--output", "x"], "a Hugging Face directory.*import makes one"),
    "import a checkpoint": (["import", "--input", "ck", "--output", "x"], "a Megatron checkpoint.*export --input"),
    "import a run": (["import", "--input", "run", "--output", "x"], "a run folder.*trim run CHECKPOINT"),
    "trim a checkpoint": (["trim", "--input", "ck", "--output", "x"], "a Megatron checkpoint.*nothing is left to trim"),
    "trim a directory": (["trim", "--input", "hf", "--output", "x"], "a Hugging Face directory.*prune it first"),
    "masks of a checkpoint": (
        ["export", "--format", "mask-npz", "--input", "ck", "--output", "x"],
        "a Megatron checkpoint.*prune it first",
    ),
    "inspect a file": (
        ["inspect", "--input", "hf/tokenizer.json"],
        "a file and .* or a Hugging Face directory is need",
    ),
    "report of a folder": (["report", ".", "--output", "x"], "something else and run folders.* are needed"),
    "plan of a run": (
        "plan --input run --method maskllm --target 2:4 --processes 1".split(),
        "a run folder and a Megatron checkpoint or a Hugging Face directory is needed: trim --input",
    ),
    "evaluate a decision": (
        ["evaluate", "--input", "./run/decision", "--text", "t.txt"],
        "decision of a run .*: trim",
    ),
    "train a text": (
        ["train", "--input", "hf/config.json", "--output", "x", "--data", "t.txt"],
        "config.json is a file and a Megatron checkpoint or a Hugging Face directory is needed",
    ),
    "prune a run": (
        ["prune", "--input", "run", "--output", "x", "--method", "magnitude", "--target", "2:4"],
        "a run folder.*trim --input",
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_verbs_say_the_next_step(
    root: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, message = VERBS[name]
    monkeypatch.chdir(root)
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and len(told) < 500 and re.search(message, told), told
    assert not list(root.glob("x*"))
