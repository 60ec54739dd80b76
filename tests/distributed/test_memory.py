"""Models come, are cut, go and are verified without a whole copy of them on any process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import TIMEOUT_S, environment, must_pass
from tests.models import byte_tokenizer, tiny_llama, words

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).with_name("memory.py")
LARGE = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=257, num_key_value_heads=4)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=12, vocab_size=257, num_key_value_heads=4)
"""Takes what has nothing to do with sizes: modules that are imported late, buffers of processes that talk."""
OWN = {"import": 0.5, "trim": 0.5, "export": 0.5, "verify": 0.5, "verify_export": 0.0, "cut": 0.5 + 0.5 * 10 / 12}
"""Share of the model that is each process's; `cut` has the smaller one beside it. A whole copy would be 1 more."""
MORE = 0.7
"""Besides: megatron-core copies the halves of gated MLPs where it writes and reads a checkpoint (0.25 here), and a few
tensors are on their way, more of them where one process is much slower than the other (0.5 was seen).
"""
VERBS = ("import", "prune", "trim", "export", "verify", "verify_export", "shear", "cut")


def commands(root: Path) -> list[list[str]]:
    """Every verb in a layout of two processes that share each layer."""
    words = {
        "import": "import --input hf --output dense",
        "prune": "prune --method magnitude --target 2:4 --input dense --output run",
        "trim": "trim --input run --output sparse",
        "export": "export --input sparse --output exported",
        "verify": "verify --input sparse",
        "verify_export": "verify --input exported --target 2:4",
        "shear": "prune --method shortgpt --target num_layers=10 --input dense --output smaller "
        "--calibration words.jsonl --calibration-samples 2 --calibration-seq-length 32",
        "cut": "trim --input smaller --output small",
    }
    places = {"hf", "dense", "run", "sparse", "exported", "smaller", "small", "words.jsonl"}
    split = ["--tensor-model-parallel-size", "2"]
    return [[str(root / word) if word in places else word for word in words[name].split()] + split for name in VERBS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every verb run with a large and with a small model."""
    root = tmp_path_factory.mktemp("memory")
    for name, sizes in (("large", LARGE), ("small", SMALL)):
        byte_tokenizer(tiny_llama(root / name / "hf", **sizes))
        words(root / name / "words.jsonl")
        (root / name / "commands.json").write_text(json.dumps(commands(root / name)))
    found = subprocess.run(
        [sys.executable, str(WORKER), str(root / "large"), str(root / "small")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(0),
        check=False,
    )
    must_pass(found)
    return root


@pytest.mark.parametrize("verb", OWN)
def test_no_process_has_a_whole_copy(root: Path, verb: str) -> None:
    whole = (root / "large" / "hf" / "model.safetensors").stat().st_size
    for rank in range(2):
        file = f"{VERBS.index(verb)}_{rank}.json"
        large, small = (json.loads((root / name / file).read_text()) for name in ("large", "small"))
        share = (large - small) / whole
        assert share < OWN[verb] + MORE, f"{verb}, process {rank}: {share:.2f} of the model"
