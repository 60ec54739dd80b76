"""The checkpoints of IBM's foundation-model-stack (package `ibm-fms`, its LLaMA), by one table in both directions.

    fms_config.json       the fields of fms' LLaMAConfig, which `LLaMAConfig.load` reads; `hf_config`, which it passes
                          over, is the config.json that the model came from
    model*.safetensors    fms' state dict

    q, k, v                  qkv_fused, rows below each other            gate, up      wg1_fused, likewise
    a head's rows of q, k    fms turns channels (0, 1), (2, 3), ...; transformers (0, h/2), (1, h/2 + 1), ... of h

With `fused_weights` false the parts are tensors of their own. The package itself is not needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, nextafter
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import read_json
from megatron_prune.model import carried
from megatron_prune.model.config_json import LARGEST, LARGEST_NUMBER
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.stored import read_entries

CONFIG = "fms_config.json"
HF_CONFIG = "hf_config"
_EMBEDDING, _HEAD = "base_model.embedding.weight", "head.weight"
_AROUND = {"model.embed_tokens.weight": _EMBEDDING, "model.norm.weight": "base_model.dec_norm.weight"}
_LAYER: dict[str, dict[str, str]] = {
    "ln.weight": {"input_layernorm.weight": "ln.weight"},
    "attn.in_proj.qkv_fused.weight": {
        "self_attn.q_proj.weight": "attn.in_proj.query.weight",
        "self_attn.k_proj.weight": "attn.in_proj.key.weight",
        "self_attn.v_proj.weight": "attn.in_proj.value.weight",
    },
    "attn.dense.weight": {"self_attn.o_proj.weight": "attn.dense.weight"},
    "ff_ln.weight": {"post_attention_layernorm.weight": "ff_ln.weight"},
    "ff_sub_layer.wg1_fused.weight": {
        "mlp.gate_proj.weight": "ff_sub_layer.wg.weight",
        "mlp.up_proj.weight": "ff_sub_layer.w1.weight",
    },
    "ff_sub_layer.w2.weight": {"mlp.down_proj.weight": "ff_sub_layer.w2.weight"},
}
"""Of a layer: fms' fused tensor -> Hugging Face's parts, in order -> what fms calls a part that is not fused."""
_TURNED = ("q_proj.weight", "k_proj.weight")


_Size = Annotated[int, Field(ge=1, le=LARGEST["ffn_hidden_size"])]
_Number = Annotated[float, Field(gt=0, le=LARGEST_NUMBER)]


class _File(TypedDict, total=False):
    """What is read of fms' LLaMAConfig, and the config.json that our own export keeps in it."""

    src_vocab_size: _Size
    emb_dim: _Size
    norm_eps: _Number
    nheads: _Size
    kvheads: Annotated[int, Field(ge=0, le=LARGEST["num_query_groups"])]
    nlayers: _Size
    hidden_grow_factor: Annotated[float, Field(gt=0, le=1e6)]
    multiple_of: Annotated[int, Field(ge=0, le=LARGEST["ffn_hidden_size"])] | None
    max_expected_seq_len: Annotated[int, Field(ge=1, le=LARGEST["max_position_embeddings"])]
    tie_heads: bool
    rope_theta: _Number
    rope_scaling: dict[str, Any]
    fused_weights: bool
    hf_config: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lies in a checkpoint of fms."""

    name: str
    first: int
    """Its first row there."""
    rows: int
    turned: bool
    """Its rows have the other order in each head."""


def places(config: ModelConfig, fused: bool = True) -> dict[str, Place]:
    """Of every Hugging Face weight of a model."""
    shapes = _shapes(config)
    found = {hf: Place(name, 0, shapes[hf][0], False) for hf, name in _AROUND.items()}
    for layer in range(config.num_layers):
        for whole, parts in _LAYER.items():
            first = 0
            for hf, part in parts.items():
                name = f"model.layers.{layer}.{hf}"
                rows = shapes[name][0]
                there = f"base_model.layers.{layer}.{whole if fused else part}"
                found[name] = Place(there, first if fused else 0, rows, hf.endswith(_TURNED))
                first += rows
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = Place(_HEAD, 0, config.vocab_size, False)
    return found


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    maps = get_family(config.family).weights(config)
    return {name: shape for map in maps for name, shape in zip(map.hf, map.shapes, strict=True)}


def tensor_shapes(config: ModelConfig, fused: bool = True) -> dict[str, tuple[int, ...]]:
    """Of every tensor of fms' state dict; a tied model's has its output layer, too."""
    shapes: dict[str, tuple[int, ...]] = {}
    hf = _shapes(config)
    for name, place in places(config, fused).items():
        shapes[place.name] = (place.first + place.rows, *hf[name][1:])
    return shapes | {_HEAD: shapes[_EMBEDDING]}


def to_fms(config: ModelConfig, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face weights, in any order, -> fms' tensors; one is held until all of its parts have come."""
    where = places(config)
    waiting: dict[str, dict[int, Tensor]] = {}
    sizes = tensor_shapes(config)
    for hf, tensor in weights:
        place = where[hf]
        parts = waiting.setdefault(place.name, {})
        parts[place.first] = _to_pairs(tensor, config.kv_channels) if place.turned else tensor
        if sum(len(part) for part in parts.values()) == sizes[place.name][0]:
            whole = torch.cat([parts[first] for first in sorted(parts)])
            del waiting[place.name]
            yield place.name, whole
            if place.name == _EMBEDDING and config.tie_word_embeddings:
                yield _HEAD, whole


def _to_pairs(weight: Tensor, head: int) -> Tensor:
    """Rows of q or k, heads of `head` channels: those that are turned together come next to each other."""
    return weight.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)


def _from_pairs(weight: Tensor, head: int) -> Tensor:
    """Inverse of `_to_pairs`."""
    return weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)


def fms_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of LLaMAConfig; UserError when fms' LLaMA is no such model."""
    check_model(config)
    pad = config.hf_config.get("pad_token_id")
    return {
        "src_vocab_size": config.vocab_size,
        "emb_dim": config.hidden_size,
        "norm_eps": config.layernorm_epsilon,
        "nheads": config.num_attention_heads,
        "kvheads": config.num_query_groups,
        "nlayers": config.num_layers,
        "pad_id": -1 if pad is None else pad,
        "hidden_grow_factor": _grow_factor(config.ffn_hidden_size, config.hidden_size),
        "multiple_of": 1,
        "activation_fn": "swish",
        "p_dropout": 0.0,
        "max_expected_seq_len": config.max_position_embeddings,
        "attn_bias": False,
        "mlp_bias": False,
        "tie_heads": config.tie_word_embeddings,
        "rope_theta": config.rotary_base,
        "rope_scaling": dict(config.rope_scaling or {}),
        "linear_config": None,
        "fused_weights": True,
    }


def _grow_factor(ffn: int, hidden: int) -> float:
    """fms rounds the product with the hidden size down."""
    factor = ffn / hidden
    return factor if int(factor * hidden) == ffn else nextafter(factor, inf)


def check_model(config: ModelConfig) -> None:
    """UserError for a model that fms' LLaMA cannot be."""
    head = config.kv_channels
    if config.family != "llama":
        raise UserError(f"the fms form is for LLaMA models and this is a {config.family} model; use --format hf")
    if config.blocks is not None:
        raise UserError("in the fms form all layers are alike and those of this model differ; use --layers padded")
    if config.num_attention_heads * head != config.hidden_size:
        raise UserError(
            f"the fms form has heads that make up hidden_size, and this model has {config.num_attention_heads} of "
            f"{head} channels and hidden_size {config.hidden_size}; use --format hf"
        )


def hf_config(given: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The config.json of fms' config in `file`; UserError for what it has and a LLaMA model here has not."""
    only: dict[str, tuple[Any, ...]] = {
        "activation_fn": ("swish", "silu"),
        "attn_bias": (False,),
        "mlp_bias": (False,),
        "linear_config": (None,),
    }
    for key, allowed in only.items():
        if given.get(key, allowed[0]) not in allowed:
            raise UserError(f"{file} has {key}: {brief(given[key])}; allowed: {' or '.join(map(repr, allowed))}")
    try:
        multiple, ffn = given["multiple_of"] or 1, int(given["hidden_grow_factor"] * given["emb_dim"])
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": given["src_vocab_size"],
            "hidden_size": given["emb_dim"],
            "intermediate_size": -(-ffn // multiple) * multiple,
            "num_hidden_layers": given["nlayers"],
            "num_attention_heads": given["nheads"],
            "num_key_value_heads": given["kvheads"] or given["nheads"],
            "hidden_act": "silu",
            "rms_norm_eps": given["norm_eps"],
            "max_position_embeddings": given["max_expected_seq_len"],
            "tie_word_embeddings": given["tie_heads"],
            "rope_parameters": {"rope_type": "default", **_scaling(given), "rope_theta": given["rope_theta"]},
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no config of fms' LLaMA ({error!r}); LLaMAConfig.save writes one") from error


def _scaling(given: Mapping[str, Any]) -> dict[str, Any]:
    """fms calls no scaling `regular`."""
    scaling = dict(given["rope_scaling"])
    return {} if scaling.get("rope_type") == "regular" else scaling


def is_fms(path: Path) -> bool:
    """Whether a folder is a checkpoint of fms with its config."""
    return (path / CONFIG).is_file()


class FmsReader(HFReader):
    """A checkpoint of fms as if it were a Hugging Face directory, checked when opened."""

    configs = (CONFIG,)

    def left_behind(self) -> str | None:
        """As the base class; every tensor is a weight."""
        return carried.told(self.directory, self.config, self.configs, ())

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        file = directory / CONFIG
        what = "a checkpoint of fms"
        read_json(file, what, _File)
        given = read_json(file, what)
        self.config = copy.deepcopy(given[HF_CONFIG]) if HF_CONFIG in given else hf_config(given, file)
        self._entries = read_entries(directory)
        self.model_config = self._model_config()
        self._maps = get_family(self.model_config.family).weights(self.model_config)
        fused = given.get("fused_weights", True)
        for key, value in fms_config(self.model_config).items():
            if HF_CONFIG in given and key != "fused_weights" and given.get(key) != value:
                raise UserError(
                    f"{file} has {key}: {brief(given.get(key))} and {brief(value)} in its {HF_CONFIG}; remove "
                    f"{HF_CONFIG} if the other is right"
                )
        self._places = places(self.model_config, fused)
        self._check_fms_tensors(tensor_shapes(self.model_config, fused))

    def _check_fms_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        tied = self.model_config.tie_word_embeddings
        for name, shape in shapes.items():
            if name in self._entries or not (tied and name == _HEAD):
                self._check_tensor(name, shape)
        for name in sorted(set(self._entries) - set(shapes)):
            raise UserError(
                f"{self._entries[name].file} holds {name}, which this model does not have; it would be lost"
            )
        if tied and _HEAD in self._entries:
            self._check_tied(_HEAD, _EMBEDDING)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """As the base class."""
        return self.read(name)[first:last]

    def read(self, name: str) -> Tensor:
        """The Hugging Face tensor ``name``, in the dtype it is stored in."""
        place = self._places.get(name)
        if place is None:  # fms' own name
            return super().read(name)
        tensor = super().read_rows(place.name, place.first, place.first + place.rows)
        return _from_pairs(tensor, self.model_config.kv_channels) if place.turned else tensor
