"""The forms in which a model whose layers differ becomes a Hugging Face directory, and what each of them costs.

padded    every layer as large as the widest, with zeros: an ordinary model of its family
custom    each layer as it is, and beside the weights the modelling file that transformers runs when told to trust it
blocks    each layer as it is, without code: for `import`, and for software that reads `block_configs` itself
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from megatron_prune.errors import UserError
from megatron_prune.model.blocks import SUFFIX, same_heads
from megatron_prune.model.cost import BYTES, kv_cache_bytes, parameters
from megatron_prune.model.families import ModelConfig, get_family

Form = Literal["padded", "custom", "blocks"]
FORMS: tuple[Form, ...] = get_args(Form)
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "nemotron": "Nemotron"}
"""Families whose layers transformers builds alike, and how its class names begin: one modelling file serves them."""
_CODE = Path(__file__).with_name("modeling_llama_blocks.py")


def form_of(config: ModelConfig, asked: Form | None) -> Form | None:
    """The form to write; None for an ordinary model. UserError for one that ``config`` cannot have."""
    family = get_family(config.family)
    if config.blocks is None:
        if asked is None or (asked == "padded" and family.uniform(config) != config):
            return asked
        raise UserError(f"--layers {asked} was given and all layers of this model are alike: leave it out")
    if asked == "custom" and config.family not in CLASSES:
        raise UserError(
            f"--layers custom was given and there is no modelling file for {config.family}; allowed: padded, blocks"
        )
    return asked or "padded"


def code_file(config: ModelConfig) -> tuple[str, str]:
    """Name and content of the modelling file of a family."""
    name = _CODE.name.replace("llama", config.family)
    return name, _CODE.read_text(encoding="utf-8").replace("llama", config.family).replace(
        "Llama", CLASSES[config.family]
    )


def auto_map(config: ModelConfig) -> dict[str, str]:
    """What config.json says of the modelling file."""
    start = f"modeling_{config.family}{SUFFIX}.Blocks{CLASSES[config.family]}"
    return {"AutoConfig": start + "Config", "AutoModelForCausalLM": start + "ForCausalLM"}


def costs(config: ModelConfig, form: Form) -> list[str]:
    """One line for each form, and which of them is written."""
    wide = get_family(config.family).uniform(config)
    zeros = 1 - parameters(config) / parameters(wide)
    about: dict[Form, str] = {
        "padded": f"transformers opens it as it is; {zeros:.1%} of it is padding with zeros, which take memory and "
        "time as all weights do: the largest form, with the most to compute",
        "custom": "the smallest form, with the least to compute; transformers opens it when told to "
        "run the modelling file in it (trust_remote_code=True)",
        "blocks": "as small as custom, without code: for import, and for what reads block_configs"
        + ("" if same_heads(config.blocks or ()) else "; megatron-core's own reader has no layers with fewer heads"),
    }
    return [
        f"{name}{' (written)' if name == form else ''}: {_size(wide if name == 'padded' else config)}; {about[name]}"
        for name in FORMS
        if config.blocks is not None or name == "padded"
    ]


def _size(config: ModelConfig) -> str:
    count = parameters(config)
    return f"{count:,} parameters, {count * BYTES[config.dtype]:,} bytes, {kv_cache_bytes(config):,} of cache a token"
