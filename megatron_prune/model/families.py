"""Model families as data: how a Hugging Face config.json maps to sizes, and which Hugging Face tensors make
up which Megatron tensor. One table per family serves both directions and every parallel layout; adding a
family means adding an entry to ``FAMILIES``. Nothing here knows a device or a process group.

Symbolic sizes of the tables (``dimensions`` gives the numbers):
``vocab``, ``hidden``, ``ffn``, ``query`` = heads * kv_channels, ``key_value`` = groups * kv_channels,
``group_rows`` = rows of one query group in linear_qkv, ``group_inputs`` = inputs of one query group in
linear_proj.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from megatron_prune.errors import UserError

Transform = Literal["copy", "qkv", "gated"]

_DTYPES = ("bfloat16", "float16", "float32")
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model, in Megatron's names, with the config.json they came from."""

    family: str
    """Name of the family in ``FAMILIES``."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the gated MLP (one of gate and up)."""
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
    rope_scaling: dict[str, Any] | None = field(hash=False)
    """None, or the four llama3 keys of Hugging Face plus ``rope_type``: ``llama3``."""
    tie_word_embeddings: bool
    dtype: str
    """One of bfloat16, float16, float32."""
    hf_config: dict[str, Any] = field(hash=False, repr=False)
    """The config.json this came from, verbatim."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; ``from_dict`` inverts it."""
        return copy.deepcopy(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config that ``to_dict`` wrote; UserError names missing and unknown fields."""
        names = {item.name for item in fields(cls)}
        if set(values) != names:
            raise UserError(
                f"model config has unknown fields {sorted(set(values) - names)} and lacks "
                f"{sorted(names - set(values))}; was it written by another version?"
            )
        return cls(**copy.deepcopy(dict(values)))

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
    """Shape of each Hugging Face tensor."""
    transform: Transform
    shard_dim: int | None
    """Dimension split over tensor-parallel ranks; None: the same on every rank."""
    shard_unit: int
    """Rows (shard_dim 0) or inputs (shard_dim 1) that must stay on one rank."""
    pad_rows: bool
    """Rows are the vocabulary: padded with zeros to a multiple of the tensor-parallel size."""
    prunable: bool
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unsharded Megatron tensor: the Hugging Face tensors stacked along dimension 0."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


@dataclass(frozen=True)
class WeightPattern:
    """One row of a family's table; ``{layer}`` stands for the layer number, sizes are symbolic."""

    megatron: str
    hf: Mapping[str, tuple[str, ...]]
    """Hugging Face name -> symbolic shape, in the order the transform takes them."""
    transform: Transform = "copy"
    shard_dim: int | None = None
    shard_unit: str = "one"
    pad_rows: bool = False
    prunable: bool = False
    untied_only: bool = False
    """Absent when the output layer shares the embedding's weight."""


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
    ignored: tuple[str, ...] = ()
    """Hugging Face name patterns (fnmatch) that carry no weights and may be in a file."""

    def from_hf(self, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Sizes from a config.json in the style of transformers 4 or 5; UserError for what cannot be
        represented.
        """
        self._check_supported(hf_config)
        values = {name: self._value(hf_config, key) for name, key in self.keys.items()}
        _check_values(values)
        if values["num_query_groups"] is None:
            values["num_query_groups"] = values["num_attention_heads"]
        if values["kv_channels"] is None:
            values["kv_channels"] = _implied_kv_channels(values["hidden_size"], values["num_attention_heads"])
        base, scaling = _rope(hf_config)
        config = ModelConfig(
            **values,
            family=self.name,
            rotary_base=base,
            rope_scaling=scaling,
            dtype=_dtype(hf_config),
            hf_config=copy.deepcopy(dict(hf_config)),
        )
        _check_heads(config)
        return config

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The original config.json with the sizes of ``config``; verbatim when nothing changed."""
        written = copy.deepcopy(config.hf_config)
        original = self.from_hf(config.hf_config)
        if (original.rotary_base, original.rope_scaling) != (config.rotary_base, config.rope_scaling):
            raise UserError(
                "the rotary position embedding differs from the one in the original config.json; "
                "only sizes and dtype may change"
            )
        changed = [name for name in self.keys if getattr(original, name) != getattr(config, name)]
        if changed:  # all of them: a head_dim left out would follow a changed hidden_size
            _check_loadable(config)
            written |= {key: getattr(config, name) for name, key in self.keys.items()}
        if original.dtype != config.dtype:
            written["torch_dtype" if "torch_dtype" in written else "dtype"] = config.dtype
        return written

    def weights(self, config: ModelConfig) -> list[WeightMap]:
        """Every Megatron tensor of the model, in model order."""
        layers = [row for row in self.table if "{layer}" in row.megatron]
        first = self.table.index(layers[0])
        before, after = self.table[:first], [row for row in self.table[first:] if row not in layers]
        maps = [_weight_map(row, config, None) for row in before]
        maps += [_weight_map(row, config, layer) for layer in range(config.num_layers) for row in layers]
        return maps + [
            _weight_map(row, config, None) for row in after if not (row.untied_only and config.tie_word_embeddings)
        ]

    def tied_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Hugging Face names that a tied model may store although they repeat the embedding."""
        rows = [row for row in self.table if row.untied_only] if config.tie_word_embeddings else []
        return tuple(name for row in rows for name in row.hf)

    def _check_supported(self, hf_config: Mapping[str, Any]) -> None:
        for key, allowed in self.supported.items():
            if hf_config.get(key, allowed[0]) not in allowed:
                raise UserError(
                    f"config.json has {key}: {hf_config[key]!r}; the {self.name} family supports "
                    f"{' or '.join(repr(value) for value in allowed)} only"
                )

    def _value(self, hf_config: Mapping[str, Any], key: str) -> Any:
        value = self.defaults.get(key) if hf_config.get(key) is None else hf_config[key]
        if value is None and key not in self.defaults:
            raise UserError(f"config.json lacks {key}, which the {self.name} family needs; is the file complete?")
        return value


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Numbers for the symbolic sizes of the tables."""
    heads_per_group = config.num_attention_heads // config.num_query_groups
    return {
        "one": 1,
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "ffn": config.ffn_hidden_size,
        "query": config.num_attention_heads * config.kv_channels,
        "key_value": config.num_query_groups * config.kv_channels,
        "group_rows": (heads_per_group + 2) * config.kv_channels,
        "group_inputs": heads_per_group * config.kv_channels,
    }


def get_family(name: str) -> Family:
    """The family called ``name``; UserError names the nearest and lists all."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown model family {name!r}; {hint}allowed: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its ``model_type``; UserError lists the supported ones."""
    model_type = hf_config.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    allowed = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise UserError(f"config.json has model_type {model_type!r}; supported: {', '.join(allowed)}")


def _weight_map(row: WeightPattern, config: ModelConfig, layer: int | None) -> WeightMap:
    size = dimensions(config)
    return WeightMap(
        megatron=row.megatron.format(layer=layer),
        hf=tuple(name.format(layer=layer) for name in row.hf),
        shapes=tuple(tuple(size[symbol] for symbol in shape) for shape in row.hf.values()),
        transform=row.transform,
        shard_dim=row.shard_dim,
        shard_unit=size[row.shard_unit],
        pad_rows=row.pad_rows,
        prunable=row.prunable,
        layer=layer,
    )


def _implied_kv_channels(hidden_size: int, heads: int) -> int:
    if hidden_size % heads:
        raise UserError(
            f"config.json has hidden_size {hidden_size} and {heads} attention heads but no head_dim; "
            "without head_dim the heads must divide hidden_size"
        )
    return hidden_size // heads


def _rope(hf_config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Rotary base and llama3 scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` +
    ``rope_scaling``.
    """
    given = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"config.json gives {given!r} as rope parameters; they must be an object")
    base = float(_number("rope_theta", given.get("rope_theta", hf_config.get("rope_theta", 10000.0))))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json has partial_rotary_factor {given['partial_rotary_factor']}; supported: 1.0 only")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(f"config.json has rope type {kind!r}; supported: 'default', 'llama3'")
    missing = [key for key in _LLAMA3_KEYS if given.get(key) is None]
    if missing:
        raise UserError(f"config.json has rope type 'llama3' without {', '.join(missing)}")
    return base, {"rope_type": "llama3", **{key: _number(key, given[key]) for key in _LLAMA3_KEYS}}


def _dtype(hf_config: Mapping[str, Any]) -> str:
    """``dtype`` or ``torch_dtype``; float32 when config.json says nothing, as transformers 4 had it."""
    given = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32").removeprefix("torch.")
    if given not in _DTYPES:
        raise UserError(f"config.json has dtype {given!r}; supported: {', '.join(_DTYPES)}")
    return given


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise UserError(f"config.json gives {name} = {value!r}; it must be a number above 0")
    return value


def _check_values(values: Mapping[str, Any]) -> None:
    """Types of what config.json gives for ModelConfig fields; None is a size that follows from others."""
    for name, value in values.items():
        if name == "layernorm_epsilon":
            _number(name, value)
        elif name == "tie_word_embeddings":
            if not isinstance(value, bool):
                raise UserError(f"config.json gives {name} = {value!r}; it must be true or false")
        elif value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"config.json gives {name} = {value!r}; it must be a whole number of at least 1")


def _check_heads(config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_query_groups:
        raise UserError(
            f"config.json has {config.num_attention_heads} attention heads and {config.num_query_groups} "
            "key/value heads; the second must divide the first"
        )
    if config.kv_channels % 2:
        raise UserError(f"config.json gives a head width of {config.kv_channels}; rotary embeddings need an even one")


def _check_loadable(config: ModelConfig) -> None:
    """Transformers 5 refuses a hidden_size that the heads do not divide, even when head_dim is given."""
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} is not a multiple of the {config.num_attention_heads} "
            "attention heads; transformers opens no such model: choose a multiple"
        )


_LLAMA_LAYER = "model.layers.{layer}."
_MEGATRON_LAYER = "decoder.layers.{layer}."

_LLAMA_TABLE = (
    WeightPattern(
        "embedding.word_embeddings.weight",
        {"model.embed_tokens.weight": ("vocab", "hidden")},
        shard_dim=0,
        pad_rows=True,
    ),
    WeightPattern(_MEGATRON_LAYER + "input_layernorm.weight", {_LLAMA_LAYER + "input_layernorm.weight": ("hidden",)}),
    WeightPattern(
        _MEGATRON_LAYER + "self_attention.linear_qkv.weight",
        {
            _LLAMA_LAYER + "self_attn.q_proj.weight": ("query", "hidden"),
            _LLAMA_LAYER + "self_attn.k_proj.weight": ("key_value", "hidden"),
            _LLAMA_LAYER + "self_attn.v_proj.weight": ("key_value", "hidden"),
        },
        transform="qkv",
        shard_dim=0,
        shard_unit="group_rows",
        prunable=True,
    ),
    WeightPattern(
        _MEGATRON_LAYER + "self_attention.linear_proj.weight",
        {_LLAMA_LAYER + "self_attn.o_proj.weight": ("hidden", "query")},
        shard_dim=1,
        shard_unit="group_inputs",
        prunable=True,
    ),
    WeightPattern(
        _MEGATRON_LAYER + "pre_mlp_layernorm.weight",
        {_LLAMA_LAYER + "post_attention_layernorm.weight": ("hidden",)},
    ),
    WeightPattern(
        _MEGATRON_LAYER + "mlp.linear_fc1.weight",
        {
            _LLAMA_LAYER + "mlp.gate_proj.weight": ("ffn", "hidden"),
            _LLAMA_LAYER + "mlp.up_proj.weight": ("ffn", "hidden"),
        },
        transform="gated",
        shard_dim=0,
        prunable=True,
    ),
    WeightPattern(
        _MEGATRON_LAYER + "mlp.linear_fc2.weight",
        {_LLAMA_LAYER + "mlp.down_proj.weight": ("hidden", "ffn")},
        shard_dim=1,
        prunable=True,
    ),
    WeightPattern("decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)}),
    WeightPattern(
        "output_layer.weight",
        {"lm_head.weight": ("vocab", "hidden")},
        shard_dim=0,
        pad_rows=True,
        untied_only=True,
    ),
)

_LLAMA = Family(
    name="llama",
    model_types=("llama",),
    keys={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "layernorm_epsilon": "rms_norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "quantization_config": (None,),
    },
    table=_LLAMA_TABLE,
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (_LLAMA,)}
