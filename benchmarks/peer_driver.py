"""Prunes a model with another tool's public functions, in a process that `benchmarks/peers.py` starts and measures.

It runs under the python that the tool is installed in, so nothing of megatron_prune is imported. The model is loaded
as bf16 unless told otherwise, pruned in memory on calibration windows that are already token ids, and then, after time
and peak memory have been noted in OUTPUT/cost.json, saved in bf16 as a Hugging Face directory so that its perplexity
can be measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def wanda(model: Any, tokens: torch.Tensor, method: str, checkout: Path) -> None:
    """locuslab/wanda, its `lib/prune.py` as it is.

    Only what recent transformers and a machine without CUDA need is supplied from outside: position embeddings for a
    layer called by itself, and no-ops for two CUDA calls.
    """
    import torch

    sys.path.insert(0, str(checkout))
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    import lib.prune as prune  # type: ignore[import-not-found]

    length = tokens.shape[1]
    prune.get_loaders = lambda *_args, **_kwargs: ([(window[None], None) for window in tokens], None)
    model.seqlen, model.hf_device_map = length, {}
    embeddings = model.model.rotary_emb(torch.zeros(1, dtype=model.dtype), torch.arange(length)[None])
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward, **more: forward(x, **{"position_embeddings": embeddings, **more})
    settings = SimpleNamespace(nsamples=len(tokens), seed=0, sparsity_ratio=0.5, use_variant=False)
    function = {"magnitude": prune.prune_magnitude, "wanda": prune.prune_wanda, "sparsegpt": prune.prune_sparsegpt}
    function[method](settings, model, None, torch.device("cpu"), prune_n=2, prune_m=4)
    for layer in model.model.layers:
        del layer.forward


def llmcompressor(model: Any, tokens: torch.Tensor, method: str, _checkout: Path) -> None:
    """llm-compressor's `oneshot` with its defaults."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    recipe = modifier(sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head"])
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    samples, length = tokens.shape
    oneshot(model=model, dataset=rows, recipe=recipe, num_calibration_samples=samples, max_seq_length=length)


def modelopt(model: Any, tokens: torch.Tensor, method: str, _checkout: Path) -> None:
    """nvidia-modelopt's `sparsify` with its defaults; its "sparsegpt" takes the mask and leaves the weights."""
    import modelopt.torch.sparsity as mts
    import torch

    mode = {"magnitude": "sparse_magnitude", "sparsegpt": "sparsegpt"}[method]

    def forward_loop(model: Any) -> None:
        for window in tokens:
            model(window[None], use_cache=False)

    with torch.no_grad():
        mts.sparsify(model, mode, config={"forward_loop": forward_loop} if method == "sparsegpt" else {})
    mts.export(model)


TOOLS = {"wanda": wanda, "llmcompressor": llmcompressor, "modelopt": modelopt}


def check_pruned(model: Any) -> None:
    """Half of every matrix of every layer must be zero."""
    for name, weight in model.named_parameters():
        if "proj" in name and int((weight == 0).sum()) * 2 < weight.numel():
            raise SystemExit(f"{name} was not pruned")


def main() -> None:
    """Load, prune, note the cost, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("method", choices=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with `tokens` [windows, length]")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="while pruning")
    parser.add_argument("--checkout", type=Path, default=Path(), help="of locuslab/wanda")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = load_file(given.tokens)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval()
    TOOLS[given.tool](model, tokens, given.method, given.checkout)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cost = {"at": time.time(), "cpu_s": usage.ru_utime + usage.ru_stime, "peak_gib": usage.ru_maxrss / 2**20}
    check_pruned(model)
    given.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(given.output / "model")
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.output / "model")
    (given.output / "cost.json").write_text(json.dumps(cost))


if __name__ == "__main__":
    main()
