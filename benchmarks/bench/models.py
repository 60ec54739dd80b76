"""LLaMA by its sizes, random models and tokens; learning masks on them, with our steps and as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.decision.target import NM
from megatron_prune.log import MetricsLog
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.training.learning import LearningRunner
from megatron_prune.training.loop import Trainer


class RandomTokens:
    """Windows of random tokens: what they are changes no time."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def sample(self, index: int) -> Tensor:
        """`[length + 1]` int64 token ids."""
        return torch.randint(self.vocabulary, (self.length + 1,), generator=torch.Generator().manual_seed(index))

    def batch(self, windows: int) -> Tensor:
        """`[windows, length + 1]` int64 token ids, on this process's device."""
        return torch.stack([self.sample(index) for index in range(windows)]).to(backend.device())


def llama(
    hidden: int, ffn: int, layers: int, heads: int, groups: int = 0, vocabulary: int = 32000, **more: Any
) -> dict[str, Any]:
    """A LLaMA's config.json; as many query groups as heads when left out."""
    sizes = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return sizes | more


def write_random(config: dict[str, Any], path: Path) -> None:
    """Random weights of a LLaMA in bf16 as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).bfloat16().save_pretrained(path)


class MaskLearning:
    """Steps of the trainer on the mask logits of a model, each on `[windows, length]` random tokens."""

    def __init__(
        self, model: PrunableModel, folder: Path, nm: tuple[int, int], windows: int, length: int, **draw: Any
    ) -> None:
        """`draw`: scale and temperature."""
        self.tokens = RandomTokens(model.config.vocab_size, length)
        training = Training(micro_batch_size=windows, global_batch_size=windows, seq_length=length)
        log = MetricsLog(folder)
        self.runner = LearningRunner(model, training, self.tokens, folder, writer=lambda: None, log=log)  # type: ignore[arg-type]
        self.draw = self.runner.learn_masks(NM(*nm), hard=False, **draw)
        self.runner.start_logits(lambda mask: mask, std=0.01)
        self.trainer = Trainer(model, training, self.tokens, {"*mask_logits": 1.0})
        self.steps = 0

    def step(self) -> None:
        """The next one."""
        self.draw.step = self.steps
        self.trainer.step(self.steps)
        self.steps += 1


def published(weight: Tensor, logits: Tensor, table: Tensor, scale: float = 100.0, temperature: float = 4.0) -> Tensor:
    """The masked weight `[out, in]` step by step, as its paper writes it (arXiv 2409.17481, equations 5 to 7).

    `logits` `[out, in / M, patterns]`, `table` `[patterns, M]`.
    """
    noise = -torch.log(-torch.log(torch.rand_like(logits)))
    probabilities = torch.softmax((scale * logits + noise) / temperature, dim=-1)
    return weight * (probabilities @ table.to(logits.dtype)).flatten(1).to(weight.dtype)
