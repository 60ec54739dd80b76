"""What a learning run trains on and is tested on: files of text, or prefixes of preprocessed text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_prune.data.blend import HELD_OUT, TRAIN, Blend, BlendWindows, parse_blend
from megatron_prune.data.dataset import TokenWindows, cache_folder
from megatron_prune.data.domains import Domain, DomainWindows
from megatron_prune.data.tokenizer import refuse_prepared
from megatron_prune.errors import UserError
from megatron_prune.option_groups import Training


class Windows(Protocol):
    """Numbered windows of tokens, the same on every process."""

    num_windows: int

    def sample(self, index: int) -> Tensor:
        """Window number `index`: int64 [seq_length + 1]"""

    def info(self) -> dict[str, Any]:
        """Provenance, for the log."""


def training_windows(t: Training, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Windows:
    """What the optimizer's steps see. Collective."""
    if t.domain_interval is not None:
        return _domains(t, t.domain_interval, tokenizer, vocab_size)
    blend = _blend(t)
    if blend is None:
        return TokenWindows(t.data, tokenizer, t.seq_length, t.seed, documents=t.data_range)
    refuse_prepared(tokenizer, "data")
    count = t.train_iters * t.global_batch_size
    return BlendWindows(blend, TRAIN, count, t.seq_length, t.seed, vocab_size, _cache(t))


def held_out_windows(t: Training, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Windows | None:
    """What the held-out loss is computed on: `eval_data`, or else the part of `data` that is split off. Collective."""
    blend = _blend(t)
    given = parse_blend("eval_data", t.eval_data) if t.eval_data else None
    if given is not None:
        refuse_prepared(tokenizer, "eval_data")
        if t.eval_documents is not None:
            raise UserError("--eval-documents: given with preprocessed --eval-data; allowed: with files of text")
        held_out = replace(given, split=(0, 1, 0))
    elif t.eval_data:
        return TokenWindows(t.eval_data, tokenizer, t.seq_length, 0, documents=t.eval_range)
    elif blend is not None and blend.split[HELD_OUT]:
        held_out = blend
    else:
        return None
    return BlendWindows(held_out, HELD_OUT, t.eval_windows, t.seq_length, 0, vocab_size, _cache(t))


def first_windows(windows: Windows | None, count: int) -> Tensor | None:
    """The first `count` windows without their last token, `[n, seq_length]`, fewer when the text has fewer."""
    if windows is None:
        return None
    return torch.stack([windows.sample(i)[:-1] for i in range(min(count, windows.num_windows))])


def _domains(t: Training, interval: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> DomainWindows:
    """Every prefix or file of `data` as a domain, tested on its own held-out part or its place in `eval_data`."""
    blend = _blend(t)
    data = t.data if blend is None else blend.prefixes
    tested = _places("eval_data", t.eval_data)
    names = [path.name for path in data]
    if len(set(names)) != len(names) or len(names) < 2:
        raise UserError(
            f"--domain-interval: --data has {', '.join(names)}; allowed: two domains or more, all named apart"
        )
    if len(t.domain_targets) != len(data) or (tested and len(tested) != len(data)):
        raise UserError(
            f"--domain-interval: {len(data)} domains in --data, {len(t.domain_targets)} --domain-targets and "
            f"{len(tested)} in --eval-data given; allowed: a target for each domain, and held-out text for each or none"
        )
    domains = []
    for number, path in enumerate(data):
        own = replace(t, data=(path,), eval_data=tested[number : number + 1], domain_interval=None, domain_targets=())
        held_out = first_windows(held_out_windows(own, tokenizer, vocab_size), t.eval_windows)
        if held_out is None:
            raise UserError(
                "--domain-interval: no held-out text given; give --eval-data, or --data-split with prefixes"
            )
        source = training_windows(own, tokenizer, vocab_size)
        domains.append(Domain(path.name, source, held_out, t.domain_targets[number]))
    weights = blend.weights if blend else None
    sizes = [domain.source.info()["tokens"] for domain in domains]
    return DomainWindows(domains, weights or sizes, interval, t.global_batch_size)


def _places(key: str, given: Sequence[Path]) -> tuple[Path, ...]:
    """The files of text or prefixes that an option names, without weights."""
    blend = parse_blend(key, given) if given else None
    return tuple(given) if blend is None else blend.prefixes


def _blend(t: Training) -> Blend | None:
    """The blend that `data` names, None when it is text; options that only fit the other kind are refused."""
    blend = parse_blend("data", t.data)
    if blend is None:
        if t.data_split is not None:
            raise UserError("--data-split: given with files of text; allowed: with prefixes from `preprocess`")
        return None
    if t.data_documents is not None:
        raise UserError("--data-documents: given with preprocessed --data; --data-split says which part is used")
    return replace(blend, split=t.split)


def _cache(t: Training) -> Path:
    return t.data_cache or cache_folder()
