"""How fast a mask-learning run is and how much memory it takes: small functions behind its metrics.

The FLOPs of a token are those that the algorithm asks for, as in appendix B of PaLM (Chowdhery et al. 2022,
arXiv:2204.02311: 6 N + 12 L H Q T), a multiply-add being 2:

    prunable weights N        6 N             forward, gradient of the input, and the product that PaLM counts for the
                                              weights: the gradient of mask * weight, from which that of the mask logits
                                              follows; needed with frozen weights as with trained ones
    output layer, frozen      4 vocab hidden  no gradient of its weight; the embedding is a look-up
    attention                 12 L q k        L q query channels of all layers, k = sequence length (or the sliding
                                              window): scores and values, all pairs, whether or not a kernel leaves out
                                              the masked half

Of experts those count that a token goes to. Not counted: what is linear in the width (norms, activations, drawing the
masks) and what recomputation does again. So FLOPs per second divided by the device's peak is the model FLOP utilisation
(MFU) of that appendix.
"""

from __future__ import annotations

import re
import resource

import torch

from megatron_prune.device import has_cuda
from megatron_prune.model.cost import forward_flops
from megatron_prune.model.sizes import ModelConfig

TERA = 10**12
GIB = 2**30

PEAK_TFLOPS = {
    r"A100|A800": 312.0,
    r"H100 PCIe": 756.0,
    r"H(100|200) NVL": 835.0,
    r"H100|H200|GH200": 989.0,
    r"B200": 2250.0,
    r"L40S": 362.0,
    r"L4": 121.0,
    r"A10": 125.0,
}
"""Dense bf16 TFLOP/s by words of the device's name, the first that fits; from NVIDIA's data sheets, which give some
with sparsity only: halved here."""


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Forward and backward FLOPs of one token of a window when masks are learned: see above. A backward pass that
    reaches every weight takes twice as many as the forward pass.
    """
    return 3 * forward_flops(model, seq_length) - 2 * model.vocab_size * model.hidden_size


def known_peak_tflops(device: str, dtype: str) -> float | None:
    """Dense TFLOP/s of a device by its name, for models of `dtype`; None when it is not known."""
    if dtype != "bfloat16" or "MIG" in device.split():
        return None
    return next((peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b({words})\b", device)), None)


def speed(tokens: int, seconds: float, flops: int, processes: int, peak_tflops: float | None) -> dict[str, float]:
    """Metrics of `tokens`, of `flops` each, in `seconds` on all processes; `peak_tflops` is that of one device."""
    tflops = tokens * flops / seconds / TERA
    utilisation = {} if peak_tflops is None else {"model_flop_utilisation": tflops / (peak_tflops * processes)}
    return {"tokens_per_s": tokens / seconds, "model_tflop_per_s": tflops, **utilisation}


def peak_memory() -> int:
    """Bytes: the most that tensors took on this process's GPU, or without one the process's largest resident set."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
