"""One-shot pruning of SmolLM2-135M end to end, ours and locuslab/wanda's in turn in one run, whole processes.

    git clone https://github.com/locuslab/wanda CHECKOUT
    python benchmarks/peers.py --model HF_DIRECTORY --wanda CHECKOUT --shared ../shared

Ours is `prune`, from the Hugging Face directory to a decision on disk (with compensated weights, SparseGPT); theirs
loads the same directory, prunes it in memory with the functions of its `lib/prune.py`, and saves nothing. Both get the
same calibration windows (C1) and bf16 weights. Their code is run as it is; only what recent transformers and a machine
without CUDA need is supplied from outside: position embeddings for a layer called by itself, and no-ops for two CUDA
calls.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from quality import C4_TRAINING, HERE, hardware, versions

METHODS = ("wanda", "sparsegpt")
SAMPLES, LENGTH = 64, 512


def cost_of(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of a process, and of those it starts."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": time.perf_counter() - began, "cpu_s": cpu, "peak_gib": usage.ru_maxrss / 2**20}


def ours(method: str, model: Path, c4: Path, work: Path) -> dict[str, float]:
    """`prune`, from the Hugging Face directory."""
    words = [sys.executable, "-m", "megatron_prune", "prune", "--method", method, "--target", "2:4"]
    words += ["--input", str(model), "--output", str(work / "run")]
    words += ["--calibration", str(c4), "--calibration-documents", str(C4_TRAINING)]
    words += ["--calibration-samples", str(SAMPLES), "--calibration-seq-length", str(LENGTH)]
    return cost_of(words)


def theirs(method: str, model: Path, c4: Path, checkout: Path) -> dict[str, float]:
    """This file again, in a process of its own that runs their functions."""
    return cost_of(
        [sys.executable, __file__, "--run-theirs", method, "--model", str(model), "--wanda", str(checkout), str(c4)]
    )


def run_theirs(method: str, model_path: Path, c4: Path, checkout: Path) -> None:
    """Load the model and call their pruning function on our windows."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_prune.data.calibration import windows
    from megatron_prune.data.text import load_tokenizer

    sys.path.insert(0, str(checkout))
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.empty_cache = lambda: None
    import lib.prune as prune  # type: ignore[import-not-found]

    tokens = windows([c4], load_tokenizer(model_path), SAMPLES, LENGTH, 0, slice(0, C4_TRAINING)).tokens
    prune.get_loaders = lambda *_args, **_kwargs: ([(window[None], None) for window in tokens], None)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    model.seqlen, model.hf_device_map = LENGTH, {}
    positions = torch.arange(LENGTH)[None]
    embeddings = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward, **more: forward(x, **{"position_embeddings": embeddings, **more})
    settings = SimpleNamespace(nsamples=SAMPLES, seed=0, sparsity_ratio=0.5, use_variant=False)
    function = {"wanda": prune.prune_wanda, "sparsegpt": prune.prune_sparsegpt}[method]
    function(settings, model, None, torch.device("cpu"), prune_n=2, prune_m=4)
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if "proj" in n)
    assert zeros >= 106168320 // 2, "the peer did not prune"


def main() -> None:
    """Run both, `--repeat` times in turn, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--wanda", type=Path, required=True, help="a checkout of github.com/locuslab/wanda")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--run-theirs", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("c4", type=Path, nargs="?", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run_theirs:
        run_theirs(given.run_theirs, given.model, given.c4, given.wanda)
        return
    c4 = given.shared / "data" / "c4" / "c4_en_sample.jsonl"
    rows = []
    for method in given.methods:
        for _ in range(given.repeat):
            with tempfile.TemporaryDirectory() as work:
                a = ours(method, given.model, c4, Path(work))
            b = theirs(method, given.model, c4, given.wanda)
            rows.append([f"{method} 2:4", *(cell for key in a for cell in (a[key], b[key])), b["wall_s"] / a["wall_s"]])
            print(rows[-1], flush=True)
    names = ["wall s", "wall s (wanda repo)", "CPU s", "CPU s (wanda repo)", "peak GiB", "peak GiB (wanda repo)"]
    today = datetime.date.today().isoformat()
    result = {
        "columns": ["method", *names, "times faster"],
        "rows": rows,
        "protocol": "Whole processes in turn; ours includes writing the decision.",
        "hardware": hardware(),
        "date": today,
        "versions": versions(),
    }
    path = HERE / "results" / f"speed_{today}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
