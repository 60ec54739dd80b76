"""Runs in MaxText's environment: what a TPU's attention would be asked, on a CPU.

MaxText chooses its kernel by the platform of the devices; here it chooses as on a TPU while a computation is traced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megatron_prune.data.requests import Request
from megatron_prune.maxtext.options import ScoreConfig
from megatron_prune.maxtext.score import JaxScorer


def lengths(folder: str, longest: str) -> str:
    """Lengths of batches for requests of 2 tokens and more, by whether a TPU's attention takes them; as JSON."""
    scorer = JaxScorer(
        ScoreConfig(
            input=Path(folder), requests=Path(), output=Path(), tokens_per_batch=1, settings=("attention=flash",)
        )
    )
    asked = sorted({min(2 + n * n, int(longest)) for n in range(3, 48)})
    requests = [Request([1] * (length - 1), [2, 3]) for length in asked]
    planned = sorted({batch.tokens.shape[1] for batch in scorer.plan(requests)})
    answers = {length: refusal(scorer, length) for length in (*planned, 160, 544)}
    return json.dumps({"planned": planned, "refused": {n: text for n, text in answers.items() if text}})


def refusal(scorer: JaxScorer, length: int) -> str:
    """What is wrong with a length; empty where TPU code can be made."""
    tokens = np.zeros((scorer.devices, length), np.int32)
    try:
        with scorer.model.sharded(), as_on_a_tpu():
            traced = jax.jit(scorer.model.states()).trace(scorer.model.state, tokens, tokens, None)
            traced.lower(lowering_platforms=("tpu",))
    except (ValueError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return ""


@contextmanager
def as_on_a_tpu() -> Iterator[None]:
    """While active MaxText's attention from 128 tokens on is the one of TPUs, as `autoselected` has it there."""
    from maxtext.layers.attention_op import AttentionOp

    usual = AttentionOp.apply_attention

    def apply(self: Any, query: Any, key: Any, value: Any, decoder_segment_ids: Any, **more: Any) -> Any:
        if query.shape[-3] < 128:
            self.attention_kernel = "dot_product"
            return usual(self, query, key, value, decoder_segment_ids, **more)
        return self.tpu_flash_attention(query, key, value, decoder_segment_ids)[0], None, None

    AttentionOp.apply_attention = apply
    try:
        yield
    finally:
        AttentionOp.apply_attention = usual
