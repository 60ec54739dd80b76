"""What a model family is: how a Hugging Face config.json maps to a ``ModelConfig``, and which Hugging Face
tensors make up which Megatron tensor. The families themselves are data, in ``families``. Nothing here knows a
device or a process group.

Symbolic sizes of the tables (``dimensions`` gives the numbers):
``vocab``, ``positions``, ``hidden``, ``ffn``, ``head`` = kv_channels, ``query`` = heads * kv_channels,
``key_value`` = groups * kv_channels, ``qkv`` = query + 2 * key_value, ``group_rows`` = rows of one query group in
linear_qkv, ``group_inputs`` = inputs of one query group in linear_proj. Those of a layer are that layer's own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import bounded, check_shape, names, strict
from megatron_prune.model import blocks as block_list
from megatron_prune.model import quantised
from megatron_prune.model.blocks import Block, widest

if TYPE_CHECKING:  # environments without PyTorch read these tables too
    from torch import Tensor

Transform = Literal["copy", "qkv", "fused_qkv", "gated"]

_DTYPES = ("bfloat16", "float16", "float32")
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of transformers 5 and 4; where both are given, the first is read."""
FIXED = ("tie_word_embeddings", "rotary_base", "rope_scaling", "rotary_percent", "sliding_window", "layernorm_epsilon")
"""Fields of a ModelConfig that no pruning changes."""
_FULL_ATTENTION = "full_attention"
_ATTENTION = ("decoder.layers.{layer}.input_layernorm.", "decoder.layers.{layer}.self_attention.")
"""Start of the Megatron names of a layer's first half; the rest of the layer is the MLP."""
LARGEST: dict[str, int] = {
    "num_layers": 10_000,
    "hidden_size": 2**20,
    "ffn_hidden_size": 2**22,
    "num_attention_heads": 2**16,
    "num_query_groups": 2**16,
    "kv_channels": 2**16,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31 - 1,
    "sliding_window": 2**31 - 1,
}
"""Of ModelConfig's sizes: far beyond any model, and lists and tensors of them still end."""
LARGEST_NUMBER = 1e30
"""Of its constants; squared, a float64 still holds it."""
_LARGEST_NUMBERS = {"layernorm_epsilon": 1.0, "factor": 1e6, "low_freq_factor": 1e6, "high_freq_factor": 1e6}
"""Of those constants that are small in any model."""
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_FOREIGN: Mapping[str, tuple[Any, ...]] = {
    "per_layer_config": (None, [], {}),
    "is_causal": (None, True),
    "transformers_weights": (None, "model.safetensors", "model.safetensors.index.json"),
}
"""config.json keys with which transformers opens another model than the family's; the values that change nothing."""
NOT_CARRIED = (
    *("auto_map", "custom_pipelines", "transformers_weights", "fusion_config", "distributed_config", "device_map"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal", "use_kernels"),
    *("base_model_tp_plan", "base_model_pp_plan", quantised.KEY),
)
"""config.json keys that name code, kernels or files of the source: an export has none of them."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model, in Megatron's names, with the config.json they came from."""

    __pydantic_config__ = strict()

    family: str
    """Name of the family in ``FAMILIES``."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the MLP (of one of gate and up when it is gated)."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; divides num_attention_heads."""
    kv_channels: int
    """Width of one head; need not be hidden_size / num_attention_heads."""
    vocab_size: int
    """Without padding."""
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    """0 when positions are learned."""
    rope_scaling: dict[str, Any] | None = field(hash=False)
    """None, or the four llama3 keys of Hugging Face plus ``rope_type``: ``llama3``."""
    tie_word_embeddings: bool
    dtype: str
    """One of bfloat16, float16, float32."""
    hf_config: dict[str, Any] = field(hash=False, repr=False)
    """The config.json this came from, verbatim."""
    activation: str = "silu"
    """Of the MLP, by its name in transformers."""
    gated: bool = True
    """The MLP multiplies activation(gate) with up."""
    normalization: Literal["RMSNorm", "LayerNorm", "LayerNorm1P"] = "RMSNorm"
    """LayerNorm1P stores its gain minus one."""
    linear_bias: bool = False
    """Every linear layer of the decoder has a bias."""
    qkv_bias: bool = False
    """The query, key and value projections have one."""
    qk_layernorm: bool = False
    """Queries and keys are normalised, head by head, before the rotation."""
    position_embedding: Literal["rope", "learned"] = "rope"
    rotary_percent: float = 1.0
    """Share of a head, from its first channel on, that is rotated."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself included; None: all before it."""
    blocks: tuple[Block, ...] | None = None
    """Sizes of each layer where they differ, as `with_blocks` sets them; then the heads, groups and ffn above are those
    of the smallest layer that holds them all. None: they are every layer's."""

    def __post_init__(self) -> None:
        if self.blocks is None:
            return
        if len(self.blocks) != self.num_layers or self._layer_sizes() != widest(self.blocks):
            raise ValueError("the sizes of the layers contradict those of the model; set them by with_blocks")

    def _layer_sizes(self) -> Block:
        return Block(self.num_attention_heads, self.num_query_groups, self.ffn_hidden_size)

    @property
    def gain_offset(self) -> float:
        """What a norm adds to its stored gain before use."""
        return 1.0 if self.normalization == "LayerNorm1P" else 0.0

    @property
    def centred_norm(self) -> bool:
        """Whether norms take off the mean of their channels, and divide by the standard deviation."""
        return self.normalization != "RMSNorm"

    def block(self, layer: int | None) -> Block:
        """Sizes of a layer; of the widest without a number."""
        return self._layer_sizes() if self.blocks is None or layer is None else self.blocks[layer]

    def with_blocks(self, blocks: Sequence[Block]) -> ModelConfig:
        """The model with these layers, one entry for each; ``blocks`` stays None when all are alike and whole.

        UserError when no layer keeps its attention, or none its MLP.
        """
        most = widest(blocks)
        for what, count in (("attention", most.num_attention_heads), ("MLP", most.ffn_hidden_size)):
            if not count:
                raise UserError(f"no layer keeps its {what}; at least one of the {len(blocks)} must")
        sizes = {name: getattr(most, name) for name in Block.__dataclass_fields__}
        different = None if set(blocks) == {most} else tuple(blocks)
        return replace(self, num_layers=len(blocks), blocks=different, **sizes)

    def check_length(self, length: int) -> None:
        """UserError when a sequence is longer than the learned position embeddings."""
        if self.position_embedding == "learned" and length > self.max_position_embeddings:
            raise UserError(
                f"sequences of {length} tokens were asked for and the model has learned positions for "
                f"{self.max_position_embeddings}: use {self.max_position_embeddings} or less"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; ``from_dict`` inverts it."""
        values = copy.deepcopy(asdict(self))
        if self.blocks is None:
            del values["blocks"]  # as configs of uniform models have always been written
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config that ``to_dict`` wrote; UserError names missing and unknown fields."""
        names = {item.name for item in fields(cls)}
        needed = {item.name for item in fields(cls) if item.default is MISSING}
        if not needed <= set(values) <= names:
            raise UserError(
                f"model config has unknown fields {sorted(set(values) - names)} and lacks "
                f"{sorted(needed - set(values))}; was it written by another version?"
            )
        given = copy.deepcopy(dict(values))
        if given.get("blocks") is not None:
            given["blocks"] = tuple(Block(**block) for block in given["blocks"])
        return cls(**given)

    def fingerprint(self) -> str:
        """sha256 of the sizes and constants (not of hf_config): equal for models whose tensors are
        interchangeable.
        """
        values = {key: value for key, value in self.to_dict().items() if key != "hf_config"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class WeightMap:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    megatron: str
    """Unsharded name with the global layer number."""
    hf: tuple[str, ...]
    """Hugging Face names, in the order the transform takes them."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each Hugging Face tensor as it is stored."""
    symbols: tuple[tuple[str, ...], ...]
    """Symbolic shape of each Hugging Face tensor, rows first."""
    transform: Transform
    shard_dim: int | None
    """Dimension split over tensor-parallel ranks; None: the same on every rank."""
    shard_unit: int
    """Rows (shard_dim 0) or inputs (shard_dim 1) that must stay on one rank."""
    pad_rows: bool
    """Rows are the vocabulary: padded with zeros to a multiple of the tensor-parallel size."""
    prunable: bool
    layer: int | None
    transposed: bool = False
    """The Hugging Face tensors are stored `[in, out]`."""

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each Hugging Face tensor with its rows, the outputs, first."""
        return tuple(shape[::-1] for shape in self.shapes) if self.transposed else self.shapes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unsharded Megatron tensor: the Hugging Face tensors stacked along their rows."""
        return (sum(shape[0] for shape in self.row_shapes), *self.row_shapes[0][1:])


@dataclass(frozen=True)
class WeightPattern:
    """One row of a family's table; ``{layer}`` stands for the layer number, sizes are symbolic."""

    megatron: str
    hf: Mapping[str, tuple[str, ...]]
    """Hugging Face name -> symbolic shape, rows first, in the order the transform takes them."""
    transform: Transform = "copy"
    shard_dim: int | None = None
    shard_unit: str = "one"
    pad_rows: bool = False
    prunable: bool = False
    untied_only: bool = False
    """Absent when the output layer shares the embedding's weight."""

    def present(self, block: Block) -> bool:
        """Whether a layer of these sizes has the half that this row is of."""
        return bool(block.num_attention_heads if self.megatron.startswith(_ATTENTION) else block.ffn_hidden_size)


@dataclass(frozen=True)
class Family:
    """Config keys and weight table of one kind of model; all data, shared code."""

    name: str
    model_types: tuple[str, ...]
    """Values of ``model_type`` in config.json."""
    keys: Mapping[str, str]
    """ModelConfig field -> config.json key."""
    defaults: Mapping[str, Any]
    """config.json key -> value meant when the key is absent; keys without a default are required."""
    supported: Mapping[str, tuple[Any, ...]]
    """config.json key -> values this family can represent (the first is meant when the key is absent)."""
    table: tuple[WeightPattern, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    """ModelConfig field -> its value in every model of the family, where it is not LLaMA's."""
    nullable: tuple[str, ...] = ()
    """config.json keys whose null has a meaning of its own and does not stand for the default."""
    partial_rotary: float | None = None
    """Share of a head that is rotated when config.json does not say; None: whole heads are, always."""
    conv1d: bool = False
    """Linear weights are stored `[in, out]`, as transformers' Conv1D has them."""
    head: str = "ForCausalLM"
    """How transformers' class of its language models ends."""
    prefix: str = "model."
    """Start of the names that a checkpoint saved from the bare transformer, without its output layer, lacks."""
    windowed: bool = False
    """With `use_sliding_window` the layers from `max_window_layers` on see `sliding_window` tokens only."""
    ignored: tuple[str, ...] = ()
    """Hugging Face name patterns (fnmatch) that carry no weights and may be in a file."""

    def from_hf(self, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Sizes from a config.json in the style of transformers 4 or 5; UserError for what cannot be
        represented.
        """
        _check_types(hf_config)
        if block_list.KEY in hf_config:
            return self._from_blocks(hf_config)
        self._check_supported(hf_config)
        values = {name: self._value(hf_config, key) for name, key in self.keys.items()}
        _check_values(values)
        config = ModelConfig(
            **_implied_sizes(values),
            **self._positions(hf_config),
            **self.constants,
            family=self.name,
            dtype=_dtype(hf_config),
            hf_config=copy.deepcopy(dict(hf_config)),
        )
        _check_heads(config)
        return config

    def _from_blocks(self, hf_config: Mapping[str, Any]) -> ModelConfig:
        """A config.json with a list of layers; what is kept of it is the ordinary one of the widest layer."""
        plain, blocks = block_list.remove(hf_config)
        config = self.from_hf(plain)
        if len(blocks) != config.num_layers:
            raise UserError(
                f"config.json has {config.num_layers} layers and {len(blocks)} {block_list.KEY}; there is one for each"
            )
        return config.with_blocks(blocks)

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The original config.json with the sizes of ``config``; verbatim when nothing changed.

        One whose layers differ has their list, and a ``model_type`` of its own: `block_configs` in ``blocks``.
        """
        if config.blocks is not None:
            return block_list.add(self.to_hf(self.uniform(config)), config.blocks)
        written = self.carried(config.hf_config)
        original = self.from_hf(config.hf_config)
        if _rotary(original) != _rotary(config):
            raise UserError(
                "the rotary position embedding differs from the one in the original config.json; "
                "only sizes and dtype may change"
            )
        changed = [name for name in self.keys if getattr(original, name) != getattr(config, name)]
        if changed:  # all of them: a head_dim left out would follow a changed hidden_size
            _check_loadable(config)
            written |= {key: getattr(config, name) for name, key in self.keys.items()}
            if "layer_types" in written:
                written["layer_types"] = [_FULL_ATTENTION] * config.num_layers
        if original.dtype != config.dtype:
            written |= dict.fromkeys([key for key in _DTYPE_KEYS if key in written] or _DTYPE_KEYS[:1], config.dtype)
        if replace(self.from_hf(written), hf_config={}) != replace(config, hf_config={}):
            raise UserError(
                f"the config.json of a {self.name} model cannot express this one's shape; only sizes that it has a "
                f"key for may change: {', '.join(self.keys.values())}"
            )
        return written

    def carried(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """What an export's config.json has of the source's: all but `NOT_CARRIED`, and the class of a language model.

        A name of a type is written as transformers reads it, without `torch.`.
        """
        written = {key: copy.deepcopy(value) for key, value in hf_config.items() if key not in NOT_CARRIED}
        classes = written.get("architectures")
        if classes and not any(str(name).endswith(self.head) for name in classes):
            written["architectures"] = [_stem(classes[0]) + self.head]
        for key in _DTYPE_KEYS:
            if isinstance(written.get(key), str):
                written[key] = written[key].removeprefix("torch.")
        return written

    def check_origin(self, config: ModelConfig) -> None:
        """UserError where ``config`` contradicts the config.json that it came from in what never changes."""
        original = self.from_hf(config.hf_config)
        for name in FIXED:
            here, there = getattr(config, name), getattr(original, name)
            if here != there:
                raise UserError(f"{name} is {brief(here)} and its config.json says {brief(there)}")

    def uniform(self, config: ModelConfig) -> ModelConfig:
        """The smallest model without ``blocks`` into which every layer of ``config`` fits and that transformers opens.

        Heads that are added fill groups or are groups of their own; ``config`` itself where it is one already.
        UserError when there is none.
        """
        heads, groups = config.num_attention_heads, config.num_query_groups
        shapes = [
            (count, parts)
            for count in range(heads, config.hidden_size + 1)
            if self.opens(config, count)
            for parts in range(groups, count * groups // heads + 1)
            if count % parts == 0 and ("num_query_groups" in self.keys or parts == count)
        ]
        if not shapes:
            raise UserError(
                f"hidden_size {config.hidden_size} has no divisor from {heads} on that could be the number of attention"
                f" heads of a {self.name} model in transformers: keep fewer heads or a larger hidden size"
            )
        count, parts = min(shapes)
        return replace(config, num_attention_heads=count, num_query_groups=parts, blocks=None)

    def opens(self, config: ModelConfig, heads: int) -> bool:
        """Whether transformers opens a model of ``config`` with this many heads."""
        implied = "kv_channels" not in self.keys and heads * config.kv_channels != config.hidden_size
        return config.hidden_size % heads == 0 and not implied

    def weights(self, config: ModelConfig) -> list[WeightMap]:
        """Every Megatron tensor of the model, in model order; none for the absent halves of layers."""
        layers = [row for row in self.table if "{layer}" in row.megatron]
        first = self.table.index(layers[0])
        before, after = self.table[:first], [row for row in self.table[first:] if row not in layers]
        after = [row for row in after if not (row.untied_only and config.tie_word_embeddings)]
        places: list[tuple[WeightPattern, int | None]] = [(row, None) for row in before]
        places += [
            (row, layer) for layer in range(config.num_layers) for row in layers if row.present(config.block(layer))
        ]
        places += [(row, None) for row in after]
        return [_weight_map(row, config, layer, self.conv1d) for row, layer in places]

    def as_rows(self, tensor: Tensor) -> Tensor:
        """A prunable Hugging Face weight, or its mask, as `[out, in]`."""
        return tensor.t() if self.conv1d else tensor

    def tied_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Hugging Face names that a tied model may store although they repeat the embedding."""
        rows = [row for row in self.table if row.untied_only] if config.tie_word_embeddings else []
        return tuple(name for row in rows for name in row.hf)

    def _check_supported(self, hf_config: Mapping[str, Any]) -> None:
        quantised.check_config(hf_config)
        for key, allowed in {**_FOREIGN, **self.supported}.items():
            if not _among(hf_config.get(key, allowed[0]), allowed):
                raise UserError(
                    f"config.json has {key}: {brief(hf_config[key])}; the {self.name} family supports "
                    f"{' or '.join(repr(value) for value in allowed)} only: give a model without it"
                )
        for kind in hf_config.get("layer_types") or ():
            if kind != _FULL_ATTENTION:
                raise UserError(f"config.json has layers of type {brief(kind)}; supported: {_FULL_ATTENTION!r} only")
        if self.windowed and not hf_config.get("layer_types"):
            _check_windows(hf_config)

    def _positions(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The ModelConfig fields of the rotary embedding."""
        if self.constants.get("position_embedding") == "learned":
            return {"rotary_base": 0.0, "rope_scaling": None}
        base, scaling, percent = _rope(hf_config)
        if self.partial_rotary is None and percent not in (None, 1.0):
            raise UserError(
                f"config.json has partial_rotary_factor {percent}; the {self.name} family supports 1.0 only"
            )
        return {"rotary_base": base, "rope_scaling": scaling, "rotary_percent": percent or self.partial_rotary or 1.0}

    def _value(self, hf_config: Mapping[str, Any], key: str) -> Any:
        if key in self.nullable and key in hf_config:
            return hf_config[key]
        value = self.defaults.get(key) if hf_config.get(key) is None else hf_config[key]
        if value is None and key not in self.defaults:
            raise UserError(f"config.json lacks {key}, which the {self.name} family needs; is the file complete?")
        return value


def dimensions(config: ModelConfig, layer: int | None = None) -> dict[str, int]:
    """Numbers for the symbolic sizes of the tables, in a layer, or without its number in the widest one."""
    block = config.block(layer)
    return {
        "one": 1,
        "vocab": config.vocab_size,
        "positions": config.max_position_embeddings,
        "hidden": config.hidden_size,
        "ffn": block.ffn_hidden_size,
        "head": config.kv_channels,
        "query": block.num_attention_heads * config.kv_channels,
        "key_value": block.num_query_groups * config.kv_channels,
        "qkv": (block.num_attention_heads + 2 * block.num_query_groups) * config.kv_channels,
        "group_rows": (block.group_heads + 2) * config.kv_channels,
        "group_inputs": block.group_heads * config.kv_channels,
    }


def rotary_channels(config: ModelConfig) -> int:
    """Channels of a head that are rotated."""
    return int(config.kv_channels * config.rotary_percent)


def _weight_map(row: WeightPattern, config: ModelConfig, layer: int | None, conv1d: bool) -> WeightMap:
    size = dimensions(config, layer)
    transposed = conv1d and row.prunable
    shapes = tuple(tuple(size[symbol] for symbol in shape) for shape in row.hf.values())
    return WeightMap(
        megatron=row.megatron.format(layer=layer),
        hf=tuple(name.format(layer=layer) for name in row.hf),
        shapes=tuple(shape[::-1] for shape in shapes) if transposed else shapes,
        symbols=tuple(tuple(shape) for shape in row.hf.values()),
        transform=row.transform,
        shard_dim=row.shard_dim,
        shard_unit=size[row.shard_unit],
        pad_rows=row.pad_rows,
        prunable=row.prunable,
        layer=layer,
        transposed=transposed,
    )


def _implied_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes, with those that config.json leaves to follow from others."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    return {
        **values,
        "ffn_hidden_size": values["ffn_hidden_size"] or 4 * hidden,
        "num_query_groups": values.get("num_query_groups") or heads,
        "kv_channels": values.get("kv_channels") or _implied_kv_channels(hidden, heads),
    }


def _implied_kv_channels(hidden_size: int, heads: int) -> int:
    if hidden_size % heads:
        raise UserError(
            f"config.json has hidden_size {hidden_size} and {heads} attention heads but no head_dim; "
            "without head_dim the heads must divide hidden_size"
        )
    return hidden_size // heads


def _rotary(config: ModelConfig) -> tuple[Any, ...]:
    return config.rotary_base, config.rope_scaling, config.rotary_percent


def _rope(hf_config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, float | None]:
    """Rotary base, llama3 scaling and share of a head, from ``rope_parameters`` (transformers 5) or ``rope_theta`` +
    ``rope_scaling`` + ``partial_rotary_factor``. Where both are there, ``rope_scaling`` counts, as in transformers.
    """
    given = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"config.json gives {brief(given)} as rope parameters; they must be an object")
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(
            f"config.json gives rope parameters for each type of layer ({brief(nested[0])}); supported: the same in "
            "all layers, written without that key"
        )
    base = float(_number("rope_theta", given.get("rope_theta", hf_config.get("rope_theta", 10000.0))))
    percent = given.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if percent is not None and not _number("partial_rotary_factor", percent) <= 1:
        raise UserError(f"config.json has partial_rotary_factor {brief(percent)}; it must be at most 1")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return base, None, percent
    if kind != "llama3":
        raise UserError(
            f"config.json has rope type {brief(kind)}; supported: 'default', 'llama3'. To prune the model for texts "
            "of the length that it was first trained on, take rope_scaling out, and put it into the export again"
        )
    return base, _llama3(given, hf_config), percent


def _llama3(given: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of that type; the length before it is the model's, where it is not given."""
    values = {_LLAMA3_KEYS[-1]: hf_config.get("max_position_embeddings", 2048)}
    values |= {key: given[key] for key in _LLAMA3_KEYS if given.get(key) is not None}
    missing = [key for key in _LLAMA3_KEYS if key not in values]
    if missing:
        raise UserError(f"config.json has rope type 'llama3' without {', '.join(missing)}; add what the model has")
    scaling = {key: _number(key, values[key]) for key in _LLAMA3_KEYS}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"config.json has low_freq_factor {scaling['low_freq_factor']} and high_freq_factor "
            f"{scaling['high_freq_factor']}; the first must be below the second"
        )
    return {"rope_type": "llama3", **scaling}


def _dtype(hf_config: Mapping[str, Any]) -> str:
    """``dtype`` or ``torch_dtype``; float32 when config.json says nothing, as transformers 4 had it."""
    given = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    name = given.removeprefix("torch.") if isinstance(given, str) else given
    if name not in _DTYPES:
        raise UserError(
            f"config.json has dtype {brief(name)}; supported: {', '.join(_DTYPES)}: save the model in one of them with "
            "AutoModelForCausalLM.from_pretrained(DIR, dtype=torch.bfloat16).save_pretrained(NEW_DIR)"
        )
    return name


def _number(name: str, value: Any) -> float:
    """A number above 0 that is no larger than can be believed."""
    most = _LARGEST_NUMBERS.get(name, LARGEST_NUMBER)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise UserError(f"config.json gives {name} = {brief(value)}; it must be a number above 0, at most {most:g}")
    return value


def _check_values(values: Mapping[str, Any]) -> None:
    """Types and ranges of what config.json gives for ModelConfig fields; None is a size that follows from others."""
    for name, value in values.items():
        if name == "layernorm_epsilon":
            _number(name, value)
        elif name == "tie_word_embeddings":
            if not isinstance(value, bool):
                raise UserError(f"config.json gives {name} = {brief(value)}; it must be true or false")
        elif name == "activation":
            continue  # among the family's supported values
        elif value is not None and (type(value) is not int or not 1 <= value <= LARGEST[name]):
            most = f" and at most {LARGEST[name]}" if type(value) is int and value > 0 else ""
            raise UserError(f"config.json gives {name} = {brief(value)}; it must be a whole number of at least 1{most}")


def check_config(config: ModelConfig, family: Family) -> None:
    """UserError for the sizes and constants of a config that no config.json of its family could give."""
    _check_values({name: getattr(config, name) for name in LARGEST})
    for name in ("layernorm_epsilon", *(["rotary_base"] if config.position_embedding == "rope" else [])):
        _number(name, getattr(config, name))
    constants = {item.name: family.constants.get(item.name, item.default) for item in fields(ModelConfig)}
    for name in ("gated", "normalization", "linear_bias", "qkv_bias", "qk_layernorm", "position_embedding"):
        if getattr(config, name) != constants[name]:
            raise UserError(f"{name} is {getattr(config, name)}; of a {family.name} model it is {constants[name]}")
    activations = family.supported.get(family.keys.get("activation", ""), (constants["activation"],))
    if config.activation not in activations or config.dtype not in _DTYPES or not 0 < config.rotary_percent <= 1:
        raise UserError(
            f"activation {brief(config.activation)}, dtype {brief(config.dtype)}, rotary_percent "
            f"{config.rotary_percent}; of a {family.name} model they are {' or '.join(activations)}, "
            f"{' or '.join(_DTYPES)} and above 0 and at most 1"
        )
    scaling = config.rope_scaling
    if scaling is not None and _rope({"rope_parameters": scaling})[1] != scaling:
        raise UserError(f"rope_scaling has keys {names(list(scaling))}; allowed: rope_type, {', '.join(_LLAMA3_KEYS)}")
    _check_heads(config)


def _among(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether a value is one of the allowed, in its type too: 0 is not False, 1 not True."""
    return any(type(value) is type(one) and value == one for one in allowed)


class _Keys(TypedDict, total=False):
    """Types of keys of config.json that are looked into."""

    model_type: str
    architectures: list[str] | None
    layer_types: list[str] | None
    use_sliding_window: bool | None
    sliding_window: int | None
    max_window_layers: int | None
    num_labels: bounded(0, 10_000) | None  # type: ignore[valid-type]  # transformers makes as many names


def _check_types(hf_config: Mapping[str, Any]) -> None:
    """UserError for a key of another type than it has in any model."""
    known = {key: hf_config[key] for key in _Keys.__annotations__ if key in hf_config}
    check_shape(known, "config.json", _Keys, "take it from the model's source again")


def _check_windows(hf_config: Mapping[str, Any]) -> None:
    """UserError when some layers of a family whose windows are switched on by a key see a part of the text only."""
    if not hf_config.get("use_sliding_window") or hf_config.get("sliding_window", 4096) is None:
        return
    first, layers = hf_config.get("max_window_layers", 28), hf_config.get("num_hidden_layers")
    if first is None or not isinstance(layers, int) or first < layers:
        raise UserError(
            f"config.json has use_sliding_window: True for the layers from {first} on; supported: False, or "
            "max_window_layers of all layers"
        )


def _stem(name: str) -> str:
    """`Llama` of the name of any of transformers' classes, `LlamaModel` or `LlamaForSequenceClassification`."""
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|PreTrainedModel|Model)$", "", name)


def _check_heads(config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_query_groups:
        raise UserError(
            f"config.json has {config.num_attention_heads} attention heads and {config.num_query_groups} "
            "key/value heads; the second must divide the first"
        )
    if config.position_embedding == "rope" and rotary_channels(config) % 2:
        raise UserError(f"config.json gives a head width of {config.kv_channels}; rotary embeddings need an even one")


def _check_loadable(config: ModelConfig) -> None:
    """Transformers 5 refuses a hidden_size that the heads do not divide, even when head_dim is given."""
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} is not a multiple of the {config.num_attention_heads} "
            "attention heads; transformers opens no such model: choose a multiple, or export with --layers padded"
        )
