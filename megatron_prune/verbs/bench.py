"""The `bench` verb: what 2:4 sparsity brings an exported Hugging Face model on this machine."""

from __future__ import annotations

from typing import Any

from megatron_prune.config import BenchConfig
from megatron_prune.verbs import Verb, deliver

VERB = Verb("bench", BenchConfig, "time an exported 2:4 model, dense against sparse", 100, alone=True)


def run(config: BenchConfig) -> dict[str, Any]:
    """Time `config.input`, print a line for each batch size, and write the result where asked."""
    from megatron_prune.evaluation.speed import bench

    result = bench(config)
    deliver(told(result), result, config.output)
    return result


def told(result: dict[str, Any]) -> list[str]:
    """The result in words, a line or two for each batch size."""
    if "sparse" not in result:
        return [f"batch {dense['batch_size']}, dense: {_figures(dense)}" for dense in result["dense"]]
    lines = []
    for dense, sparse in zip(result["dense"], result["sparse"], strict=True):
        prefill, decode = (dense[key] / sparse[key] for key in ("prefill_s", "decode_s_per_token"))
        lines.append(f"batch {dense['batch_size']}, dense: {_figures(dense)}")
        lines.append(
            f"batch {dense['batch_size']}, 2:4: {_figures(sparse)}; prefill {prefill:.2f} times as fast, "
            f"decode {decode:.2f}"
        )
    return [
        *lines,
        f"weights: dense {result['dense_bytes'] / 2**30:.2f} GiB, 2:4 {result['sparse_bytes'] / 2**30:.2f} GiB; "
        f"largest difference of logits {result['largest_logit_difference']:.3g} of {result['largest_logit']:.3g}",
    ]


def _figures(figures: dict[str, Any]) -> str:
    return (
        f"prefill {figures['prefill_s']:.4f} s ({figures['prefill_tokens_per_s']:.0f} tokens/s), "
        f"decode {figures['decode_s_per_token'] * 1e3:.2f} ms a token ({figures['decode_tokens_per_s']:.1f} tokens/s), "
        f"peak {figures['peak_bytes'] / 2**30:.2f} GiB"
    )
