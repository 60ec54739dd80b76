"""Small Hugging Face models for tests: random ones of every family and shape, and the trained stories260K with its
tokenizer.

stories260K is the 260-thousand-parameter model that llama2.c's author trained on TinyStories (MIT licence).
Its files are looked for beside the repository, in ``../shared/models/stories260K``; tests that need it are
skipped without them.
"""

from __future__ import annotations

import itertools
import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.acceptance import byte_tokenizer as byte_tokenizer

STORIES_DIRECTORY = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
C4_SAMPLE = STORIES_DIRECTORY.parents[1] / "data" / "c4" / "c4_en_sample.jsonl"
STORIES_TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
"""Turns of some channels are kept, of some slowed and of some between the two, within the length of a test."""
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
"""Of the layers without windows and of those with."""

LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TINY_SIZES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_SIZES,
    "mistral": LLAMA_SIZES | {"sliding_window": 7},
    "qwen2": LLAMA_SIZES,
    "qwen3": LLAMA_SIZES | {"head_dim": 16},
    "nemotron": LLAMA_SIZES | {"head_dim": 12},
    "qwen3_moe": LLAMA_SIZES
    | {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "mixtral": LLAMA_SIZES | {"num_local_experts": 4},
    "glm4_moe": LLAMA_SIZES
    | {"num_hidden_layers": 3, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
    | {"n_shared_experts": 2, "routed_scaling_factor": 1.5, "attention_bias": True, "use_qk_norm": True},
    "olmoe": LLAMA_SIZES | {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": LLAMA_SIZES
    | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": LLAMA_SIZES
    | {"head_dim": 16, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}
    | {"rope_parameters": YARN_ROPE},
    "deepseek_v3": LLAMA_SIZES
    | {"num_hidden_layers": 3, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8}
    | {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1}
    | {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
    | {"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "deepseek_v2": LLAMA_SIZES
    | {"num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
    | {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
    | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    "gemma3_text": LLAMA_SIZES
    | {"head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24}
    | {"tie_word_embeddings": True, "rope_parameters": TWO_ROPES},
    "gpt2": {"vocab_size": 128, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    | {"bos_token_id": 0, "eos_token_id": 0},
}
"""Config fields of a tiny model of every family, by its model_type."""
DENSE = [name for name, sizes in TINY_SIZES.items() if not any("experts" in key for key in sizes)]
"""Those without experts."""


def tiny_model(
    path: Path,
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random causal language model of `model_type` to ``path`` and return it.

    ``overrides`` are fields of its config. Biases and norm weights are random too, so that a lost or swapped one shows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(TINY_SIZES.get(model_type, {}) | overrides))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.uniform_(0.5, 1.5) if is_gain else parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def tiny_llama(path: Path, *, rope_llama3: bool = False, **overrides: Any) -> Path:
    """`tiny_model` of the LLaMA family (default: 2 layers, 4 heads, 2 groups, hidden 32, untied)."""
    if rope_llama3:
        overrides["rope_parameters"] = LLAMA3_ROPE
    return tiny_model(path, "llama", **overrides)


FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of a float of four bits (sign, two bits of exponent, one of mantissa), in the order of its codes."""
ALGORITHMS = {"fp8": "FP8", "int4_awq": "W4A16_AWQ", "nvfp4": "NVFP4"}


def pack(weight: Tensor, form: str) -> dict[str, Tensor]:
    """A weight in a form, one number at a time: slow, and by nothing that the package has."""
    rows, columns = weight.shape
    if form == "fp8":
        largest = weight.abs().max() / 448
        return {
            "weight": (weight / largest).to(torch.float8_e4m3fn),
            "weight_scale": largest,
            "input_scale": 2 * largest,
        }
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    block = 16
    scales = weight.unflatten(1, (-1, block)).abs().amax(2) / (7 if form == "int4_awq" else 6)
    scale_2 = scales.max() / 448
    if form == "nvfp4":
        scales = (scales / scale_2).to(torch.float8_e4m3fn)
    for row, column in itertools.product(range(rows), range(columns)):
        scale = float(scales[row, column // block].float() * (scale_2 if form == "nvfp4" else 1))
        number = float(weight[row, column]) / scale
        if form == "int4_awq":
            codes[row, column] = round(number) % 16
        else:
            codes[row, column] = min(range(8), key=lambda code: abs(FP4_VALUES[code] - abs(number))) + 8 * (number < 0)
    if form == "int4_awq":
        bytes_ = [[int(codes[2 * i, j] + 16 * codes[2 * i + 1, j]) for j in range(columns)] for i in range(rows // 2)]
        inputs = torch.linspace(0.5, 2, columns)
        return {"weight": torch.tensor(bytes_, dtype=torch.uint8), "weight_scale": scales, "pre_quant_scale": inputs}
    bytes_ = [[int(codes[i, 2 * j] + 16 * codes[i, 2 * j + 1]) for j in range(columns // 2)] for i in range(rows)]
    scales = {"weight_scale": scales, "weight_scale_2": scale_2, "input_scale": scale_2 * 0 + 0.01}
    return {"weight": torch.tensor(bytes_, dtype=torch.uint8), **scales}


def packed_llama(path: Path, form: str) -> tuple[Path, dict[str, Tensor]]:
    """A tiny model whose linears are packed, and the plain weights that it was made from."""
    from safetensors.torch import load_file, save_file

    plain = load_file(tiny_llama(path, num_hidden_layers=1) / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, weight in plain.items():
        start = name.removesuffix("weight")
        parts = pack(weight, form) if "_proj" in name else {"weight": weight}
        tensors |= {start + kind: part.contiguous() for kind, part in parts.items()}
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    settings = {"quant_method": "modelopt", "quant_algo": ALGORITHMS[form], "ignore": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (path / "hf_quant_config.json").write_text("{}")
    return path, plain


def from_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """`[experts, in, out]` bfloat16 of codes and scales, one number at a time."""
    experts, rows, blocks, size = codes.shape
    found = torch.zeros(experts, 2 * blocks * size, rows, dtype=torch.float64)
    signed = [value * sign for sign in (1, -1) for value in FP4_VALUES]
    for place in itertools.product(*map(range, codes.shape)):
        expert, row, block, at = place
        for half, code in enumerate((int(codes[place]) % 16, int(codes[place]) // 16)):
            column = 2 * (size * block + at) + half
            found[expert, column, row] = signed[code] * 2.0 ** (int(scales[expert, row, block]) - 127)
    return found.to(torch.bfloat16)


def packed_gpt_oss(path: Path) -> dict[str, Tensor]:
    """Write a tiny model whose experts are in MXFP4, in two files; its plain weights."""
    tiny_model(path, "gpt_oss", dtype=torch.bfloat16, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    from safetensors.torch import load_file, save_file

    plain, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(0)
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, tensor in list(plain.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            first[name] = tensor
            continue
        experts, inputs, rows = tensor.shape
        codes = torch.randint(256, (experts, rows, inputs // 32, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(121, 126, codes.shape[:3], generator=generator).to(torch.uint8)
        first[name + "_blocks"], second[name + "_scales"] = codes, scales
        plain[name] = from_mxfp4(codes, scales)
    (path / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    for file, tensors in files.items():
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = {name: file for file, tensors in files.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped}, dtype=None)
    return plain


def packed_deepseek(path: Path, rows: int = 16, columns: int = 8) -> dict[str, Tensor]:
    """Write a tiny model whose linears are in FP8 with a scale for each block, and a layer that predicts a further
    token; its plain weights, made one number at a time.
    """
    from safetensors.torch import load_file, save_file

    tiny_model(path, "deepseek_v3", dtype=torch.bfloat16, num_hidden_layers=2, n_routed_experts=8)
    plain, stored = load_file(path / "model.safetensors"), {}
    for name, weight in list(plain.items()):
        stored[name] = weight
        if not name.endswith("_proj.weight") and "kv_a_proj" not in name:
            continue
        height, width = weight.shape
        scales = torch.zeros(-(-height // rows), -(-width // columns))
        codes = torch.zeros(height, width)
        for row, column in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
            area = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            scales[row, column] = float(weight[area].float().abs().max()) / 448
            codes[area] = weight[area].float() / scales[row, column]
        stored |= {name: codes.to(torch.float8_e4m3fn), name + "_scale_inv": scales}
        narrow, values = stored[name].float(), torch.zeros(height, width)
        for row, column in itertools.product(range(height), range(width)):
            values[row, column] = float(narrow[row, column]) * float(scales[row // rows, column // columns])
        plain[name] = values.to(torch.bfloat16)
    more = "model.layers.2.self_attn.o_proj.weight"
    stored |= {more: stored[more.replace("s.2", "s.1")].clone(), more + "_scale_inv": torch.ones(2, 8)}
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    about = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [rows, columns]}
    edit_config(path, quantization_config=about)
    return plain


BLOCKS = [(0, 0, 48), (4, 2, 64), (2, 2, 0), (4, 4, 32)]
"""Heads, query groups and MLP width of the layers of `tiny_blocks`: neither of two layers has both halves."""


def tiny_blocks(
    path: Path, model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write a random model whose layers differ, in the form `blocks`, with the byte tokenizer; return ``path``."""
    from safetensors.torch import save_file

    from megatron_prune.model.families import Block, family_of

    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    sizes = {layers: len(BLOCKS), "vocab_size": 257} | overrides
    byte_tokenizer(tiny_model(path, model_type, seed=seed, dtype=dtype, **sizes))
    hf_config = json.loads((path / "config.json").read_text())
    family = family_of(hf_config)
    groups = [heads if model_type == "gpt2" else groups for heads, groups, _ in BLOCKS]
    blocks = [Block(heads, count, ffn) for (heads, _, ffn), count in zip(BLOCKS, groups, strict=True)]
    config = family.from_hf(hf_config).with_blocks(blocks)
    shapes = {name: shape for map in family.weights(config) for name, shape in zip(map.hf, map.shapes, strict=True)}
    torch.manual_seed(seed)
    weights = {name: (torch.randn(shape) * 0.2 + (len(shape) == 1)).to(dtype) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(family.to_hf(config)))
    return path


@dataclass(frozen=True)
class _Header:
    """The seven int32 at the start of a llama2.c model file."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    vocab: int
    """Positive: the output layer shares the embedding's weight."""
    positions: int


def stories260k(path: Path) -> Path:
    """Write stories260K as a Hugging Face directory with a working tokenizer; skips the test when it is not
    there.
    """
    if not (STORIES_DIRECTORY / "stories260K.bin").is_file():
        pytest.skip("the stories260K model is not beside the repository (../shared/models/stories260K)")
    from transformers import LlamaConfig, LlamaForCausalLM

    header, weights = _read_llama2c(STORIES_DIRECTORY / "stories260K.bin")
    config = LlamaConfig(
        vocab_size=header.vocab,
        hidden_size=header.hidden,
        intermediate_size=header.ffn,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        num_key_value_heads=header.groups,
        max_position_embeddings=header.positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    left_out = model.load_state_dict(weights, strict=False)
    assert left_out.missing_keys in ([], ["lm_head.weight"]) and not left_out.unexpected_keys, left_out
    model.tie_weights()
    model.save_pretrained(path)
    _stories_tokenizer().save_pretrained(path)
    return path


def _read_llama2c(file: Path) -> tuple[_Header, dict[str, Tensor]]:
    """A llama2.c model file (header, then float32 tensors stacked over layers) -> Hugging Face names and
    tensors.
    """
    data = file.read_bytes()
    header = _Header(*struct.unpack("<7i", data[:28]))
    assert header.vocab > 0, "an output layer of its own is not handled"
    values, start = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy()), 0
    head = header.hidden // header.heads
    kv = header.groups * head
    layers, hidden, ffn = header.layers, header.hidden, header.ffn
    shapes = {
        "embed_tokens": (header.vocab, hidden),
        "input_layernorm": (layers, hidden),
        "self_attn.q_proj": (layers, hidden, hidden),
        "self_attn.k_proj": (layers, kv, hidden),
        "self_attn.v_proj": (layers, kv, hidden),
        "self_attn.o_proj": (layers, hidden, hidden),
        "post_attention_layernorm": (layers, hidden),
        "mlp.gate_proj": (layers, ffn, hidden),
        "mlp.down_proj": (layers, hidden, ffn),
        "mlp.up_proj": (layers, ffn, hidden),
        "norm": (hidden,),
    }
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensor, start = values[start : start + size].view(shape), start + size
        if name in ("embed_tokens", "norm"):
            weights[f"model.{name}.weight"] = tensor
            continue
        for layer in range(layers):
            rotary = name in ("self_attn.q_proj", "self_attn.k_proj")
            weights[f"model.layers.{layer}.{name}.weight"] = (
                _rotate_half(tensor[layer], head) if rotary else tensor[layer]
            )
    assert start + header.positions * head == len(values), "only the rotary tables may follow"
    return header, weights


def _rotate_half(weight: Tensor, head: int) -> Tensor:
    """Rows of a projection from rotary pairs (0,1), (2,3), ... to pairs (0, head/2), (1, head/2 + 1), ..."""
    return weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).reshape(weight.shape)


def _read_pieces(file: Path) -> list[tuple[bytes, float]]:
    """(piece, score) of every token of a llama2.c tokenizer file, in id order."""
    data, pieces, at = file.read_bytes(), [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    return pieces


def _stories_tokenizer() -> Any:
    """The sentencepiece BPE of stories260K, as a fast tokenizer: byte fallback, leading space, <s> first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    pieces = [
        (text.decode().replace(" ", "▁"), score) for text, score in _read_pieces(STORIES_DIRECTORY / "tok512.bin")
    ]
    names = special + [text for text, _ in pieces[3:]]
    ids = {name: number for number, name in enumerate(names)}
    score = {name: pieces[number][1] for name, number in ids.items()}
    pairs = [(name[:cut], name[cut:]) for name in names for cut in range(1, len(name))]
    merges = [pair for pair in pairs if pair[0] in ids and pair[1] in ids and pair[0] + pair[1] not in special]
    merges.sort(key=lambda pair: (-score[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def hf_loss(directory: Path, text: str) -> float:
    """Mean negative log likelihood per token of ``text`` under a Hugging Face directory, fp32, in nats."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of ``directory/config.json``; None removes a key."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(
        json.dumps({key: value for key, value in config.items() if value is not None or key not in changes})
    )


def c4_sample() -> Path:
    """The C4 sample; skips the test when it is not there."""
    if not C4_SAMPLE.is_file():
        pytest.skip("the C4 sample is not beside the repository (../shared/data/c4/c4_en_sample.jsonl)")
    return C4_SAMPLE


def c4_documents(path: Path, first: int | None, last: int | None) -> Path:
    """Some documents of it, by number, in a file."""
    lines = c4_sample().read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[first:last]), encoding="utf-8")
    return path


def small_models(root: Path) -> None:
    """A folder's models `llama`, `gpt2` and `qwen3_moe`, with tokenizers, and a text `words.jsonl`."""
    words(root / "words.jsonl")
    for family in ("llama", "gpt2", "qwen3_moe"):
        byte_tokenizer(tiny_model(root / family, family, vocab_size=257))


def words(path: Path, documents: int = 64, seed: int = 0) -> Path:
    """Write a .jsonl of documents made of words in a seeded order: text without any file beside the project."""
    stock = "the a model weight mask layer keeps removes learns row column group pattern of in and with every".split()
    generator = random.Random(seed)
    lines = [" ".join(generator.choices(stock, k=120)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path
