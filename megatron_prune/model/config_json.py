"""What a model's config.json may say: types, ranges, and the keys that are written in more than one way."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import bounded, check_shape, names

DTYPES = ("bfloat16", "float16", "float32")
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of transformers 5 and 4; where both are given, the first is read."""
FULL_ATTENTION = "full_attention"
WINDOW = "sliding_attention"
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
    "num_moe_experts": 2**12,
    "moe_ffn_hidden_size": 2**22,
    "moe_router_topk": 2**16,
    "moe_shared_expert_intermediate_size": 2**22,
    "moe_num_shared_experts": 2**10,
    "moe_router_num_groups": 2**10,
    "moe_router_group_topk": 2**10,
    "q_lora_rank": 2**20,
    "kv_lora_rank": 2**20,
    "qk_head_dim": 2**16,
    "qk_pos_emb_head_dim": 2**16,
}
"""Of ModelConfig's sizes: far beyond any model, and lists and tensors of them still end."""
_NUMBERS = (
    *("layernorm_epsilon", "moe_router_topk_scaling_factor", "activation_func_clamp_value", "query_pre_attn_scalar"),
)
LARGEST_NUMBER = 1e30
"""Of its constants; squared, a float64 still holds it."""
_LARGEST_NUMBERS = (
    {"layernorm_epsilon": 1.0}
    | dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale"), 1e6
    )
    | {"mscale_all_dim": 1e6}
)
"""Of those constants that are small in any model."""
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN_NUMBERS = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
YARN_KEYS = (*YARN_NUMBERS, "attention_factor", "truncate")
MSCALES = ("mscale", "mscale_all_dim")
"""Of YaRN in latent attention: what the rotated channels and the scores are scaled by."""


def implied_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
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


def read_rope(
    hf_config: Mapping[str, Any], kinds: Sequence[str], latent: bool = False
) -> tuple[float, dict[str, Any] | None, float | None]:
    """Rotary base, scaling of one of the `kinds` and share of a head, from ``rope_parameters`` (transformers 5) or
    ``rope_theta`` + ``rope_scaling`` + ``partial_rotary_factor``. Where both are there, ``rope_scaling`` counts, as in
    transformers. ``latent``: of latent attention, where yarn may have `MSCALES`.
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
    base = float(check_number("rope_theta", given.get("rope_theta", hf_config.get("rope_theta", 10000.0))))
    percent = given.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if percent is not None and not check_number("partial_rotary_factor", percent) <= 1:
        raise UserError(f"config.json has partial_rotary_factor {brief(percent)}; it must be at most 1")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in kinds:
        raise UserError(
            f"config.json has rope type {brief(kind)}; supported: {', '.join(map(repr, kinds))}. To prune the model "
            "for texts of the length that it was first trained on, take rope_scaling out, and put it into the export "
            "again"
        )
    if kind == "default":
        return base, None, percent
    if kind == "linear":
        factor = float(check_number("factor", given.get("factor")))
        return base, {"rope_type": kind, "factor": factor}, percent
    return base, _llama3(given, hf_config) if kind == "llama3" else _yarn(given, latent), percent


def split_rope(hf_config: Mapping[str, Any], base: float, window_base: float) -> tuple[dict[str, Any], float]:
    """Of a model whose layers with windows turn by another base: its config.json as one of the other layers alone, as
    `read_rope` takes it, and that base. ``rope_parameters`` for each type of layer (transformers 5), or ``rope_theta``,
    ``rope_scaling`` and ``rope_local_base_freq``; the two bases where it has none.
    """
    scaling = hf_config.get("rope_scaling") or {}
    kinds = hf_config.get("rope_parameters") or {}
    for given in (scaling, kinds, *(kinds.values() if isinstance(kinds, Mapping) else ())):
        if not isinstance(given, Mapping | None):
            raise UserError(f"config.json gives {brief(given)} as rope parameters; they must be an object")
    if set(kinds) - {FULL_ATTENTION, WINDOW}:
        raise UserError(
            f"config.json gives rope parameters {names(list(kinds))}; allowed: {FULL_ATTENTION}, {WINDOW}, with those "
            "of each type of layer"
        )
    of_all, of_windows = (kinds.get(kind) or {} for kind in (FULL_ATTENTION, WINDOW))
    kind = of_windows.get("rope_type", of_windows.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json has rope type {brief(kind)} in layers with windows; supported: 'default'")
    local = of_windows.get("rope_theta") or hf_config.get("rope_local_base_freq") or window_base
    rest = {key: value for key, value in hf_config.items() if key != "rope_parameters"}
    rest |= {"rope_theta": hf_config.get("rope_theta") or base, "rope_scaling": {**of_all, **scaling}}
    return rest, float(check_number("rope_local_base_freq", local))


def _yarn(given: Mapping[str, Any], latent: bool) -> dict[str, Any]:
    """The scaling of that type (Peng et al. 2023, arXiv:2309.00071, 3.2 to 3.4), with the values that are implied."""
    there = {key: value for key, value in given.items() if value is not None}
    missing = [key for key in ("factor", "original_max_position_embeddings") if key not in there]
    if missing:
        raise UserError(f"config.json has rope type 'yarn' without {', '.join(missing)}; add what the model has")
    if not latent and not there.keys().isdisjoint(MSCALES):
        raise UserError(
            "config.json has rope type 'yarn' with mscale or mscale_all_dim; supported: attention_factor, or none of "
            "them"
        )
    found = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": given.get("truncate", True)} | there
    for key in YARN_NUMBERS:
        check_number(key, found[key])
    if not isinstance(found["truncate"], bool):
        raise UserError(f"config.json gives truncate = {brief(found['truncate'])}; it must be true or false")
    if found["beta_slow"] > found["beta_fast"]:
        raise UserError(
            f"config.json has beta_slow {found['beta_slow']} and beta_fast {found['beta_fast']}; the first must be "
            "at most the second"
        )
    scales = {key: float(check_number(key, there[key])) for key in MSCALES if key in there}
    implied = yarn_mscale(found["factor"])
    if len(scales) == len(MSCALES):
        implied = yarn_mscale(found["factor"], scales["mscale"]) / yarn_mscale(
            found["factor"], scales["mscale_all_dim"]
        )
    scale = float(check_number("attention_factor", found.get("attention_factor", implied)))
    numbers = {key: found[key] for key in YARN_NUMBERS}
    of_scores = {key: value for key, value in scales.items() if key == "mscale_all_dim"}
    return {"rope_type": "yarn", **numbers, "attention_factor": scale, "truncate": found["truncate"], **of_scores}


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN scales by where a sequence is `factor` times as long (arXiv:2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(given: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of that type; the length before it is the model's, where it is not given."""
    values = {LLAMA3_KEYS[-1]: hf_config.get("max_position_embeddings", 2048)}
    values |= {key: given[key] for key in LLAMA3_KEYS if given.get(key) is not None}
    missing = [key for key in LLAMA3_KEYS if key not in values]
    if missing:
        raise UserError(f"config.json has rope type 'llama3' without {', '.join(missing)}; add what the model has")
    scaling = {key: check_number(key, values[key]) for key in LLAMA3_KEYS}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"config.json has low_freq_factor {scaling['low_freq_factor']} and high_freq_factor "
            f"{scaling['high_freq_factor']}; the first must be below the second"
        )
    return {"rope_type": "llama3", **scaling}


def read_sparse_layers(hf_config: Mapping[str, Any], layers: int) -> tuple[bool, ...] | None:
    """Which layers have experts: every `decoder_sparse_step`-th but those of `mlp_only_layers`; None: all."""
    step, dense = hf_config.get("decoder_sparse_step", 1), hf_config.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise UserError(
            f"config.json gives decoder_sparse_step = {brief(step)}; it must be a whole number of at least 1"
        )
    if not isinstance(dense, list) or any(type(layer) is not int or not 0 <= layer < layers for layer in dense):
        raise UserError(
            f"config.json gives mlp_only_layers = {brief(dense)}; it must be a list of layers, from 0 to {layers - 1}"
        )
    found = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    return None if all(found) else found


def read_window_layers(hf_config: Mapping[str, Any], layers: int, pattern: int) -> tuple[bool, ...] | None:
    """Which layers have windows, by `layer_types`; without it all but each `pattern`-th. None: all."""
    numbers = range(1, layers + 1)
    kinds = hf_config.get("layer_types") or [WINDOW if number % pattern else FULL_ATTENTION for number in numbers]
    if len(kinds) != layers:
        raise UserError(f"config.json has {layers} layers and {len(kinds)} layer_types; there is one for each")
    found = tuple(kind == WINDOW for kind in kinds)
    return None if all(found) else found


def read_dtype(hf_config: Mapping[str, Any]) -> str:
    """``dtype`` or ``torch_dtype``; float32 when config.json says nothing, as transformers 4 had it."""
    given = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    name = given.removeprefix("torch.") if isinstance(given, str) else given
    if name not in DTYPES:
        raise UserError(
            f"config.json has dtype {brief(name)}; supported: {', '.join(DTYPES)}: save the model in one of them with "
            "AutoModelForCausalLM.from_pretrained(DIR, dtype=torch.bfloat16).save_pretrained(NEW_DIR)"
        )
    return name


def check_number(name: str, value: Any) -> float:
    """A number above 0 that is no larger than can be believed."""
    most = _LARGEST_NUMBERS.get(name, LARGEST_NUMBER)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise UserError(f"config.json gives {name} = {brief(value)}; it must be a number above 0, at most {most:g}")
    return value


def check_values(values: Mapping[str, Any]) -> None:
    """Types and ranges of what config.json gives for ModelConfig fields; None is a size that follows from others."""
    for name, value in values.items():
        if name in _NUMBERS:
            check_number(name, value)
        elif name in ("tie_word_embeddings", "moe_renormalize", "qkv_bias", "qk_layernorm"):
            if not isinstance(value, bool):
                raise UserError(f"config.json gives {name} = {brief(value)}; it must be true or false")
        elif name == "activation":
            continue  # among the family's supported values
        elif value is not None and (type(value) is not int or not 1 <= value <= LARGEST[name]):
            most = f" and at most {LARGEST[name]}" if type(value) is int and value > 0 else ""
            raise UserError(f"config.json gives {name} = {brief(value)}; it must be a whole number of at least 1{most}")


def among(value: Any, allowed: Sequence[Any]) -> bool:
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


def check_types(hf_config: Mapping[str, Any]) -> None:
    """UserError for a key of another type than it has in any model."""
    known = {key: hf_config[key] for key in _Keys.__annotations__ if key in hf_config}
    check_shape(known, "config.json", _Keys, "take it from the model's source again")


def check_windows(hf_config: Mapping[str, Any]) -> None:
    """UserError when some layers of a family whose windows are switched on by a key see a part of the text only."""
    if not hf_config.get("use_sliding_window") or hf_config.get("sliding_window", 4096) is None:
        return
    first, layers = hf_config.get("max_window_layers", 28), hf_config.get("num_hidden_layers")
    if first is None or not isinstance(layers, int) or first < layers:
        raise UserError(
            f"config.json has use_sliding_window: True for the layers from {first} on; supported: False, or "
            "max_window_layers of all layers"
        )


def class_stem(name: str) -> str:
    """`Llama` of the name of any of transformers' classes, `LlamaModel` or `LlamaForSequenceClassification`."""
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|PreTrainedModel|Model)$", "", name)
