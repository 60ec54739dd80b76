"""Pruning a transformers model that is in memory: one process, a CPU or a GPU, no checkpoint on disk."""

from __future__ import annotations

import contextlib
import copy
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prune.config import PruneConfig
from megatron_prune.data.calibration import CalibrationSet, windows_of
from megatron_prune.data.chat import KEYS, Conversations
from megatron_prune.data.rendering import Template
from megatron_prune.data.text import BadDocument
from megatron_prune.data.tokenizer import check_tokenizer, undraw
from megatron_prune.decision.masks import Kept, Masks
from megatron_prune.decision.pruned import apply_masks, cut
from megatron_prune.decision.source import ModelSource, read_hf
from megatron_prune.decision.target import Shape, parse_any_target
from megatron_prune.errors import UserError, brief
from megatron_prune.exporting.preflight import check_result
from megatron_prune.methods.base import CALIBRATION, PruningMethod, get_method
from megatron_prune.methods.fit import check_experts, check_target
from megatron_prune.model.build import DTYPES
from megatron_prune.model.families import ModelConfig, family_of, get_family
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.model.transformers_model import float32_ends
from megatron_prune.option_groups import Calibration
from megatron_prune.options import check_kind
from megatron_prune.workbench import DECISION, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prune_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str,
    target: str | float | Mapping[str, Any],
    texts: Sequence[str] = (),
    messages: Sequence[Sequence[Mapping[str, Any]]] = (),
    calibration_samples: int | None = None,
    calibration_seq_length: int | None = None,
    calibration_seed: int = 0,
    in_place: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A transformers model pruned by a one-shot method: the same model with zeros, or a smaller one.

    ``target`` is written as on the command line (``"2:4"``, ``"0.5"``, ``"num_layers=24"``), as a number or a mapping;
    ``texts`` are the calibration documents of methods that look at text, drawn from as `prune` draws from files, in as
    many windows unless they are given; ``messages`` are conversations in their place, such as ``dataset["messages"]``:
    the tokenizer's chat template makes them text, as in `prune --apply-chat-template`. ``options`` are the method's own
    hyper-parameters. ``in_place`` changes ``model`` itself where its shape stays, else
    a copy is pruned; a smaller model is always a new one. Weights keep their type and device. Logits are those of the
    model that `prune`, `trim` and `export` make of the same texts, as one document each, or of the same conversations.

    UserError for a method that takes hours (use `prune`), for a family or shape that is not supported, for missing
    text, and where several processes are joined.
    """
    if backend.world_size() > 1:
        raise UserError("prune_model works in one process and several were started; use `prune` under torchrun")
    if parallel_state.model_parallel_is_initialized():
        raise UserError("prune_model sets up megatron-core by itself and it is set up already; use `prune` for it")
    for name, value, kind in (
        ("calibration_samples", calibration_samples, int | None),
        ("calibration_seq_length", calibration_seq_length, int | None),
        ("calibration_seed", calibration_seed, int),
        ("in_place", in_place, bool),
    ):
        check_kind(f"prune_model: {name}", value, kind)
    chosen = get_method(method, **options)
    if chosen.resumable:
        raise UserError(f"prune_model: method {method} takes hours and works in a run folder; use `prune` for it")
    asked = parse_any_target(target)
    chosen.accept(asked)
    config = _config(model)
    check_experts(config, chosen, asked)
    check_target(config, asked)
    chosen.check(config, asked)
    if isinstance(asked, Shape):
        check_result(config, asked)
    drawn = None
    if CALIBRATION in chosen.needs:
        wanted = _wanted(chosen, calibration_samples, calibration_seq_length, calibration_seed)
        drawn = _calibration(chosen, config, tokenizer, _Text(texts, messages), wanted)
    with tempfile.TemporaryDirectory() as folder, _state_kept(), backend.running(backend.Layout()):
        settings = PruneConfig(input=Path(), output=Path(folder), method=method, target=str(asked))
        work = Workbench(settings, _source(model, config), backend.Layout(), chosen, asked)
        if drawn is not None:
            work.calibration = drawn
        with work:
            decision = work.decide()
        if isinstance(decision, Kept):
            apply_masks(work.model, Masks.load(work.folder / DECISION))
            return _written(work.model, model if in_place else copy.deepcopy(model))
        return _written(smaller := cut(work.model, decision), _empty_like(model, smaller.config))


@contextlib.contextmanager
def _state_kept() -> Iterator[None]:
    """The caller's random generators and current device are what they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the caller's, whatever it is)
    device = torch.cuda.current_device() if backend.has_cuda() else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if device is not None:
            torch.cuda.set_device(device)


class _Parameters:
    """A model's parameters by their names in a checkpoint, as `HFReader` gives those of a file.

    transformers 5 has all experts of a layer in one parameter, of which each is a part.
    """

    def __init__(self, model: PreTrainedModel, config: ModelConfig) -> None:
        self.model_config = config
        self._state = model.state_dict()
        maps = get_family(config.family).weights(config)
        self._places = {name: (place, part) for map in maps for name, place, part in map.places()}

    def read(self, name: str) -> Tensor:
        """The parameter ``name``, on the CPU."""
        return self.place(name).detach().cpu()

    def place(self, name: str) -> Tensor:
        """The parameter ``name`` itself, or the part of one that it is."""
        place, part = self._places[name]
        if place not in self._state:
            raise UserError(
                f"prune_model: the model has no {name}; give a language model of transformers (...ForCausalLM)"
            )
        whole = self._state[place]
        return whole if part is None else part.of(whole)


def _source(model: PreTrainedModel, config: ModelConfig) -> ModelSource:
    reader = _Parameters(model, config)
    for map in get_family(config.family).weights(config):
        for name in map.hf:
            reader.read(name)

    def load(layout: backend.Layout, dtype: str | None = None, **extra: Any) -> PrunableModel:
        return read_hf(reader, layout, dtype, **extra)

    return ModelSource(config, {}, Path(), load)


def _config(model: PreTrainedModel) -> ModelConfig:
    if not isinstance(model, torch.nn.Module) or not hasattr(getattr(model, "config", None), "to_dict"):
        raise UserError(f"prune_model: {brief(model)} given; allowed: a language model of transformers")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("prune_model: parameters without memory were given; load the model whole, without offloading")
    wide = float32_ends(model)
    kept = [parameter for name, parameter in model.named_parameters() if not name.endswith(wide)]
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in kept}
    if len(kinds) != 1:
        raise UserError(f"prune_model: parameters of types {', '.join(sorted(kinds))} were given; allowed: one type")
    (kind,) = kinds
    if kind not in DTYPES:
        raise UserError(f"prune_model: weights of type {kind} were given; allowed: {', '.join(DTYPES)}: model.to(...)")
    about = {**model.config.to_dict(), "dtype": kind}
    about.pop("torch_dtype", None)
    return family_of(about).from_hf(about)


@dataclass(frozen=True)
class _Text:
    """What calibration is to be drawn from: one of these."""

    texts: Sequence[str]
    messages: Sequence[Sequence[Mapping[str, Any]]]

    def check(self, method: PruningMethod, tokenizer: Any) -> None:
        """UserError unless one of them was given, in its form, and a tokenizer for it."""
        given = [(rows, kind) for rows, kind in ((self.texts, str), (self.messages, Sequence)) if not _is_empty(rows)]
        if len(given) > 1:
            raise UserError("prune_model: texts and messages were given; allowed: one of them")
        good = given and isinstance(given[0][0], Sequence) and not isinstance(given[0][0], str)
        if not callable(tokenizer) or not good or not all(isinstance(row, given[0][1]) for row in given[0][0]):
            raise UserError(
                f"prune_model: method {method.name} looks at text; give tokenizer= (a tokenizer of transformers) and "
                "texts=[...] (a list of strings), or messages=[[{'role': 'user', 'content': '...'}, ...], ...]"
            )

    def documents(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Documents, which the tokenizer knows how to read from now on."""
        if _is_empty(self.messages):
            return list(self.texts)
        chat = Conversations(tokenizer, _template(tokenizer))
        tokenizer.conversations = chat  # type: ignore[attr-defined]
        found = []
        for number, messages in enumerate(self.messages):
            try:
                found.append(chat.document({KEYS[0]: list(messages)}))
            except BadDocument as error:
                raise UserError(f"prune_model: {KEYS[0]}[{number}]: {error}") from error
        return found


def _is_empty(rows: Any) -> bool:
    return isinstance(rows, Sequence) and len(rows) == 0


def _template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The chat template of a tokenizer, the one for conversations without tools; UserError without one."""
    found = getattr(tokenizer, "chat_template", None)
    found = found.get("default") if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise UserError(
            "prune_model: messages were given and the tokenizer has no chat template; give that of a model that was "
            "made for conversations, set tokenizer.chat_template, or give texts=[...]"
        )
    return Template(found, tokenizer.name_or_path or "tokenizer", "give texts=[...]")


def _wanted(method: PruningMethod, samples: int | None, seq_length: int | None, seed: int) -> Calibration:
    """How many windows of which length: what is given, or else the method's own, or else `prune`'s."""
    own, usual = method.defaults, Calibration()
    return Calibration(
        samples=own.get("calibration_samples", usual.samples) if samples is None else samples,
        seq_length=own.get("calibration_seq_length", usual.seq_length) if seq_length is None else seq_length,
        seed=seed,
    )


def _calibration(
    method: PruningMethod,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    text: _Text,
    wanted: Calibration,
) -> CalibrationSet:
    text.check(method, tokenizer)
    tokenizer = copy.deepcopy(tokenizer)  # what is set for one model is not the caller's
    assert tokenizer is not None
    undraw(tokenizer)
    check_tokenizer(tokenizer, config.vocab_size)
    length = min(wanted.seq_length, config.max_position_embeddings)
    return windows_of(text.documents(tokenizer), tokenizer, wanted.samples, length, wanted.seed)


def _empty_like(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """A model of the same class, type and device in a smaller shape."""
    if config.blocks is not None:
        raise UserError(
            "prune_model: the layers of the answer differ in size, which transformers has no class for; use `prune`, "
            "`trim` and `export --layers padded` (or custom)"
        )
    parameter = next(model.parameters())
    written = type(model.config).from_dict(get_family(config.family).to_hf(config))
    # buffers such as rotary frequencies stay in float32, as in a model that is opened
    attention = model.config._attn_implementation
    made = type(model)._from_config(written, dtype=parameter.dtype, attn_implementation=attention)
    if model.generation_config is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    made.to(parameter.device)  # type: ignore[arg-type]
    return made.train(model.training)


@torch.no_grad()
def _written(pruned: PrunableModel, model: PreTrainedModel) -> PreTrainedModel:
    """`model` with the weights of `pruned`, zeros as +0.0."""
    places = _Parameters(model, pruned.config)
    tied = get_family(pruned.config.family).tied_names(pruned.config)
    for name, tensor in pruned.hf_weights():
        if name not in tied:
            places.place(name).copy_(tensor.masked_fill(tensor == 0, 0.0))
    return model
