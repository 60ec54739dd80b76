"""The verbs of `python -m megatron_prune.maxtext`: what they are given, and that documents name flags that exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_prune.command_line import parse
from megatron_prune.errors import UserError
from megatron_prune.maxtext.__main__ import VERBS, main
from megatron_prune.maxtext.folder import DESCRIPTION, Folder, newest_step
from megatron_prune.maxtext.learn import KEPT
from megatron_prune.maxtext.options import LearnConfig, TrainConfig
from megatron_prune.maxtext.train import clipping, data_settings, last_of_each, users_settings
from megatron_prune.methods.maskllm import MaskLLM
from megatron_prune.option_groups import Training
from megatron_prune.options import entries, flag
from tests.unit.maxtext.test_layout import config

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("document, pattern", [
    ("docs/tpu.md", r"^\$python -m megatron_prune\.maxtext (\S+)(.*)$"),
    ("examples/tpu/run.sh", r"\bverb (\w+) (--.*)"),
])  # fmt: skip
def test_documents_name_verbs_and_flags_that_exist(document: str, pattern: str) -> None:
    commands = re.findall(pattern, (ROOT / document).read_text().replace("\\\n", " "), re.MULTILINE)
    assert len(commands) > 2
    for verb, rest in commands:
        known = {flag(option.key) for option in entries(VERBS[verb][0])} | {"--config"}
        assert set(re.findall(r"(--[a-z][\w-]*)", rest)) <= known, verb


def test_the_recipe_is_a_configuration() -> None:
    words = ["--config", str(ROOT / "examples/tpu/learn.yaml"), "--input", "a", "--output", "b"]
    found = parse(LearnConfig, words, prog="learn")
    assert (found.n, found.m, found.lr, found.scale_end) == (2, 4, 5e-5, 500.0)


WITHOUT_A_FLAG = {"train_weights": False, "logits_dtype": "float32", "mask_draw": "step", "recipe": "paper"}
WITHOUT_A_FLAG |= {"train_norms": False, "weight_lr_multiplier": 1.0, "weight_eps": 0.0, "weight_clip": 0.0}
WITHOUT_A_FLAG |= {"weight_gradient": "masked", "masked_decay": 0.0, "decay_warmup": 0.5, "tile_lr_multiplier": 4.0}
"""Options of `maskllm`, and what `learn` always does: weights stay frozen, and none of their tiles dense."""
DIFFERENT = {"mask_draw": "step"}
"""Where that is not the default of `maskllm`: XLA sees the batch of a step whole, so that one draw serves it."""


def test_defaults_are_those_of_maskllm() -> None:
    """By name and value; an option that one side gets has to be said here or on the other side."""
    there = MaskLLM().options()
    here = {field.name: field.default for field in fields(LearnConfig) if field.name in there}
    assert here | WITHOUT_A_FLAG == there | DIFFERENT


def test_the_optimizer_is_that_of_training() -> None:
    """What `learn` has no flag for, and names that both have."""
    there = Training()
    assert (there.lr_decay_style, there.keep_checkpoints) == ("cosine", KEPT)
    names = {field.name for field in fields(Training)}
    shared = {field.name: field.default for field in fields(LearnConfig) if field.name in names}
    assert len(shared) > 10 and shared == {name: getattr(there, name) for name in shared}


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_ranges_are_those_of_maskllm(value: float) -> None:
    numbers = [name for name, default in MaskLLM().options().items() if isinstance(default, float)]
    numbers = [name for name in numbers if name not in WITHOUT_A_FLAG]
    there = {name: refused(MaskLLM, **{name: value}) for name in numbers}
    here = {name: refused(LearnConfig, input=ROOT, output=ROOT, **{name: value}) for name in numbers}
    assert any(here.values()) and here == there


def refused(options: Callable[..., object], **given: object) -> bool:
    """Whether an option is out of range."""
    try:
        options(**given)
    except UserError:
        return True
    return False


@pytest.mark.parametrize("words, message", [
    (["lern"], "unknown verb 'lern'; allowed: convert, export, train, learn"),
    (["train", "--input", "a", "--output", "gs://b/run", "--steps", "1"], "'gs://b/run' was given; allowed: places on"),
    (["verify", "--input", "nothing"], "nothing is not a model for MaxText"),
    (["learn", "--input", "a", "--output", "b", "--n", "4"], "--n 4 --m 4 given; N:M keeps N"),
    (["learn", "--input", "a", "--output", "b", "--lr", "1e-6"], "5e-06 given; allowed: at most --lr (1e-06)"),
    (["learn", "--input", "a", "--output", "b", "--steps", "5", "--lr-warmup-iters", "5"], "allowed: below 5"),
])  # fmt: skip
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text('{"format": 7}')
    with pytest.raises(UserError, match="has format 7; this version reads format 1"):
        Folder.open(tmp_path)


def test_the_newest_step_of_a_run(tmp_path: Path) -> None:
    for step in ("9", "10", "11.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step / "items").mkdir(parents=True)
    assert newest_step(tmp_path).name == "10" and newest_step(tmp_path / "checkpoints" / "9").name == "9"
    model = Folder(Path("model"), config())
    assert model.step(None) == Path("model/weights/0") and model.step(tmp_path).name == "10"
    with pytest.raises(UserError, match="holds no MaxText checkpoint"):
        newest_step(tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp")


def test_settings_that_define_the_model_are_refused() -> None:
    assert users_settings(["learning_rate=1"], config()) == ["learning_rate=1"]
    for wrong in ("rope_type=default", "load_parameters_path=x", "learning_rate"):
        with pytest.raises(UserError, match="that do not define the model"):
            users_settings([wrong], config())
    assert last_of_each(["a=1", "b=2", "a=3"]) == ["a=3", "b=2"]


def test_clipping_is_a_number() -> None:
    clip = "gradient_clipping_threshold"
    assert [clipping(given) for given in ([], [f"{clip}=0"], [f"{clip}=2.5"])] == [1.0, 0.0, 2.5]
    with pytest.raises(UserError, match=f"--settings {clip}=much: allowed: a number"):
        clipping([f"{clip}=much"])


def text(tmp_path: Path, name: str, **about: object) -> str:
    import json

    content = {"vocab_size": 51, "end_of_text": 2} | about
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return str(tmp_path / name)


def test_text_becomes_maxtexts_settings(tmp_path: Path) -> None:
    one, two = text(tmp_path, "one"), text(tmp_path, "two")

    def settings(*data: str) -> list[str]:
        given = TrainConfig(
            input=Path("a"), output=Path("b"), steps=1, data=data, data_cache=tmp_path / "cache", seed=4
        )
        return data_settings(given, config())

    single, blend = (f"grain_train_files={tmp_path}/cache/one|{one}", f"{tmp_path}/cache/two|{two}")
    assert single in settings(one) and "mmap_eod_id=2" in settings(one) and "data_shuffle_seed=4" in settings(one)
    assert f"{single},3.0;{blend},1.0" in settings("3", one, "1", two)
    assert settings() == ["dataset_type=synthetic"]
    for data, message in (
        (("3",), "allowed: PREFIX ..., or WEIGHT PREFIX"),
        ((one, "3"), "allowed: PREFIX ..., or WEIGHT PREFIX"),
        ((text(tmp_path, "large", vocab_size=52),), "has a vocabulary of 52, the model of 51"),
        ((text(tmp_path, "endless", end_of_text=None),), "without end-of-text token"),
        ((one, text(tmp_path, "other", end_of_text=3)), "different end-of-text tokens"),
        ((str(tmp_path / "none"),), "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            settings(*data)
