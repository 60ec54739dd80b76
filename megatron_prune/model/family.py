"""What a model family is: how a Hugging Face config.json maps to a ``ModelConfig``, and which Hugging Face
tensors make up which Megatron tensor. The families themselves are data, in ``families``. Nothing here knows a
device or a process group. The symbolic sizes of the tables are explained in ``sizes``.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import names
from megatron_prune.model import blocks as block_list
from megatron_prune.model import quantised
from megatron_prune.model.blocks import Block
from megatron_prune.model.config_json import (
    DTYPE_KEYS,
    DTYPES,
    FULL_ATTENTION,
    LARGEST,
    LLAMA3_KEYS,
    WINDOW,
    YARN_KEYS,
    among,
    check_number,
    check_types,
    check_values,
    check_windows,
    class_stem,
    implied_sizes,
    read_dtype,
    read_rope,
    read_sparse_layers,
    read_window_layers,
    split_rope,
)
from megatron_prune.model.sizes import ModelConfig, dimensions, rotary_channels
from megatron_prune.model.stored import Part

if TYPE_CHECKING:  # environments without PyTorch read these tables too
    from torch import Tensor

Transform = Literal["copy", "qkv", "fused_qkv", "gated"]
FIXED = (
    *("tie_word_embeddings", "rotary_base", "window_rotary_base", "query_pre_attn_scalar", "rope_scaling"),
    *("rotary_percent", "sliding_window", "layernorm_epsilon"),
    *("moe_router_topk", "moe_renormalize", "moe_router_score_function", "moe_router_expert_bias"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk", "moe_num_shared_experts"),
    *("moe_shared_expert_gate", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"),
)
"""Fields of a ModelConfig that no pruning changes."""
_ATTENTION = ("decoder.layers.{layer}.input_layernorm.", "decoder.layers.{layer}.self_attention.")
"""Start of the Megatron names of a layer's first half; the rest of the layer is the MLP."""
_DENSE = "decoder.layers.{layer}.mlp.linear_"
_SPARSE = tuple(f"decoder.layers.{{layer}}.mlp.{part}." for part in ("router", "experts", "shared_experts"))
"""Start of the Megatron names in one MLP, and in experts in its place."""
MOST_EXPERTS = 2**17
"""Of a model; beyond any, and lists of them still end."""
MORE_LAYERS = "num_nextn_predict_layers"
PATTERN = "sliding_window_pattern"
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
    expert: int | None = None
    """Global number of the expert that it is of."""
    transposed: bool = False
    """The Hugging Face tensors are stored `[in, out]`."""
    alternating: bool = False
    """Files have it in a tensor of all experts, as `Part.alternating` says; the names are those of its parts."""

    @property
    def alike(self) -> tuple[Any, ...]:
        """What linears have in common that have the same parameters: themselves, or the experts of a layer."""
        return (self.megatron,) if self.expert is None else (self.layer, self.megatron.split(".")[-2])

    @property
    def always_float32(self) -> bool:
        """Whether it is in float32 in a model of another type."""
        return self.megatron.endswith(".router.expert_bias")

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each Hugging Face tensor with its rows, the outputs, first."""
        return tuple(shape[::-1] for shape in self.shapes) if self.transposed else self.shapes

    def fused(self) -> Iterator[tuple[str, str, Part]]:
        """Of an expert's weight each Hugging Face name, the tensor in which transformers 5 has that of all experts of
        the layer, and which part of it it is; nothing of other weights.
        """
        if self.expert is None:
            return
        pair = len(self.hf) > 1
        for half, name in enumerate(self.hf):
            start = in_transformers(name.partition(".experts.")[0])
            end = ("gate_up_proj" if pair else "down_proj") + ("_bias" if name.endswith(".bias") else "")
            yield name, f"{start}.experts.{end}", Part(self.expert, half if pair else None, self.alternating)

    def places(self) -> Iterator[tuple[str, str, Part | None]]:
        """Each Hugging Face name, the parameter of transformers' model that it is in, and which part; None: all."""
        fused = {name: (place, part) for name, place, part in self.fused()}
        for name in self.hf:
            yield name, *fused.get(name, (in_transformers(name), None))

    def fused_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of those tensors by their names."""
        one = self.shape[::-1] if self.alternating else self.shape
        return {name: (config.block(self.layer).num_moe_experts, *one) for _, name, _ in self.fused()}

    def stored(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of a written file that it is in."""
        return self.fused_shapes(config) if self.alternating else dict(zip(self.hf, self.shapes, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unsharded Megatron tensor: the Hugging Face tensors stacked along their rows."""
        return (sum(shape[0] for shape in self.row_shapes), *self.row_shapes[0][1:])


@dataclass(frozen=True)
class WeightPattern:
    """One row of a family's table; ``{layer}`` stands for the layer number, ``{expert}`` for that of an expert in it,
    sizes are symbolic.
    """

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
    when: str = ""
    """A field of ModelConfig without which it is absent."""

    def present(self, block: Block) -> bool:
        """Whether a layer of these sizes has the part that this row is of."""
        if self.megatron.startswith(_ATTENTION):
            return bool(block.num_attention_heads)
        if self.megatron.startswith(_SPARSE):
            return bool(block.num_moe_experts)
        return bool(block.ffn_hidden_size) and not (self.megatron.startswith(_DENSE) and block.num_moe_experts)


def masked(maps: Iterable[WeightMap], leaves: Callable[[str], bool]) -> frozenset[tuple[Any, ...]]:
    """Linears that are masked, in part or as a whole, where weights stay dense by `leaves`; as `alike` names them."""
    return frozenset(map.alike for map in maps if map.prunable and not all(leaves(name) for name in map.hf))


def in_transformers(name: str) -> str:
    """A name in a file as transformers 5 has it in its model: Mixtral's experts and router are another module there."""
    return name.replace(".block_sparse_moe", ".mlp")


_TABLES: deque[tuple[Family, ModelConfig, tuple[WeightMap, ...]]] = deque(maxlen=2)
"""The last tables of weights that were made: that of a large mixture of experts has tens of thousands of rows."""


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
    alternating: bool = False
    """Files have the experts of a layer in one tensor each, `[experts, in, out]`, gate and up alternating."""
    conv1d: bool = False
    """Linear weights are stored `[in, out]`, as transformers' Conv1D has them."""
    head: str = "ForCausalLM"
    """How transformers' class of its language models ends."""
    prefix: str = "model."
    """Start of the names that a checkpoint saved from the bare transformer, without its output layer, lacks."""
    windowed: bool = False
    """With `use_sliding_window` the layers from `max_window_layers` on see `sliding_window` tokens only."""
    mixed_windows: int = 0
    """Above 0 `layer_types` says which layers see `sliding_window` tokens only; without it all but each of so many."""
    window_rope: tuple[float, float] | None = None
    """Layers with windows turn by a base of their own; this of the others and theirs, where config.json has none."""
    rope: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json about rotary positions that are meant where it has none of them."""
    rope_types: tuple[str, ...] = ("default", "llama3")
    """Scalings of rotary positions that it may have."""
    also: Mapping[str, str] = field(default_factory=dict)
    """config.json key -> another that means the same; both are read, and written where a size has changed."""
    sparse_layers: Literal["all", "step", "first_dense"] = "all"
    """Which layers have experts: by `decoder_sparse_step` and `mlp_only_layers`, or those after
    `first_k_dense_replace`.
    """
    more_layers: bool = False
    """Files may have layers behind the last, which predict further tokens and which transformers leaves out."""
    fp8_blocks: bool = False
    """Published in FP8 with a scale for each block of a weight, and in nothing else."""
    ignored: tuple[str, ...] = ()
    """Hugging Face name patterns (fnmatch) that carry no weights and may be in a file."""

    def from_hf(self, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Sizes from a config.json in the style of transformers 4 or 5; UserError for what cannot be
        represented.
        """
        check_types(hf_config)
        if block_list.KEY in hf_config:
            return self._from_blocks(hf_config)
        self._check_supported(hf_config)
        values = {name: self._value(hf_config, key) for name, key in self.keys.items()}
        check_values(values)
        if self.latent:
            _check_implied(hf_config, values)
        sizes = implied_sizes(values)
        config = ModelConfig(
            **sizes,
            **self._positions(hf_config),
            **self.constants,
            moe_layers=self._sparse_layers(hf_config, sizes["num_layers"]),
            window_layers=self._window_layers(hf_config, sizes["num_layers"]),
            family=self.name,
            dtype=read_dtype(hf_config),
            hf_config=copy.deepcopy(dict(hf_config)),
        )
        _check_heads(config)
        _check_experts(config)
        return config

    @property
    def latent(self) -> bool:
        """Whether keys and values of all heads are made from one narrow vector."""
        return "kv_lora_rank" in self.keys

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
        layers = range(config.num_layers)
        if changed:  # all of them: a head_dim left out would follow a changed hidden_size
            _check_loadable(config)
            written |= {key: getattr(config, name) for name, key in self.keys.items()}
            written |= {other: written[key] for key, other in self.also.items() if other in written}
            if self.mixed_windows or "layer_types" in written:
                kinds = [WINDOW if self.mixed_windows and config.window(n) else FULL_ATTENTION for n in layers]
                written["layer_types"] = kinds
            dense = [layer for layer in layers if not config.has_experts(layer)]
            if self.sparse_layers == "step":
                written |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
            if self.sparse_layers == "first_dense":
                written["first_k_dense_replace"] = len(dense)
        if original.dtype != config.dtype:
            written |= dict.fromkeys([key for key in DTYPE_KEYS if key in written] or DTYPE_KEYS[:1], config.dtype)
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
            written["architectures"] = [class_stem(classes[0]) + self.head]
        if written.get("model_type") in self.model_types:  # others are names that need code
            written["model_type"] = self.model_types[0]
        for key in DTYPE_KEYS:
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
        for family, known, found in _TABLES:
            if family is self and (known is config or known == config):
                return list(found)
        made = self._made_weights(config)
        _TABLES.appendleft((self, config, tuple(made)))
        return made

    def _made_weights(self, config: ModelConfig) -> list[WeightMap]:
        table = [row for row in self.table if not row.when or getattr(config, row.when)]
        layers = [row for row in table if "{layer}" in row.megatron]
        first = table.index(layers[0])
        before, after = table[:first], [row for row in table[first:] if row not in layers]
        after = [row for row in after if not (row.untied_only and config.tie_word_embeddings)]
        return [
            *(self._weight_map(row, config) for row in before),
            *(map for layer in range(config.num_layers) for map in self._layer_weights(layers, config, layer)),
            *(self._weight_map(row, config) for row in after),
        ]

    def _layer_weights(self, rows: list[WeightPattern], config: ModelConfig, layer: int) -> Iterator[WeightMap]:
        """Tensors of a layer; those of its experts expert by expert."""
        block = config.block(layer)
        there = [row for row in rows if row.present(block)]
        for of_experts, group in itertools.groupby(there, lambda row: "{expert}" in row.megatron):
            several = list(group)
            for expert in range(block.num_moe_experts) if of_experts else [None]:
                yield from (self._weight_map(row, config, layer, expert) for row in several)

    def _weight_map(
        self, row: WeightPattern, config: ModelConfig, layer: int | None = None, expert: int | None = None
    ) -> WeightMap:
        size = dimensions(config, layer)
        transposed = self.conv1d and row.prunable
        shapes = tuple(tuple(size[symbol] for symbol in shape) for shape in row.hf.values())
        return WeightMap(
            megatron=row.megatron.format(layer=layer, expert=expert),
            hf=tuple(name.format(layer=layer, expert=expert) for name in row.hf),
            shapes=tuple(shape[::-1] for shape in shapes) if transposed else shapes,
            symbols=tuple(tuple(shape) for shape in row.hf.values()),
            transform=row.transform,
            shard_dim=row.shard_dim,
            shard_unit=size[row.shard_unit],
            pad_rows=row.pad_rows,
            prunable=row.prunable,
            layer=layer,
            expert=expert,
            transposed=transposed,
            alternating=self.alternating and expert is not None,
        )

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
            if not among(hf_config.get(key, allowed[0]), allowed):
                raise UserError(
                    f"config.json has {key}: {brief(hf_config[key])}; the {self.name} family supports "
                    f"{' or '.join(repr(value) for value in allowed)} only: give a model without it"
                )
        kinds = (FULL_ATTENTION, WINDOW) if self.mixed_windows else (FULL_ATTENTION,)
        for kind in hf_config.get("layer_types") or ():
            if kind not in kinds:
                allowed_kinds = " and ".join(map(repr, kinds))
                raise UserError(f"config.json has layers of type {brief(kind)}; supported: {allowed_kinds} only")
        if self.windowed and not hf_config.get("layer_types"):
            check_windows(hf_config)

    def _window_layers(self, hf_config: Mapping[str, Any], layers: int) -> tuple[bool, ...] | None:
        if not self.mixed_windows:
            return None
        pattern = hf_config.get(PATTERN) or self.mixed_windows
        if type(pattern) is not int or not 1 < pattern <= LARGEST["num_layers"]:
            raise UserError(f"config.json gives {PATTERN} = {brief(pattern)}; it must be a whole number of at least 2")
        return read_window_layers(hf_config, layers, pattern)

    def _sparse_layers(self, hf_config: Mapping[str, Any], layers: int) -> tuple[bool, ...] | None:
        """Which layers have experts; None: all, or none in a family without."""
        if self.sparse_layers == "step":
            return read_sparse_layers(hf_config, layers)
        if self.sparse_layers == "all":
            return None
        first = hf_config.get("first_k_dense_replace", self.defaults["first_k_dense_replace"])
        if type(first) is not int or not 0 <= first < layers:
            raise UserError(
                f"config.json gives first_k_dense_replace = {brief(first)}; it must be a whole number from 0 to "
                f"{layers - 1}"
            )
        return tuple(layer >= first for layer in range(layers)) if first else None

    def beyond(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor of a file is of a layer that the model does not have and need not."""
        found = re.match(r"model\.layers\.(\d{1,6})\.", name) if self.more_layers else None
        more = config.hf_config.get(MORE_LAYERS, 1)
        if found is None or type(more) is not int:
            return False
        return config.num_layers <= int(found[1]) < config.num_layers + more

    def _positions(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The ModelConfig fields of the rotary embedding."""
        if self.constants.get("position_embedding") == "learned":
            return {"rotary_base": 0.0, "rope_scaling": None}
        given = {key: value for key, value in hf_config.items() if value is not None}
        more: dict[str, Any] = {}
        if self.window_rope is not None:
            given, more["window_rotary_base"] = split_rope(given, *self.window_rope)
        base, scaling, percent = read_rope({**self.rope, **given}, self.rope_types, self.latent)
        if self.partial_rotary is None and percent not in (None, 1.0):
            raise UserError(
                f"config.json has partial_rotary_factor {percent}; the {self.name} family supports 1.0 only"
            )
        more |= {"rotary_base": base, "rope_scaling": scaling}
        return more | {"rotary_percent": percent or self.partial_rotary or 1.0}

    def _value(self, hf_config: Mapping[str, Any], key: str) -> Any:
        if key in self.nullable and key in hf_config:
            return hf_config[key]
        given = {name: hf_config[name] for name in (key, self.also.get(key, key)) if hf_config.get(name) is not None}
        if len(set(map(repr, given.values()))) > 1:
            raise UserError(
                f"config.json has {' and '.join(f'{k} {brief(v)}' for k, v in given.items())}: keep one of them"
            )
        value = next(iter(given.values()), self.defaults.get(key))
        if value is None and key not in self.defaults:
            raise UserError(f"config.json lacks {key}, which the {self.name} family needs; is the file complete?")
        return value


def _rotary(config: ModelConfig) -> tuple[Any, ...]:
    return config.rotary_base, config.rope_scaling, config.rotary_percent, config.window_rotary_base


def check_config(config: ModelConfig, family: Family) -> None:
    """UserError for the sizes and constants of a config that no config.json of its family could give."""
    check_values({name: getattr(config, name) for name in LARGEST})
    rotated = ["rotary_base"] if config.position_embedding == "rope" else []
    if family.window_rope is not None:
        rotated += ["window_rotary_base", "query_pre_attn_scalar"]
    elif config.window_rotary_base is not None or config.query_pre_attn_scalar is not None:
        raise UserError(f"window_rotary_base, query_pre_attn_scalar were given; a {family.name} model has none")
    for name in ("layernorm_epsilon", *rotated):
        check_number(name, getattr(config, name))
    constants = {item.name: family.constants.get(item.name, item.default) for item in fields(ModelConfig)}
    for name in (
        "gated",
        "normalization",
        "linear_bias",
        "qkv_bias",
        "qk_layernorm",
        "qk_layernorm_whole",
        "position_embedding",
        "attention_sinks",
        "glu_linear_offset",
        "norm_rounds_last",
        "post_layernorm",
        "scaled_embedding",
    ):
        if name in family.keys:
            continue
        if getattr(config, name) != constants[name]:
            raise UserError(f"{name} is {getattr(config, name)}; of a {family.name} model it is {constants[name]}")
    activations = family.supported.get(family.keys.get("activation", ""), (constants["activation"],))
    if config.activation not in activations or config.dtype not in DTYPES or not 0 < config.rotary_percent <= 1:
        raise UserError(
            f"activation {brief(config.activation)}, dtype {brief(config.dtype)}, rotary_percent "
            f"{config.rotary_percent}; of a {family.name} model they are {' or '.join(activations)}, "
            f"{' or '.join(DTYPES)} and above 0 and at most 1"
        )
    scaling = config.rope_scaling
    if scaling is not None and read_rope({"rope_parameters": scaling}, family.rope_types, family.latent)[1] != scaling:
        keys = {"yarn": YARN_KEYS, "linear": ("factor",)}.get(str(scaling.get("rope_type")), LLAMA3_KEYS)
        raise UserError(f"rope_scaling has keys {names(list(scaling))}; allowed: rope_type, {', '.join(keys)}")
    latent = [config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim]
    if any((size is not None) != family.latent for size in latent) or (config.q_lora_rank and not family.latent):
        raise UserError(f"sizes of latent attention are {latent}; a {family.name} model has others")
    _check_heads(config)
    _check_experts(config)
    windows = config.window_layers
    if windows is not None and (not family.mixed_windows or len(windows) != config.num_layers):
        raise UserError(f"window_layers are of {len(windows)} layers; a {family.name} model of this size has others")
    if bool(config.num_moe_experts) != ("num_moe_experts" in family.keys):
        raise UserError(f"num_moe_experts is {config.num_moe_experts}; a {family.name} model has another number")


def _check_experts(config: ModelConfig) -> None:
    """UserError for a number of experts that a token cannot be sent to, or layers that contradict it."""
    experts, chosen = config.num_moe_experts, config.moe_router_topk
    if experts is None:
        return
    if experts * config.num_layers > MOST_EXPERTS:
        raise UserError(
            f"config.json has {config.num_layers} layers of {experts} experts; allowed: {MOST_EXPERTS} of all layers "
            "together"
        )
    if chosen is None or chosen > experts or config.moe_ffn_hidden_size is None:
        raise UserError(
            f"config.json has {experts} experts and sends each token to {chosen} of them; give at least as many"
        )
    if chosen == 1 and config.moe_renormalize:
        raise UserError(
            "config.json sends each token to 1 expert with a gate of 1 whatever the router says; megatron-core has no "
            "such routing: give a model with num_experts_per_tok of 2 or more, or norm_topk_prob false"
        )
    groups, together = config.moe_router_num_groups or 1, config.moe_router_group_topk or 1
    if (
        experts % groups
        or together > groups
        or (groups > together and (experts // groups < 2 or chosen != 2 * together))
    ):
        raise UserError(
            f"config.json chooses {chosen} of {experts} experts from {together} of {groups} groups; megatron-core and "
            "transformers choose groups alike only where all are taken, or 2 experts for each group that is: give a "
            "model without groups (n_group 1, topk_group 1)"
        )
    if config.moe_layers is not None and (len(config.moe_layers) != config.num_layers or not any(config.moe_layers)):
        raise UserError(
            f"config.json has experts in {sum(config.moe_layers)} layers of {len(config.moe_layers)}, and "
            f"{config.num_layers} layers; some of as many must have them"
        )


def _check_heads(config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_query_groups:
        raise UserError(
            f"config.json has {config.num_attention_heads} attention heads and {config.num_query_groups} "
            "key/value heads; the second must divide the first"
        )
    if config.kv_lora_rank is not None and config.num_query_groups != config.num_attention_heads:
        raise UserError(
            f"config.json has {config.num_attention_heads} attention heads and {config.num_query_groups} key/value "
            "heads; in latent attention they are as many"
        )
    if config.position_embedding == "rope" and rotary_channels(config) % 2:
        width = config.qk_pos_emb_head_dim or config.kv_channels
        raise UserError(f"config.json gives a head width of {width}; rotary embeddings need an even one")


def _check_implied(hf_config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """UserError for widths of heads that contradict those of latent attention, and which transformers would take."""
    rotated, rest = values["qk_pos_emb_head_dim"], values["qk_head_dim"]
    for key, meant in (("head_dim", rotated), ("qk_head_dim", rotated + rest)):
        if hf_config.get(key) not in (None, meant):
            raise UserError(
                f"config.json has {key} {brief(hf_config[key])}; of its heads it is {meant}: correct it or take it out"
            )


def _check_loadable(config: ModelConfig) -> None:
    """Transformers 5 refuses a hidden_size that the heads do not divide, even when head_dim is given."""
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} is not a multiple of the {config.num_attention_heads} "
            "attention heads; transformers opens no such model: choose a multiple, or export with --layers padded"
        )
