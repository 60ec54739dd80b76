"""Perplexity of a Megatron checkpoint in any layout, or of a Hugging Face directory.

Both are measured by the same protocol: the whole text tokenised without special tokens, non-overlapping windows,
exp(mean negative log-likelihood over every predicted token), losses in float32 and their sum in float64.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.config import EvaluateConfig
from megatron_prune.data.dataset import EvaluationText, evaluation_windows
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.pruned import open_source
from megatron_prune.decision.run_folder import is_run
from megatron_prune.errors import UserError
from megatron_prune.evaluation import hugging_face
from megatron_prune.evaluation.maxtext import MaxTextScorer, refuse_options
from megatron_prune.kernels.products import wide_products
from megatron_prune.maxtext.folder import is_folder
from megatron_prune.model.description import is_checkpoint
from megatron_prune.model.forward import window_losses
from megatron_prune.model.layout import layout_of
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.results import fullest
from megatron_prune.statistics.passes import Passes

WINDOW = 1024
"""Tokens of a window where none are given and the model reads as many."""
LARGEST_LOSS = 700.0
"""In nats per token; a float cannot hold the perplexity of a larger one."""


def perplexity(config: EvaluateConfig) -> dict[str, Any]:
    """Perplexity of `config.input`, whatever form it has, and how it was measured. Collective."""
    path = Path(config.input)
    if config.expert_load:
        _check_experts(path)
    if is_folder(path):
        return _maxtext(config)
    refuse_options(config, config.input)
    return _megatron(config) if is_checkpoint(path) or is_run(path) else _hugging_face(config)


def _check_experts(path: Path) -> None:
    """UserError for a model whose experts' tokens cannot be counted."""
    if not is_checkpoint(path) and not is_run(path):
        raise UserError(f"--expert-load was given and {path} is no Megatron checkpoint: import it, or leave it out")
    model = open_source(path).config
    if not model.num_moe_experts:
        raise UserError(f"--expert-load was given and a {model.family} model has no experts: leave it out")


def _text(config: EvaluateConfig, tokenizer: Path, vocab_size: int, longest: int) -> EvaluationText:
    """The windows of the text; `longest`: tokens that the model reads at most, and a window's where none was given."""
    assert config.text is not None, "checked by the configuration"
    _check_length(config.window, longest)
    window = config.window or min(WINDOW, longest)
    reads = load_tokenizer(tokenizer, vocab_size, chat=config.apply_chat_template)
    return evaluation_windows(config.text, reads, window, config.windows)


def _result(
    config: EvaluateConfig, text: EvaluationText, loss: float, tokens: int, about: dict[str, Any]
) -> dict[str, Any]:
    count, window = text.tokens.shape
    if not math.isfinite(loss) or loss > LARGEST_LOSS * tokens:
        raise UserError(f"the loss of {config.input} is {loss}: the model's weights are damaged or it overflows")
    return {
        "perplexity": math.exp(loss / tokens),
        "loss": loss / tokens,
        "predicted_tokens": tokens,
        "protocol": f"windows of {window}, stride {window}, first {count}, "
        + ("no BOS" if text.chat_template is None else "conversations by the chat template"),
        "text": text.info(),
        "input": str(config.input),
        **about,
    }


def _megatron(config: EvaluateConfig) -> dict[str, Any]:
    source = open_source(Path(config.input))
    layout = layout_of(config.parallelism)
    with backend.running(layout):
        model = source.load(layout, config.dtype)
        text = _text(config, source.tokenizer, model.config.vocab_size, model.config.max_position_embeddings)
        loss, tokens = window_losses(model, text.tokens, config.micro_batch_size)
        about: dict[str, Any] = {"kind": "megatron", "layout": layout.describe()}
        about["dtype"] = config.dtype or model.config.dtype
        if config.expert_load:
            about["expert_tokens"] = expert_tokens(model, text.tokens)
        return _result(config, text, loss, tokens, about)


def expert_tokens(model: PrunableModel, tokens: Tensor) -> list[list[int] | None]:
    """How many tokens of windows `[n, s]` each expert of each layer gets; None for layers without any. Collective.

    On whole layers (`statistics/walk.py`): the same numbers in every layout.
    """
    found = Passes(model, tokens).expert_activity()
    return [None if layer is None else layer.tokens.long().tolist() for layer in found]


def load_told(layers: list[list[int] | None]) -> str:
    """How evenly experts are used, in a line: the fullest expert against an even share, and those without a token."""
    sparse = [layer for layer in layers if layer is not None]
    loads = [fullest(layer) for layer in sparse]
    empty = sum(layer.count(0) for layer in sparse)
    return (
        f"the fullest expert of a layer gets {fmean(loads):.2f} times an even share (mean of "
        f"{len(sparse)} layers, most {max(loads):.2f}); {empty} of {sum(map(len, sparse))} experts get no token"
    )


def _check_length(window: int | None, longest: int) -> None:
    if window is not None and window > longest:
        raise UserError(
            f"--window {window} was given and the model reads at most {longest} tokens: use {longest} or less"
        )


def _maxtext(config: EvaluateConfig) -> dict[str, Any]:
    tokens_per_batch = max(config.window or 0, WINDOW) * config.micro_batch_size
    scorer = MaxTextScorer(Path(config.input), config.checkpoint, tokens_per_batch, config.dtype, config.settings)
    text = _text(config, scorer.tokenizer, scorer.config.vocab_size, scorer.longest)
    loss, tokens = scorer.window_losses(text.tokens.numpy())
    return _result(config, text, loss, tokens, {"kind": "maxtext", "dtype": scorer.dtype})


def _hugging_face(config: EvaluateConfig) -> dict[str, Any]:
    reader = hugging_face.open_alone(config.input, config.parallelism)
    about = reader.model_config
    text = _text(config, reader.directory, about.vocab_size, about.max_position_embeddings)
    dtype = config.dtype or reader.model_config.dtype
    model = hugging_face.load(reader, dtype)
    loss, tokens = 0.0, 0
    with wide_products():
        for batch in text.tokens.split(config.micro_batch_size):
            losses = _next_token_losses(model, batch.to(backend.device()))
            loss += float(losses.double().sum())
            tokens += losses.numel()
    return _result(config, text, loss, tokens, hugging_face.about(reader, dtype))


@torch.no_grad()
def _next_token_losses(model: Any, tokens: Tensor) -> Tensor:
    """`[b * (s - 1)]` negative log-likelihoods in nats of a transformers model, float32."""
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
