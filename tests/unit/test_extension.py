"""A new method, a new family and a new verb are a new file each: added to a copy of the package, they work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import TINY_SIZES, tiny_model

ROOT = Path(__file__).parents[2]
METHOD = '''
"""Leading: the first N of every M stay; a baseline that looks at nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_prune.decision.masks import Kept
from megatron_prune.decision.target import NM, Target
from megatron_prune.methods.base import PruningMethod, Workbench, hyperparameter, register


@register("leading")
@dataclass(frozen=True)
class Leading(PruningMethod):
    """Keep the first N of every M."""

    paper: ClassVar[str] = "nobody's"
    targets: ClassVar[Mapping[type, str]] = {NM: "N:M"}
    needs: ClassVar[tuple[str, ...]] = ()
    offset: int = hyperparameter(0, "where the first one is")

    def decide(self, work: Workbench, target: Target) -> Kept:
        """Decide every prunable weight."""
        assert isinstance(target, NM)
        for linear in work.linears(None):
            weight = linear.weight()
            places = (torch.arange(weight.shape[1], device=weight.device) - self.offset) % target.m
            linear.keep((places < target.n).expand(weight.shape).contiguous())
        return work.masks()
'''
FAMILY = '''
"""Arcee's foundation models: LLaMA with a squared ReLU in place of a gate."""

from __future__ import annotations

from megatron_prune.model.families import llama
from megatron_prune.model.family import Family
from megatron_prune.model.rows import (
    DOWN, EMBEDDING, FINAL_NORM, INPUT_NORM, LLAMA_DEFAULTS, LLAMA_KEYS, MLP_NORM, NO_BIAS, OUTPUT, PROJECTION, QKV,
    ROTARY_TABLES, UP,
)

FAMILY = Family(
    name="arcee",
    model_types=("arcee",),
    keys=LLAMA_KEYS,
    defaults=LLAMA_DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    supported={"hidden_act": ("relu2",)} | NO_BIAS,
    constants={"activation": "relu2", "gated": False},
    table=(EMBEDDING, INPUT_NORM, QKV, PROJECTION, MLP_NORM, UP, DOWN, FINAL_NORM, OUTPUT),
    ignored=ROTARY_TABLES,
)
'''
VERB = '''
"""The `count` verb: how many weights a checkpoint has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.options import REQUIRED, Options, option
from megatron_prune.verbs import Verb


@dataclass(frozen=True, kw_only=True)
class CountConfig(Options):
    """How many weights a checkpoint has"""

    input: Path = option(REQUIRED, "Megatron checkpoint")
    most: int = option(10**12, "more than this is a failure", at_least=1)


VERB = Verb("count", CountConfig, "count weights", 125, alone=True, light=True, passed=lambda found: found > 0)


def run(config: CountConfig) -> int:
    """Count them; 0 where there are too many."""
    from megatron_prune.log import say
    from megatron_prune.model.cost import parameters
    from megatron_prune.model.description import read_description

    count = parameters(read_description(config.input).config)
    say(f"{count} weights")
    return count if count <= config.most else 0
'''
NEW = {"methods/leading.py": METHOD, "model/families/arcee.py": FAMILY, "verbs/count.py": VERB}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with three new files, a model of the new family, and its checkpoint."""
    root = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "megatron_prune", root / "megatron_prune", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in NEW.items():
        assert not (root / "megatron_prune" / name).exists()
        (root / "megatron_prune" / name).write_text(text)
    sizes = TINY_SIZES["llama"] | {"bos_token_id": 1, "eos_token_id": 2}
    tiny_model(root / "hf", "arcee", **sizes)
    assert run(root, "import --input hf --output ck").returncode == 0
    return root


def run(root: Path, words: str) -> subprocess.CompletedProcess[str]:
    """A command of the copy."""
    return python(root, "-m", "megatron_prune", *words.split())


def python(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)


def test_the_package_as_it_is_knows_none_of_them(house: Path) -> None:
    """The negative control."""
    for words in ("count --input ck", "prune --input ck --output no --method leading --target 2:4"):
        done = python(ROOT, "-m", "megatron_prune", *words.replace("ck", str(house / "ck")).split())
        assert done.returncode == 2 and "unknown" in done.stderr
    done = python(ROOT, "-m", "megatron_prune", "import", "--input", str(house / "hf"), "--output", str(house / "no"))
    assert done.returncode == 2 and "model_type 'arcee'" in done.stderr


def test_a_method_is_a_file(house: Path) -> None:
    listed = run(house, "methods").stdout
    assert "leading" in listed and "--offset" in listed
    assert "where the first one is (default: 0)" in run(house, "prune --method leading --help").stdout
    assert run(house, "prune --input ck --output run --method leading --target 2:4 --offset 1").returncode == 0
    assert run(house, "trim --input run --output sparse").returncode == 0
    assert run(house, "export --input sparse --output out").returncode == 0
    from safetensors.torch import load_file

    weight = load_file(house / "out" / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    kept = (weight != 0).view(weight.shape[0], -1, 4).all(0).all(0)
    assert kept.tolist() == [False, True, True, False]
    verified = run(house, "verify --input out --target 2:4")
    assert verified.returncode == 0 and "verified" in verified.stdout


def test_a_family_is_a_file(house: Path) -> None:
    assert run(house, "export --input ck --output back").returncode == 0
    from safetensors.torch import load_file

    before, after = (load_file(house / name / "model.safetensors") for name in ("hf", "back"))
    assert set(before) == set(after) and all(before[name].equal(after[name]) for name in before)
    equal = run(house, "verify --input ck --against hf --output equal.json --tolerance 1e-5")
    assert equal.returncode == 0, equal.stdout
    assert json.loads((house / "equal.json").read_text())["logits"]["largest_logit"] > 0.1


def test_a_verb_is_a_file(house: Path) -> None:
    assert "count       count weights" in run(house, "--help").stdout
    done = run(house, "count --input ck")
    assert done.returncode == 0 and done.stdout.endswith(" weights\n")
    assert run(house, "count --input ck --most 3").returncode == 1
    refused = run(house, "count --input ck --most 0")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    program = "import megatron_prune as mp; assert mp.count('ck') > 1000; print(mp.count.__doc__)"
    told = python(house, "-c", program)
    assert told.returncode == 0 and "more than this is a failure" in told.stdout, told.stderr


def test_the_layers_hold_with_them(house: Path) -> None:
    shutil.copyfile(ROOT / "pyproject.toml", house / "pyproject.toml")
    lint = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    found = python(house, "-c", lint)
    assert found.returncode == 0, found.stdout
