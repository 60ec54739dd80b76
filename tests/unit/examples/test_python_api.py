"""The example of the Python API runs as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.models import byte_tokenizer, tiny_llama, words

ROOT = Path(__file__).parents[3]


def test_the_example_prunes_saves_and_proves(tmp_path: Path) -> None:
    model = byte_tokenizer(tiny_llama(tmp_path / "model", vocab_size=257))
    text = words(tmp_path / "text.jsonl", documents=24)
    program = ROOT / "examples" / "python_api" / "prune_in_memory.py"
    found = subprocess.run(
        [sys.executable, str(program), str(model), str(text), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("perplexity") == 2 and "verified" in found.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
