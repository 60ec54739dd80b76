"""Hostile inputs to every verb, made from small models, runs and results that the verbs themselves have written.

A group is a function that draws one case: it copies what it needs into the folder of the case, spoils it, and returns
the command. `refuse` says that the input is wrong beyond doubt, so that status 0 would be a mistake.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import os
import pickle
import random
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import fuzz_mutations as hostile
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MAKING = "unfinished"
"""Name of the folder of good inputs while they are made."""
MOST = 500
"""Characters of a line."""


@dataclass
class Case:
    """What is run in the folder of the case, and what is known about it beforehand."""

    command: list[str]
    note: str
    refuse: bool = False
    succeed: bool = False
    outputs: tuple[str, ...] = (
        "out",
        "out.bin",
        "out.idx",
        "out.json",
        "out.html",
        "out.npz",
        "out.jsonl",
        "statistics",
    )
    """What may be there afterwards when the command succeeds."""
    changes: tuple[str, ...] = ()
    """Inputs that the command may change: a run that goes on."""
    mounted: str = ""


@dataclass
class Box:
    """The folder of one case, where to take good inputs from, and the draw."""

    folder: Path
    bases: Path
    draw: random.Random
    number: int
    taken: set[str] = field(default_factory=set)

    def take(self, *names: str) -> None:
        """Copy good inputs here, with the files beside a token file; what is here already, perhaps spoilt, stays."""
        for name in names:
            if name in self.taken:
                continue
            self.taken.add(name)
            for source in [self.bases / name, *(self.bases / (name + end) for end in (".bin", ".idx"))]:
                if source.is_dir():
                    shutil.copytree(source, self.folder / name, symlinks=True, dirs_exist_ok=True)
                elif source.exists():
                    shutil.copy2(source, self.folder / source.name)
            if name.startswith("tok"):
                shutil.copy2(self.bases / f"{name}.json", self.folder / f"{name}.json")
            self._move(name)

    def _move(self, name: str) -> None:
        """A run says where its model lies: say that it lies here."""
        for path in (self.folder / name / "run.json", self.folder / name / "config.yaml"):
            if path.is_file():
                made = str(self.bases.with_name(MAKING))
                path.write_text(path.read_text().replace(made, str(self.folder)))

    def pick(self, values: Any, shift: int = 1) -> Any:
        """One after the other with the number of the case, so that each gets its turn."""
        values = list(values)
        return values[(self.number // shift) % len(values)]

    @property
    def marker(self) -> Path:
        """What code that runs would make."""
        return self.folder.parent / "marker"

    def spoil_json(self, name: str, shift: int = 1) -> tuple[str, bool]:
        """Mutate a JSON file of this folder."""
        path = self.folder / name
        made = hostile.hostile_json(self.draw, json.loads(path.read_text()), self.number // shift)
        path.write_bytes(made.data)
        return f"{name}: {made.note}", made.refuse

    def spoil(self, name: str) -> tuple[str, bool]:
        """Damage any file of this folder."""
        path = self.folder / name
        made = hostile.damaged(self.draw, path.read_bytes())
        path.write_bytes(made.data)
        return f"{name}: {made.note}", made.refuse


GROUPS: dict[str, tuple[int, Callable[[Box], Case]]] = {}


def group(name: str, cases: int) -> Callable[[Callable[[Box], Case]], Callable[[Box], Case]]:
    """Registers a group: its name, and how many cases a whole run draws from it."""

    def register(function: Callable[[Box], Case]) -> Callable[[Box], Case]:
        GROUPS[name] = (cases, function)
        return function

    return register


# --- good inputs ---

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "nemotron", "gpt2")
STEPS = (
    "--seq-length 16 --global-batch-size 1 --micro-batch-size 1 --train-iters 3 --save-interval 1 --keep-checkpoints 9"
)
CALIBRATION = "--calibration w.jsonl --calibration-samples 4 --calibration-seq-length 16"
TASKS = "--tasks choices --tasks-folder tasks"
SEARCH = "--levels 3 --generations 1 --offspring 2 --survivors 1 --fitness-tokens 32 --training-tokens 0"
RUNS = (
    "import --input hf --output ck",
    *(f"import --input hf_{family} --output ck_{family}" for family in FAMILIES[1:]),
    "preprocess --input w.jsonl --output tok --tokenizer hf",
    "preprocess --input w.jsonl --output tok2 --tokenizer hf",
    "prune --input ck --output run --method magnitude --target 2:4",
    f"prune --input ck --output learn --method maskllm --target 2:4 --data w.jsonl {STEPS}",
    f"prune --input ck --output narrow --method flap --target parameters=30000 {CALIBRATION} --statistics stats",
    f"prune --input ck --output searched --method darwinlm --target parameters=30000"
    f" {SEARCH} {CALIBRATION} --database levels",
    "trim --input run --output sparse",
    "trim --input narrow --output small",
    f"train --input sparse --output trained --data w.jsonl {STEPS}",
    "export --input sparse --output exported",
    "export --input run --output m.npz --format mask-npz",
    "export --input ck --output fms --format fms",
    "export --input small --output padded",
    "export --input small --output blocks --layers blocks",
    "evaluate --input exported --text w.jsonl --window 16 --windows 2 --output ppl.json",
    f"evaluate --input hf {TASKS} --output scores.json",
    "verify --input sparse --against exported --output verified.json",
    "plan --input ck --method maskllm --target 2:4 --seq-length 16 --processes 1 --output plan.json",
    "latency --input ck --output latency.json --prompt-length 16 --repeats 1 --levels 3",
)


def make_bases(folder: Path) -> None:
    """Write every good input into `folder`, with the verbs themselves."""
    from megatron_prune.__main__ import main
    from tests.models import byte_tokenizer, tiny_model, words
    from tests.tasks import write_tasks

    folder.mkdir(parents=True)
    os.chdir(folder)
    for family in FAMILIES:
        name = "hf" if family == "llama" else f"hf_{family}"
        byte_tokenizer(tiny_model(Path(name), family, vocab_size=257))
    sharded = byte_tokenizer(tiny_model(Path("sharded"), "llama", vocab_size=257, max_shard_size="30KB"))
    assert (sharded / "model.safetensors.index.json").is_file()
    words(Path("w.jsonl"), 8)
    Path("w.txt").write_text("the model keeps a weight and a mask removes it\n" * 40)
    Path("w.jsonl.gz").write_bytes(gzip.compress(Path("w.jsonl").read_bytes(), mtime=0))
    write_tasks(Path("tasks"))
    _sentencepiece(Path("pieces"))
    for line in RUNS:
        status = main(line.split())
        if status:
            raise SystemExit(f"{line}: status {status}; the good inputs must be made before bad ones are tried")
    _unfinished(Path("learn"), Path("learning"), "learning")
    _unfinished(Path("trained"), Path("training"), "training")


def _sentencepiece(folder: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the model keeps a weight and a mask removes it"] * 50),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=9,
    )


def _unfinished(run: Path, copy: Path, state: str) -> None:
    """A finished run as one that was killed after its second step."""
    shutil.copytree(run, copy)
    about = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(about | {"state": state}))
    shutil.rmtree(copy / "checkpoints" / "step_0000003")
    (copy / "checkpoints" / "latest.json").write_text('{"step": 2}\n')
    for result in ("decision", "weights"):
        shutil.rmtree(copy / result, ignore_errors=True)


def resign(folder: Path, *without: str) -> None:
    """Write sizes and checksums of a Megatron checkpoint anew, as whoever changed its files would."""
    weights = folder / "weights" if (folder / "weights").is_dir() else folder
    sums = weights / "checksums.json"
    if sums.is_file() and "checksums.json" not in without:
        kept = {
            path.name: hostile.crc(path.read_bytes())
            for path in weights.iterdir()
            if path.name != sums.name and path.name != "manifest.json"
        }
        sums.write_text(json.dumps(kept))
    manifest = folder / "manifest.json"
    if manifest.is_file() and "manifest.json" not in without:
        files = [path for path in folder.rglob("*") if path.is_file() and path != manifest]
        manifest.write_text(json.dumps({str(path.relative_to(folder)): path.stat().st_size for path in files}))


# --- commands ---

MODEL_READERS = (
    "import --input SOURCE --output out",
    "evaluate --input SOURCE --text w.jsonl --window 16 --windows 1 --output out.json",
    f"prune --input SOURCE --output out --method wanda --target 2:4 {CALIBRATION}",
    "verify --input SOURCE --seq-length 8 --output out.json",
    f"train --input SOURCE --output out --engine fsdp --data w.jsonl {STEPS}",
)
CONFIG_READERS = (
    "import --input SOURCE --output out",
    "plan --input SOURCE --method maskllm --target 2:4 --seq-length 16 --processes 1 --output out.json",
    "evaluate --input SOURCE --text w.jsonl --window 16 --windows 1 --output out.json",
    "import --input SOURCE --output out",
    "latency --input SOURCE --prompt-length 8 --repeats 1 --levels 1 --output out.json",
    f"prune --input SOURCE --output out --method wanda --target 2:4 {CALIBRATION}",
    "import --input SOURCE --output out",
    "preprocess --input w.jsonl --output out --tokenizer SOURCE",
    f"train --input SOURCE --output out --engine fsdp --data w.jsonl {STEPS}",
    "report SOURCE --output out.html",
    "verify --input SOURCE --against SOURCE --output out.json",
)
SPARSE_READERS = (
    "bench --input SOURCE --batch-sizes 1 --prompt-length 8 --new-tokens 2 --repeats 1 --output out.json",
    "verify --input SOURCE --output out.json",
)
TOKENIZER_READERS = (
    "preprocess --input w.jsonl --output out --tokenizer SOURCE",
    "evaluate --input SOURCE --text w.jsonl --window 16 --windows 1 --output out.json",
    f"prune --input SOURCE --output out --method wanda --target 2:4 {CALIBRATION}",
    f"evaluate --input SOURCE {TASKS} --output out.json",
)
CHECKPOINT_READERS = (
    "export --input SOURCE --output out",
    "verify --input SOURCE --output out.json",
    "evaluate --input SOURCE --text w.jsonl --window 16 --windows 1 --output out.json",
    "prune --input SOURCE --output out --method magnitude --target 2:4",
    f"train --input SOURCE --output out --data tok {STEPS}",
    "export --input SOURCE --output out --format fms",
    "inspect --input SOURCE",
    f"train --input ck --teacher SOURCE --output out --data tok {STEPS}",
    f"prune --input ck --output out --method maskllm --target 2:4 --teacher SOURCE --data tok {STEPS}",
)
RUN_READERS = (
    "inspect --input SOURCE",
    "report SOURCE --output out.html",
    "trim --input SOURCE --output out",
    "export --input SOURCE --output out.npz --format mask-npz",
    "verify --input SOURCE --output out.json",
    f"train --input SOURCE --output out --data tok {STEPS}",
    f"prune --input ck --output out --method maskllm --target 2:4 --prior SOURCE --data tok {STEPS}",
)
TEXT_READERS = (
    "preprocess --input SOURCE --output out --tokenizer hf",
    "preprocess --input SOURCE --output out --tokenizer hf --strict",
    f"prune --input ck --output out --method wanda --target 2:4 {CALIBRATION.replace('w.jsonl', 'SOURCE')}",
    "evaluate --input hf --text SOURCE --window 16 --windows 2 --output out.json",
    f"train --input ck --output out --data SOURCE {STEPS}",
)
TOKEN_READERS = (
    f"train --input ck --output out --data tok {STEPS}",
    f"prune --input ck --output out --method maskllm --target 2:4 --data tok {STEPS}",
    f"train --input ck --output out --data 0.5 tok 0.5 tok2 {STEPS} --data-split 9,1 --eval-interval 1",
    f"train --input ck --output out --data tok --eval-data tok --eval-interval 1 --eval-windows 2 {STEPS}",
)
MASK_READERS = (
    "import --input hf --mask m.npz --output out",
    f"prune --input ck --output out --method maskllm --target 2:4 --prior m.npz --data tok {STEPS}",
)
STATISTICS_READERS = {
    "stats": f"prune --input ck --output out --method flap --target parameters=30000 {CALIBRATION} --statistics stats",
    "levels": f"prune --input ck --output out --method darwinlm --target parameters=30000 {SEARCH} {CALIBRATION}"
    " --database levels",
}
BY_LATENCY = (
    f"prune --input ck --output out --method darwinlm --target latency_us=100K --latency-table latency.json {SEARCH}"
    f" {CALIBRATION}"
)
RESUMED = {
    "learning": f"prune --input ck --method maskllm --target 2:4 --output learning --resume --data w.jsonl {STEPS}",
    "training": f"train --input sparse --output training --resume --data w.jsonl {STEPS}",
}


def reading(box: Box, readers: Sequence[str], source: str = "") -> list[str]:
    """A command of a list that reads `source`, with what else it reads in the folder."""
    command = box.draw.choice(readers).replace("SOURCE", source).split()
    box.take(*needs(command, box.bases))
    return command


def needs(command: Sequence[str], bases: Path) -> list[str]:
    """The words of a command that are good inputs."""
    found = {word.split("/")[0] for word in command} | (
        {"ck", "sparse"} if "train" in command or "SOURCE" in command else set()
    )
    return sorted(word for word in found if (bases / word).exists() or (bases / f"{word}.idx").exists())


# --- files of Hugging Face ---


@group("safetensors", 120)
def _safetensors(box: Box) -> Case:
    box.take("hf")
    path = box.folder / "hf/model.safetensors"
    made = hostile.hostile_safetensors(box.draw, path.read_bytes(), box.number)
    path.write_bytes(made.data)
    return Case(reading(box, MODEL_READERS, "hf"), made.note, made.refuse)


@group("index.json", 70)
def _index(box: Box) -> Case:
    box.take("sharded")
    name = "model.safetensors.index.json"
    path = box.folder / "sharded" / name
    if box.number % 2:
        note, refuse = box.spoil_json(f"sharded/{name}", 2)
        return Case(reading(box, MODEL_READERS, "sharded"), note, refuse)
    content = json.loads(path.read_text())
    weights = content["weight_map"]
    key = box.draw.choice(list(weights))
    value = box.draw.choice(
        [
            "../hf/model.safetensors",
            "/etc/passwd",
            "nowhere.safetensors",
            "",
            ".",
            "a\0.safetensors",
            "\ud800",
            "x" * 5000,
        ]
        + ["config.json", "pipe", "sub/../x", "model.safetensors.index.json", "/dev/zero", "\n"]
    )
    os.mkfifo(box.folder / "sharded/pipe")
    weights[key] = value
    path.write_text(json.dumps(content))
    return Case(reading(box, MODEL_READERS, "sharded"), f"{key} in {value!r}"[:100], True)


SPECIAL = (
    "hf/config.json",
    "hf/model.safetensors",
    "hf/tokenizer.json",
    "hf/tokenizer_config.json",
    "w.jsonl",
    "m.npz",
)
SPECIAL += (
    "ck/manifest.json",
    "ck/megatron_prune.json",
    "ck/weights/.metadata",
    "ck/weights/common.pt",
    "ck/tokenizer",
)
SPECIAL += ("run/run.json", "run/decision/decision.json", "run/decision/layer_00000.safetensors", "learn/metrics.jsonl")
SPECIAL += ("tok.bin", "tok.idx", "tok.json", "ppl.json", "latency.json", "run.yaml", "tasks/choices.jsonl")
SPECIAL += ("tasks/choices.yaml", "pieces/tokenizer.model", "sharded/model.safetensors.index.json", "hf")
SURE = (
    "hf/config.json",
    "run/run.json",
    "w.jsonl",
    "tok.bin",
    "tok.idx",
    "ppl.json",
    "latency.json",
    "m.npz",
    "run.yaml",
)
READERS = {
    "hf": ["import --input hf --output out", "evaluate --input hf --text w.jsonl --window 16 --windows 1"],
    "w.jsonl": [
        "preprocess --input w.jsonl --output out --tokenizer hf",
        "evaluate --input hf --text w.jsonl --window 16",
    ],
    "m.npz": [f"prune --input ck --output out --method maskllm --target 2:4 --prior m.npz --data tok {STEPS}"]
    + ["import --input hf --mask m.npz --output out"],
    "ck": ["export --input ck --output out", "inspect --input ck"],
    "run": ["trim --input run --output out", "inspect --input run", "report run --output out.html"],
    "learn": ["report learn --output out.html"],
    "tok": [f"train --input ck --output out --data tok {STEPS}"],
    "ppl.json": ["report ppl.json --output out.html"],
    "latency.json": [BY_LATENCY],
    "run.yaml": ["import --config run.yaml --input hf --output out"],
    "tasks": [f"evaluate --input hf {TASKS}"],
    "pieces": ["preprocess --input w.jsonl --output out --tokenizer pieces/tokenizer.model"],
    "sharded": ["import --input sharded --output out"],
}
NEEDS = ("hf", "w.jsonl", "ck", "tok", "run", "tasks")


@group("special files", 90)
def _special(box: Box) -> Case:
    name = SPECIAL[box.number % len(SPECIAL)]
    kind = ("fifo", "loop", "zero", "folder", "socket", "huge", "dangling", "empty", "random")[
        box.number // len(SPECIAL) % 9
    ]
    if box.number >= len(SPECIAL) * 3:
        kind = box.draw.choice(["fifo", "loop", "zero", "folder", "socket", "huge", "dangling", "empty", "random"])
    if name == "w.jsonl" and kind == "huge":  # a terabyte of text is read, in bounded memory, for as long as it takes
        kind = "folder"
    first = name.split("/")[0].split(".")[0] if name.startswith("tok.") else name.split("/")[0]
    box.take(*NEEDS, first)
    path = box.folder / name
    if name == "run.yaml":
        path.write_text("dtype: float32\n")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    _replace(path, kind, box.draw)
    sure = name in SURE and kind not in ("empty", "random", "dangling")
    return Case(reading(box, READERS[first]), f"{name} is {kind}", sure)


def _replace(path: Path, kind: str, draw: random.Random) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "socket":
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's path has at most 107 characters
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(before)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.write_bytes(draw.randbytes(1000) if kind == "random" else b"")


STRUCTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "intermediate_size",
)
STRUCTURE += ("n_embd", "n_layer", "n_head")
PUBLISHED: dict[str, list[Any]] = {
    "attn_implementation": ["evil/kernel", "flash_attention_2", 5, {"": "x"}],
    "_attn_implementation": ["evil/kernel"],
    "_attn_implementation_internal": ["evil/kernel"],
    "auto_map": [{"AutoModelForCausalLM": "evil.Model"}, {"AutoConfig": "evil/repo--evil.Config"}, 5, []],
    "quantization_config": [{"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, 5, [], {}],
    "rope_scaling": [
        {"type": "yarn", "factor": 4},
        {"rope_type": "llama3"},
        {"rope_type": 5},
        [],
        "x",
        {"factor": "x"},
    ],
    "rope_parameters": [{"rope_type": "longrope"}, {"rope_theta": "x", "rope_type": "default"}, 5, {"full": {}}],
    "rope_theta": ["x", -1, 0, [], 1e400, "1e4"],
    "torch_dtype": ["float16", "float99", 5, None, ["float32"], "__import__('os')", "float8_e4m3fn"],
    "dtype": ["float16", "bfloat16", "int8", {}, "auto", "torch.float32"],
    "model_type": ["llama4", "", None, 5, "../x", "t5", "mamba", ["llama"], "LLAMA"],
    "architectures": [["LlamaForSequenceClassification"], [], "x", 5, [5], None, ["Evil"]],
    "transformers_version": ["99.0", 5, None, "x" * 9000],
    "tie_word_embeddings": ["yes", 5, None, []],
    "hidden_act": ["evil", "gelu", 5, None, "__class__"],
    "layer_types": [5, ["evil"], ["full_attention"], None, "x"],
    "use_kernels": [True],
    "kernel_config": [{"RMSNorm": "evil/kernel"}],
    "adapter_config": [{"peft_type": "LORA"}],
    "text_config": [{"model_type": "llama"}, 5],
    "is_encoder_decoder": [True, "x"],
    "torchscript": [True],
    "trust_remote_code": [True],
    "tokenizer_class": ["Evil", 5, "T5Tokenizer", None],
    "bos_token_id": ["x", -1, 10**30, [1, 2], 1.5, {}],
    "eos_token_id": ["x", [1, "x"], 10**30, {}, []],
    "pad_token_id": ["x", -5, 10**30, []],
    "head_dim": [0, -8, 7, 10**30, "8", 1.5],
    "max_position_embeddings": [0, -1, 10**30, "x", 1],
    "sliding_window": [0, -1, "x", 10**30],
    "rms_norm_eps": [0, -1, "x", 10**400, None],
}


@group("config.json", 360)
def _config(box: Box) -> Case:
    family = FAMILIES[box.number % len(FAMILIES)] if box.number % 2 else "llama"
    name = "hf" if family == "llama" else f"hf_{family}"
    if box.number % 10 == 4:
        name = "exported"
    box.take(name)
    path = box.folder / name / "config.json"
    content = json.loads(path.read_text())
    command = reading(box, SPARSE_READERS if name == "exported" else CONFIG_READERS, name)
    kind = box.number % 3
    if kind == 0:
        note, refuse = box.spoil_json(f"{name}/config.json", 3)
        return Case(command, note, refuse)
    if kind == 1:
        key = box.pick([*content, *PUBLISHED], 3)
        text = box.draw.choice(list(hostile.VALUES))
        path.write_bytes(hostile.with_value(content | {key: None}, (key,), hostile.VALUES[text]))
        wrong = key in STRUCTURE and command[0] == "import" and text != "null"
        return Case(command, f"{key}: {text}", wrong)
    key = box.pick(PUBLISHED, 3)
    value = box.draw.choice(PUBLISHED[key])
    path.write_text(json.dumps(content | {key: value}).replace('"evil/kernel"', '"evil/kernel"'))
    (path.parent / "evil.py").write_text(f"open({str(box.marker)!r}, 'w')\n")
    return Case(command, f"{key}: {value!r}"[:150])


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
)


@group("tokenizers", 150)
def _tokenizers(box: Box) -> Case:
    name = TOKENIZER_FILES[box.number % len(TOKENIZER_FILES)]
    box.take("hf", "w.jsonl", "pieces", "ck")
    if name == "tokenizer.model":
        note, refuse = box.spoil("pieces/tokenizer.model")
        where = box.draw.choice(["pieces", "pieces/tokenizer.model"])
        return Case(
            f"preprocess --input w.jsonl --output out --tokenizer {where}".split(), note, refuse and "cut" not in note
        )
    if name == "special_tokens_map.json":
        content: Any = {
            "eos_token": "<end>",
            "bos_token": {"content": "<end>", "lstrip": False},
            "additional_special_tokens": [],
        }
        (box.folder / "hf" / name).write_text(json.dumps(content))
    kind = box.number // 5 % 3
    if kind == 0 and name == "tokenizer.json":
        note, refuse = _tokenizer_parts(box), False
    elif kind == 1 and name == "tokenizer_config.json":
        note, refuse = _tokenizer_settings(box), False
    else:
        note, refuse = box.spoil_json(f"hf/{name}", 15)
    return Case(reading(box, TOKENIZER_READERS, "hf"), note, refuse and name == "tokenizer.json")


def _tokenizer_parts(box: Box) -> str:
    """One of the parts of tokenizer.json that the library makes, of a kind that does not exist or does not fit."""
    path = box.folder / "hf/tokenizer.json"
    content = json.loads(path.read_text())
    changes: list[dict[str, Any]] = [
        {"model": value}
        for value in (None, 5, {}, {"type": "BPE2"}, {"type": "Unigram", "vocab": []}, {"type": "WordLevel"})
    ]
    vocabulary = content["model"]["vocab"]
    changes += [
        {"model": content["model"] | change}
        for change in (
            {"vocab": vocabulary | {"zzz": -1}},
            {"vocab": vocabulary | {"zzz": 2**40}},
            {"vocab": vocabulary | {"zzz": 300}},
            {"vocab": {}},
            {"vocab": 5},
            {"merges": [["a", "nowhere"]]},
            {"merges": ["a b c d"]},
            {"merges": 5},
            {"merges": [[]]},
            {"unk_token": "nowhere"},
            {"type": "Unigram"},
            {"dropout": 5},
            {"byte_fallback": "x"},
        )
    ]
    part = box.draw.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor"])
    changes += [
        {part: value}
        for value in (
            {"type": "Evil"},
            {"type": "Replace", "pattern": {"Regex": "(((("}, "content": ""},
            {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
            {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": [], "processors": []},
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
            5,
            [],
        )
    ]
    token = {
        "id": 257,
        "content": "<x>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    changes += [
        {"added_tokens": [token | each]}
        for each in ({}, {"id": -1}, {"id": 2**33}, {"content": ""}, {"id": "x"}, {"id": 3})
    ]
    changes += [
        {"truncation": {"max_length": 0}},
        {"padding": {"strategy": "Evil"}},
        {"version": "9.0"},
        {"version": 5},
    ]
    change = box.draw.choice(changes)
    path.write_text(json.dumps(content | change))
    return f"tokenizer.json: {change}"[:150]


def _tokenizer_settings(box: Box) -> str:
    path = box.folder / "hf/tokenizer_config.json"
    content = json.loads(path.read_text())
    changes: list[dict[str, Any]] = [
        {"tokenizer_class": value}
        for value in (
            5,
            None,
            "Evil",
            "T5Tokenizer",
            "BertTokenizer",
            "LlamaTokenizer",
            "GPT2Tokenizer",
            [],
            "../x",
            "os.system",
        )
    ]
    changes += [{"eos_token": value} for value in (5, None, "", "nowhere", {"content": 5}, {"a": 1}, [], "\ud800")]
    changes += [
        {"auto_map": {"AutoTokenizer": ["evil.T", None]}},
        {"auto_map": 5},
        {"chat_template": 5},
        {"chat_template": "{{"},
    ]
    changes += [{"chat_template": "{% for a in range(10**9) %}x{% endfor %}"}, {"chat_template": [{"name": 5}]}]
    changes += [{"model_max_length": value} for value in (-1, "x", None, 1e400, 5)]
    changes += [
        {"added_tokens_decoder": value}
        for value in (5, {"x": {}}, {"-1": {"content": "<x>"}}, {"5": 5}, {"99999999999": {"content": "q"}})
    ]
    changes += [{"extra_special_tokens": value} for value in (5, ["x"], {"a": 5}, {"a": "<b>"})]
    changes += [
        {"add_bos_token": "x"},
        {"clean_up_tokenization_spaces": 5},
        {"backend": "evil"},
        {"backend": 5},
        {"is_local": 5},
    ]
    change = box.draw.choice(changes)
    path.write_text(json.dumps(content | change))
    (path.parent / "evil.py").write_text(f"open({str(box.marker)!r}, 'w')\n")
    return f"tokenizer_config.json: {change}"[:150]


# --- text and token files ---


@group("text", 130)
def _text(box: Box) -> Case:
    box.take("hf", "ck")
    kind = box.number % 4
    if kind == 3:
        return _hub(box)
    name = ("w.jsonl", "w.jsonl.gz", "w.txt")[kind]
    box.take(name)
    path = box.folder / name
    note, refuse = (_lines(box, path), False) if kind == 0 else box.spoil(name)
    command = reading(box, TEXT_READERS, name)
    return Case(command, note, refuse and kind == 1 and not note.endswith("empty") and command[0] != "evaluate")


def _lines(box: Box, path: Path) -> str:
    lines = path.read_text().splitlines()
    bad = {
        "deep": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "list": "[1]",
        "number": "5",
        "no key": '{"txet": "x"}',
        "number as text": '{"text": 5}',
        "null": '{"text": null}',
        "surrogate": '{"text": "\\ud800 the"}',
        "NUL": '{"text": "a\\u0000b"}',
        "digits": '{"text": "x", "n": ' + "9" * 5000 + "}",
        "unfinished": '{"text": "the',
        "twice": '{"text": "a", "text": "b"}',
        "long": json.dumps({"text": "the " * 300_000}),
        "empty text": '{"text": ""}',
        "special": '{"text": "<end><end>"}',
        "controls": '{"text": "\\u001b[31m\\u202e"}',
    }
    name = box.draw.choice(list(bad))
    raw = {
        "no UTF-8": b"\xff\xfe\xfa",
        "NUL byte": b"\0" * 500,
        "UTF-16": "\n".join(lines).encode("utf-16"),
        "mark": b"\xef\xbb\xbf",
    }
    if box.draw.random() < 0.25:
        name = box.draw.choice(list(raw))
        path.write_bytes(raw[name] + b"\n" + path.read_bytes())
        return name
    lines = [bad[name]] * 3 if box.draw.random() < 0.3 else [*lines[:3], bad[name], *lines[3:]]
    path.write_text("\n".join(lines) + "\n")
    return name


def _hub(box: Box) -> Case:
    names = [
        "hub:",
        "hub::",
        "hub:a:b:c:d:e",
        "hub:../../x",
        "hub:/etc",
        "hub:a/b/c",
        "hub:x y",
        "hub:" + "x" * 5000,
        "hub:a/b:\n",
    ]
    names += [
        "hub:evil/data",
        "hub:ümlaut/x",
        "hub:-x",
        "hub:hf",
        "hub:json:w.jsonl",
        "hub:a/b:c:d",
        "hub:.",
        "hub:%00",
    ]
    name = box.draw.choice(names)
    if box.draw.random() < 0.6:
        return Case(["preprocess", "--input", name, "--output", "out", "--tokenizer", "hf"], name[:80], True)
    source = box.draw.choice(
        ["a/b/c", "../x", "x" * 3000, "evil/model", "", " ", "hf/", "/", "\x1b[0m", "http://x/y", "a//b"]
    )
    verb = box.draw.choice(["import", "evaluate", "bench"])
    more = {"import": ["--output", "out"], "evaluate": ["--text", "w.jsonl"], "bench": []}[verb]
    return Case([verb, "--input", source, *more], f"{verb} {source!r}"[:80], source != "hf/")


@group(".bin and .idx", 100)
def _tokens(box: Box) -> Case:
    box.take("ck", "tok")
    kind, shift = box.number % 4, 4
    refuse = False
    if kind == 3:
        note, refuse = box.spoil_json("tok.json", shift)
    elif kind == 2 and box.draw.random() < 0.5:
        path = box.folder / "tok.bin"
        ids = bytearray(path.read_bytes())
        struct.pack_into(
            "<H", ids, 2 * box.draw.choice([0, 9, len(ids) // 4, len(ids) // 2 - 1]), box.draw.choice([257, 60_000])
        )
        path.write_bytes(ids)
        note, refuse = "an id beyond the vocabulary", True
    elif kind == 2:
        note, refuse = box.spoil("tok.bin")
    else:
        path = box.folder / "tok.idx"
        made = hostile.hostile_index(box.draw, path.read_bytes(), box.number // 2)
        path.write_bytes(made.data)
        note, refuse = f"tok.idx: {made.note}", made.refuse
    return Case(reading(box, TOKEN_READERS), note, refuse and kind != 3)


@group("mask .npz", 120)
def _npz(box: Box) -> Case:
    box.take("ck", "tok", "hf", "m.npz")
    path = box.folder / "m.npz"
    made = hostile.hostile_npz(box.draw, path.read_bytes(), box.number, box.marker)
    path.write_bytes(made.data)
    return Case(reading(box, MASK_READERS), made.note, made.refuse and not made.note.startswith("__pattern__"))


# --- Megatron checkpoints ---


@group("Megatron checkpoints", 220)
def _checkpoints(box: Box) -> Case:
    box.take("ck")
    kind = box.number % 8
    makers = [_table_runs, _table_parts, _common, _objects, _own_json, _table_broken, _any_file, _own_json]
    note, refuse, unsigned = makers[kind](box, box.folder / "ck")
    if box.draw.random() < 0.9:
        resign(box.folder / "ck", *unsigned)
    command = reading(box, CHECKPOINT_READERS, "ck")
    return Case(command, note, refuse and (command[0] != "inspect" or "megatron_prune.json" in note))


Made = tuple[str, bool, tuple[str, ...]]


def _table_runs(box: Box, folder: Path) -> Made:
    pickles = hostile.running_pickles(box.marker)
    name = box.pick(pickles, 8)
    (folder / "weights/.metadata").write_bytes(pickles[name])
    return f".metadata: {name}", True, ()


def _table_broken(box: Box, folder: Path) -> Made:
    pickles = hostile.broken_pickles()
    name = box.pick(pickles, 8)
    (folder / "weights/.metadata").write_bytes(pickles[name])
    return f".metadata: {name}", True, ()


_LEAVES = (
    None,
    -1,
    2**62,
    "x",
    "../../../etc/passwd",
    "/dev/zero",
    [],
    {},
    1.5,
    b"x",
    True,
    "a\0b",
    "__9_9.distcp",
    ("x",),
)


def _table_parts(box: Box, folder: Path) -> Made:
    """The table of contents with some of its values replaced: shapes, offsets, files, lengths."""
    path = folder / "weights/.metadata"
    if box.draw.random() < 0.15:
        made = hostile.damaged(box.draw, path.read_bytes())
        path.write_bytes(made.data)
        return f".metadata: {made.note}", made.refuse, ()
    table = pickle.loads(path.read_bytes())
    tensors = [key for key, item in table.state_dict_metadata.items() if hasattr(item, "chunks")]
    key, value = box.draw.choice(tensors), box.draw.choice(_LEAVES)
    item, places = table.state_dict_metadata[key], list(table.storage_data)
    where = box.draw.choice(
        ["size", "chunks", "offsets", "sizes", "dtype", "properties", "path", "offset", "length", "key", "gone"]
    )
    if where in ("size", "chunks", "properties"):
        object.__setattr__(item, where, value)
    elif where in ("offsets", "sizes"):
        object.__setattr__(item.chunks[0], where, value)
    elif where == "dtype":
        object.__setattr__(item.properties, "dtype", value)
    elif where in ("path", "offset", "length"):
        name = {"path": "relative_path"}.get(where, where)
        object.__setattr__(table.storage_data[box.draw.choice(places)], name, value)
    elif where == "key":
        table.state_dict_metadata["x" if value is None else str(value)] = table.state_dict_metadata.pop(key)
    else:
        del table.storage_data[box.draw.choice(places)]
    path.write_bytes(pickle.dumps(table))
    return f".metadata: {where} of {key} is {value!r}"[:150], where in ("key", "gone"), ()


def _common(box: Box, folder: Path) -> Made:
    pickles = hostile.running_pickles(box.marker) | hostile.broken_pickles()
    name = box.draw.choice(list(pickles))
    data = box.draw.choice(
        [pickles[name], hostile.torch_zip(pickles[name], "common"), hostile.torch_zip(pickles[name])]
    )
    if box.draw.random() < 0.2:
        made = hostile.damaged(box.draw, (folder / "weights/common.pt").read_bytes())
        data, name = made.data, made.note
    (folder / "weights/common.pt").write_bytes(data)
    return f"common.pt: {name}", name in hostile.running_pickles(box.marker), ()


def _objects(box: Box, folder: Path) -> Made:
    """A tensor of a data file as a pickle: appended to the file, and the table points to it."""
    pickles = hostile.running_pickles(box.marker) | hostile.broken_pickles()
    name = box.draw.choice(list(pickles))
    data = hostile.torch_zip(pickles[name])
    path = folder / "weights/.metadata"
    table = pickle.loads(path.read_bytes())
    place = box.draw.choice(list(table.storage_data.values()))
    file = folder / "weights" / place.relative_path
    object.__setattr__(place, "offset", file.stat().st_size)
    object.__setattr__(place, "length", len(data))
    file.write_bytes(file.read_bytes() + data)
    path.write_bytes(pickle.dumps(table))
    return f"{file.name}: {name}", True, ()


def _own_json(box: Box, folder: Path) -> Made:
    name = box.draw.choice(
        ["megatron_prune.json"] * 5 + ["manifest.json", "weights/checksums.json", "weights/metadata.json"]
    )
    note, refuse = box.spoil_json(f"{folder.name}/{name}", 4)
    return note, refuse and name == "megatron_prune.json", (Path(name).name,)


def _any_file(box: Box, folder: Path) -> Made:
    files = sorted(str(path.relative_to(box.folder)) for path in folder.rglob("*") if path.is_file())
    name = box.draw.choice([file for file in files if "weights" in file] * 3 + files)
    note, _ = box.spoil(name)
    return note, False, (Path(name).name,)


# --- runs ---


@group("resumed training", 100)
def _resumed(box: Box) -> Case:
    name = box.pick(["learning", "training"])
    box.take(name, "ck", "sparse", "w.jsonl")
    folder = box.folder / name
    newest = folder / "checkpoints/step_0000002"
    kind = box.number // 2 % 5
    if kind == 0:
        note, _ = box.spoil_json(f"{name}/{box.draw.choice(['run.json', 'environment.json'])}", 10)
    elif kind == 1:
        which = box.draw.choice(["checkpoint.json", "manifest.json", "checksums.json", "metadata.json"])
        note, _ = box.spoil_json(f"{name}/checkpoints/step_0000002/{which}", 10)
        if which == "checkpoint.json":
            resign(newest)
    elif kind == 2:
        note, _ = box.spoil_json(f"{name}/checkpoints/latest.json", 10)
    elif kind == 3:
        maker = box.draw.choice([_table_parts_of_step, _common_of_step])
        note = maker(box, newest)
        resign(newest)
    else:
        files = sorted(str(path.relative_to(box.folder)) for path in folder.rglob("*") if path.is_file())
        note, _ = box.spoil(box.draw.choice(files))
    return Case(RESUMED[name].split(), note, changes=(name,))


def _as_weights(box: Box, step: Path, make: Callable[[Box, Path], Made]) -> str:
    """A maker for model checkpoints, on a training checkpoint, whose files lie in no folder `weights`."""
    (step.parent / "weights").symlink_to(step.name)
    try:
        return make(box, step.parent)[0]
    finally:
        (step.parent / "weights").unlink()


def _table_parts_of_step(box: Box, step: Path) -> str:
    return _as_weights(box, step, box.draw.choice([_table_parts, _table_runs, _table_broken]))


def _common_of_step(box: Box, step: Path) -> str:
    return _as_weights(box, step, _common)


RUN_FILES = (
    "run.json",
    "decision/decision.json",
    "decision/decision.json",
    "environment.json",
    "metrics.jsonl",
    "config.yaml",
)


@group("run folders", 230)
def _runs(box: Box) -> Case:
    name = RUN_FILES[box.number % len(RUN_FILES)]
    run = (
        box.draw.choice(["learn", "trained"])
        if name == "metrics.jsonl"
        else box.draw.choice(["run", "run", "narrow", "learn", "searched"])
    )
    box.take(run)
    if name.startswith("decision") and box.draw.random() < 0.25:
        return _decision_file(box, run)
    if name == "decision/decision.json" and run in ("narrow", "searched"):
        name = "decision/trim.json"
    elif not (box.folder / run / name).is_file():
        name = "run.json"
    if name.endswith(".json"):
        note, refuse = box.spoil_json(f"{run}/{name}", len(RUN_FILES))
    elif name == "metrics.jsonl":
        note, refuse = _metrics(box, box.folder / run / name), False
    else:
        note, refuse = box.spoil(f"{run}/{name}")
        refuse = False
    return Case(
        reading(box, RUN_READERS, run),
        note,
        refuse and name in ("run.json", "decision/decision.json", "decision/trim.json"),
    )


def _decision_file(box: Box, run: str) -> Case:
    import hashlib

    files = sorted((box.folder / run / "decision").glob("*.safetensors"))
    path = box.draw.choice(files)
    made = hostile.hostile_safetensors(box.draw, path.read_bytes(), box.number // 6)
    path.write_bytes(made.data)
    about = next(path.parent.glob("*.json"))
    content = json.loads(about.read_text())
    if isinstance(content.get("files"), dict) and path.name in content["files"] and box.draw.random() < 0.8:
        content["files"][path.name] = hashlib.sha256(made.data).hexdigest()
        about.write_text(json.dumps(content))
    return Case(reading(box, RUN_READERS, run), f"{path.name}: {made.note}")


def _metrics(box: Box, path: Path) -> str:
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    at = box.draw.randrange(len(records))
    made = hostile.hostile_json(box.draw, records[at], box.number // len(RUN_FILES))
    data = [line.encode() for line in lines]
    data[at] = made.data
    path.write_bytes(b"\n".join(data) + b"\n")
    return f"metrics, line {at}: {made.note}"


@group("results and tables", 120)
def _results(box: Box) -> Case:
    name = box.pick(["ppl.json", "verified.json", "scores.json", "latency.json", "plan.json"])
    box.take(name, "ck", "w.jsonl", "hf", "tasks")
    note, refuse = box.spoil_json(name, 5)
    command = f"report {name} --output out.html"
    if name == "latency.json":
        command = BY_LATENCY
    elif name == "scores.json" and box.draw.random() < 0.5:
        command = f"evaluate --input hf {TASKS} --dense {name} --output out.json"
    return Case(command.split(), note, refuse)


@group("statistics and levels", 50)
def _statistics(box: Box) -> Case:
    name = box.pick(["stats", "levels"])
    box.take(name, "ck", "w.jsonl")
    files = sorted(str(path.relative_to(box.folder)) for path in (box.folder / name).rglob("*") if path.is_file())
    target = box.draw.choice(files)
    note, _ = box.spoil_json(target, 2) if target.endswith(".json") else box.spoil(target)
    return Case(STATISTICS_READERS[name].split(), note, changes=(name,))


# --- the command line ---


YAMLS = (
    "input: [[[a]]]",
    "input: {a: {b: c}}",
    "- a\n- b",
    "5",
    "'",
    "a: [&a [x, x], &b [*a, *a]]",
    "input: !!python/object/apply:os.system ['touch MARKER']",
    "!!python/object/new:os.system [touch MARKER]",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "input: hf\ninput: hf",
    "input: &x [*x]",
    "<<: {input: hf}",
    "input: hf\n\tdtype: float32",
    "dtype: 5",
    "dtype:",
    "dtype: ''",
    "nowhere: 1",
    "input: 'a\0b'",
    'input: "\\ud800"',
    "--- a\n--- b",
    "%YAML 9.9\n---\na: b",
    "input: " + "x" * 20_000,
    "tensor-model-parallel-size: 1e0",
    "tensor_model_parallel_size: 0x1",
    "parallelism: {tensor_model_parallel_size: 1}",
    "{" * 5000 + "}" * 5000,
    "[" * 5000 + "]" * 5000,
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g]\ninput: [*h,*h]",
    "a: &a {x: y}\nb: &b {p: *a, q: *a}\nc: &c {p: *b, q: *b}\nd: {p: *c, q: *c}",
    "\n".join(f"key{i}: {i}" for i in range(3000)),
    "input: hf\noutput: [out, out2]",
    "\ufeffinput: hf",
    "null: null",
    "~: ~",
    "true: false",
    "input: |\n  hf\n  x",
    "config: run.yaml",
)


@group("YAML", 80)
def _yaml(box: Box) -> Case:
    box.take("hf")
    path = box.folder / "run.yaml"
    if box.number < len(YAMLS):
        text = YAMLS[box.number].replace("MARKER", str(box.marker))
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        note = text[:60]
    else:
        path.write_text(
            yaml.safe_dump({"input": "hf", "output": "out", "dtype": "float32", "tensor_model_parallel_size": 1})
        )
        note, _ = box.spoil("run.yaml")
    return Case("import --config run.yaml --output out".split(), note)


SETTINGS = {
    "preprocess": "preprocess --input w.jsonl --output out --tokenizer hf",
    "import": "import --input hf --output out",
    "prune": f"prune --input ck --output out --method wanda --target 2:4 {CALIBRATION}",
    "learn": f"prune --input ck --output out --method maskllm --target 2:4 --data tok {STEPS}",
    "narrow": f"prune --input ck --output out --method minitron --target num_layers=1 {CALIBRATION}",
    "search": f"prune --input ck --output out --method darwinlm --target parameters=30000 {SEARCH} {CALIBRATION}",
    "permute": f"permute ck out {CALIBRATION}",
    "plan": "plan --input ck --method maskllm --target 2:4 --seq-length 16 --processes 1 --output out.json",
    "train": f"train --input ck --output out --data tok {STEPS}",
    "trim": "trim --input run --output out",
    "export": "export --input ck --output out",
    "evaluate": "evaluate --input hf --text w.jsonl --window 16 --windows 2 --output out.json",
    "tasks": f"evaluate --input hf {TASKS} --output out.json --samples out.jsonl",
    "verify": "verify --input ck --against hf --output out.json",
    "bench": "bench --input exported --batch-sizes 1 --prompt-length 8 --new-tokens 2 --repeats 1 --output out.json",
    "latency": "latency --input ck --prompt-length 8 --repeats 1 --levels 2 --output out.json",
    "report": "report run ppl.json --output out.html",
    "inspect": "inspect --input run",
    "methods": "methods",
}
"""A command that works, by name; what it reads is found by its words."""


def settings(box: Box, name: str) -> list[str]:
    """The command, with what it reads in the folder."""
    return reading(box, (SETTINGS[name],))


@group("nothing wrong", 115)
def _good(box: Box) -> Case:
    """Every command of every group as it is: what follows says something only where these succeed."""
    every = [
        *SETTINGS.values(),
        *(each.replace("SOURCE", name) for each in MODEL_READERS for name in ("hf", "sharded")),
        *(each.replace("SOURCE", name) for each in CONFIG_READERS for name in ("hf_gpt2", "hf_qwen3")),
        *(each.replace("SOURCE", "hf") for each in TOKENIZER_READERS),
        *(each.replace("SOURCE", "exported") for each in SPARSE_READERS),
        *(each.replace("SOURCE", "ck") for each in CHECKPOINT_READERS),
        *(each.replace("SOURCE", name) for each in RUN_READERS for name in ("run", "learn")),
        *(each.replace("SOURCE", name) for each in RUN_READERS[:3] for name in ("narrow", "searched", "trained")),
        *(each.replace("SOURCE", name) for each in TEXT_READERS for name in ("w.jsonl", "w.jsonl.gz", "w.txt")),
        *TOKEN_READERS,
        *MASK_READERS,
        *STATISTICS_READERS.values(),
        *RESUMED.values(),
        *(each for readers in READERS.values() for each in readers if "run.yaml" not in each),
        BY_LATENCY,
    ]
    command = every[box.number % len(every)].split()
    box.take(*needs(command, box.bases), "ck", "sparse")
    known = ("learning", "training", "stats", "levels")
    return Case(command, "as it is", succeed=True, changes=tuple(name for name in known if name in command))


NUMBERS = (
    "-1 0 0.5 1e30 1e308 1e309 -1e30 nan inf -inf x 1.5 0x10 1_0 １ 1e-400 1e-30 -0 +1"
    " 9223372036854775807 9223372036854775808 1000000000000000000000000000000 18446744073709551616"
    " 1,5 1;5 1+1 2j true none ∞ ½"
).split()
NUMBERS += ["", " ", " 5", "9" * 5000, "1\n2", "x" * 5000]
LONG = (
    "train_iters",
    "windows",
    "eval_windows",
    "new_tokens",
    "repeats",
    "prompt_length",
    "generations",
    "offspring",
    "samples",
)
"""Keys of which a large number is a wish to be served, in as much time as it takes."""


def _numeric(kind: Any) -> bool:
    if get_origin(kind) is tuple or get_args(kind):
        return any(_numeric(part) for part in get_args(kind))
    return kind in (int, float)


@group("numeric flags", 250)
def _flags(box: Box) -> Case:
    from megatron_prune.__main__ import VERBS
    from megatron_prune.options import entries, flag

    name = box.draw.choice(list(SETTINGS))
    command = settings(box, name)
    keys = {entry.key: entry.kind for entry in entries(VERBS[command[0]].config) if _numeric(entry.kind)}
    if "--method" in command:
        keys |= _method_keys(command[command.index("--method") + 1])
    if not keys:
        keys = {"nowhere": int}
    key, value = box.draw.choice(sorted(keys)), box.draw.choice(NUMBERS)
    if flag(key) in command:
        at = command.index(flag(key))
        del command[at : at + 2]
    return Case([*command, f"{flag(key)}={value}"], f"{name} {key} {value}"[:100])


def _method_keys(method: str) -> dict[str, Any]:
    import dataclasses
    from typing import get_type_hints

    from megatron_prune.methods.base import get_method

    kind = type(get_method(method))
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind) if each.init}


TARGETS = (
    "2:4 8:16 4:16 1:32 4:2 0:4 4:4 -1:4 2:-4 2:0 2:3 2:5 3:7 1:1 :4 2: : 2:4:8 2.0:4 １:４ 2:4x x2:4"
    " 0 1 1.0 0.5 -0.5 2 nan inf 1e-400 0.99999999999 1e308 50% 0,5"
    " num_layers=1 num_layers=0 num_layers=-1 num_layers=99 num_layers=x num_layers="
    " num_layers=1,num_layers=2 num_layers=1,ffn_hidden_size=32 ffn_hidden_size=33 hidden_size=7 hidden_size=99999"
    " num_attention_heads=3 num_query_groups=5 parameters=1 parameters=100M parameters=-5 parameters=1e30 parameters=x"
    " parameters=1Q parameters= kv_cache_bytes=1 forward_flops=1K latency_us=1 unknown=5 =5 = , 1:2,0.5 num_layers=1e0"
    " num_layers=0x1 num_layers=1.5 os.system 2:4;rm parameters=30000,num_layers=1"
).split()
TARGETS += [
    "",
    " ",
    "9" * 5000,
    "9" * 5000 + ":4",
    "2:" + "9" * 5000,
    "0." + "9" * 5000,
    "x" * 100_000,
    "parameters=" + "9" * 5000,
]
TARGETS += ["num_layers=" + "9" * 400, "2:4\n", "\x1b[31m", "num_layers=" + ",num_layers=".join("1" * 3000)]
METHODS = (
    "magnitude wanda sparsegpt maskllm shortgpt shortened_llama minitron llm_pruner flap darwinlm sheared_llama".split()
)
NO_METHODS = [
    "",
    "wadna",
    "os",
    "../x",
    "x" * 100_000,
    "base",
    "__init__",
    "é",
    "magnitude ",
    "MAGNITUDE",
    "target",
    "\n",
]


@group("targets and methods", 140)
def _targets(box: Box) -> Case:
    box.take("ck", "w.jsonl", "tok")
    method = box.draw.choice(METHODS) if box.number % 8 else box.draw.choice(NO_METHODS)
    target = box.pick(TARGETS)
    cheap = ["--protected-first", "0", "--protected-last", "0"] if method in ("shortened_llama", "llm_pruner") else []
    if method == "darwinlm":
        cheap = SEARCH.split()
    verb = "plan" if box.number % 5 == 0 else "prune"
    more = ["--processes", "1"] if verb == "plan" else []
    command = [verb, "--input", "ck", "--output", "out", f"--method={method}", f"--target={target}", "--data", "tok"]
    return Case(
        [*command, *f"{STEPS} {CALIBRATION}".split(), *cheap, *more],
        f"{method[:20]} {target[:40]}",
        method in NO_METHODS,
    )


@group("words", 60)
def _words(box: Box) -> Case:
    command = settings(box, box.draw.choice(list(SETTINGS)))
    odd = [
        "--",
        "-",
        "---",
        "--=",
        "--=x",
        "-x",
        "--input",
        "--input=",
        "--output",
        "--config",
        "--config=",
        "--config=nowhere",
    ]
    odd += [
        "--no-",
        "--no-input",
        "--no-resume=1",
        "--é",
        "--" + "x" * 9000,
        "\udcff",
        "--in\nput=x",
        "--input.x=5",
        "--help=5",
    ]
    odd += [
        "--method_options=x",
        "--method_options.x=5",
        "--method-options.percdamp=x",
        "extra",
        "",
        " ",
        "--INPUT=x",
        "--inptu=x",
    ]
    odd += [
        "@file",
        "$(touch x)",
        "--config=.",
        "--config=/dev/null",
        "--config=/dev/zero",
        "--a.b.c=1",
        "--__class__=5",
        "--0=1",
    ]
    word = box.pick(odd)
    where = box.draw.choice([0, 1, len(command), len(command)])
    made = [*command[:where], word, *command[where:]]
    if box.number % 7 == 0:
        made = made[: box.draw.randrange(1, len(made))]
    return Case(made, f"{word[:40]!r} at {where}")


LAYOUTS = (
    "--tensor-model-parallel-size 2",
    "--pipeline-model-parallel-size 2",
    "--context-parallel-size 2",
    "--tensor-model-parallel-size 1000000000",
    "--pipeline-model-parallel-size 99999999999999999999",
    "--sequence-parallel",
    "--virtual-pipeline-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--context-parallel-size 3 --tensor-model-parallel-size 3",
)


@group("layouts", 40)
def _layouts(box: Box) -> Case:
    name = box.pick(["import", "prune", "learn", "train", "trim", "export", "evaluate", "verify"])
    layout = box.draw.choice(LAYOUTS)
    known = name != "evaluate" or "virtual" not in layout
    return Case([*settings(box, name), *layout.split()], f"{name} {layout}", known)


# --- places ---

PLACES = (
    "file",
    "folder",
    "full folder",
    "dangling",
    "link to folder",
    "link to file",
    "loop",
    "fifo",
    "inside a file",
)
PLACES += (
    "partial folder",
    "partial file",
    "partial link",
    "dot",
    "root",
    "empty",
    "long",
    "line break",
    "slash",
    "input",
)
PLACES += ("inside the input", "device", "socket", "small disk", "read-only", "upwards", "partial fifo", "surrogate")
PLACES += ("inside a loop",)
TAKEN = (
    "file",
    "folder",
    "full folder",
    "link to folder",
    "link to file",
    "fifo",
    "inside a file",
    "dot",
    "root",
    "input",
    "loop",
)
"""Places where nothing may be written, whatever the verb."""
FREE_PREFIXES = ("file", "folder", "full folder", "fifo", "loop", "input", "link to folder", "link to file")
"""But a prefix is no file itself."""


@group("output places", 290)
def _places(box: Box) -> Case:
    name = box.pick([name for name in SETTINGS if "out" in SETTINGS[name]])
    command = settings(box, name)
    at = command.index("--output") + 1
    end = Path(command[at]).suffix
    kind = box.pick(PLACES, 16)
    place, mounted = _place(box, kind, "place" + end, command)
    command[at] = place
    free = name == "preprocess" and kind in FREE_PREFIXES
    made = place.rstrip("/")  # a folder may be named with a slash
    beside = [command[command.index("--samples") + 1]] if "--samples" in command else []
    outputs = (made, *(made + each for each in (".bin", ".idx", ".json")), *_parents(made), *beside)
    return Case(command, f"{name}: {kind}", kind in TAKEN and not free, outputs=outputs, mounted=mounted)


def _parents(place: str) -> tuple[str, ...]:
    return tuple(str(parent) for parent in Path(place).parents if str(parent) not in (".", "/"))


def _place(box: Box, kind: str, name: str, command: list[str]) -> tuple[str, str]:
    """An output of this kind, and what was mounted for it."""
    path = box.folder / name
    partial = path.with_name(path.name + ".partial")
    source = command[command.index("--input") + 1] if "--input" in command else command[1]
    words = {
        "dot": ".",
        "root": "/",
        "empty": "",
        "long": "x" * 300,
        "line break": "a\nb" + path.suffix,
        "slash": name + "/",
    }
    words |= {
        "input": source,
        "inside the input": f"{source}/{name}",
        "device": "/dev/null",
        "upwards": f"hf/../{name}",
    }
    words |= {"surrogate": "\udcff" + path.suffix, "inside a file": f"mine/{name}"}
    words["inside a loop"] = f"loop/{name}"
    if kind == "inside a loop":
        (box.folder / "loop").symlink_to("loop")
    if kind == "inside a file":
        (box.folder / "mine").write_text("mine")
    simple: dict[str, Callable[[], Any]] = {
        "file": lambda: path.write_text("mine"),
        "folder": path.mkdir,
        "full folder": lambda: _full(path),
        "dangling": lambda: path.symlink_to("nowhere"),
        "link to folder": lambda: (_full(box.folder / "mine"), path.symlink_to("mine")),
        "link to file": lambda: ((box.folder / "mine").write_text("mine"), path.symlink_to("mine")),
        "loop": lambda: path.symlink_to(name),
        "fifo": lambda: os.mkfifo(path),
        "socket": lambda: _replace(path, "socket", box.draw),
        "partial folder": lambda: _full(partial),
        "partial file": lambda: partial.write_text("mine"),
        "partial link": lambda: (_full(box.folder / "mine"), partial.symlink_to("mine")),
        "partial fifo": lambda: os.mkfifo(partial),
    }
    if kind in simple:
        simple[kind]()
    if kind == "read-only":
        (box.folder / "closed").mkdir(mode=0o500)
        return f"closed/{name}", ""
    if kind == "small disk":
        return _small_disk(box, name)
    return words.get(kind, name), ""


def _full(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine").write_text("mine")


def _small_disk(box: Box, name: str) -> tuple[str, str]:
    """A file system with room for a few pages, where the kernel lets this process make one."""
    import ctypes

    folder = box.folder / "disk"
    folder.mkdir()
    size = box.draw.choice([4, 8, 40, 120]) * 1024
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode())
    return f"disk/{name}", "" if failed else "disk"


# --- tasks ---

TASK_LINES = (
    "doc_to_text: !function choices.f",
    "doc_to_text: !function os.system",
    "doc_to_text: !function evil.run",
    "doc_to_text: !function lm_eval.tasks.longproc.metrics.Popen",
    "doc_to_text: !function lm_eval.utils.os.system",
    "doc_to_text: !function builtins.exec",
    "doc_to_text: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"",
    "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch MARKER') }}\"",
    'doc_to_text: "{% for a in range(1000000000) %}{% endfor %}"',
    "doc_to_text: \"{{ 'x' * 100000000000 }}\"",
    'doc_to_text: "{{"',
    "doc_to_text: 5",
    "doc_to_text: []",
    "doc_to_choice: 5",
    "doc_to_choice: nowhere",
    "doc_to_target: nowhere",
    "doc_to_target: 99",
    "metric_list: [{metric: tasks/evil, aggregation: mean, higher_is_better: true}]",
    "metric_list: [{metric: evil.py, aggregation: mean, higher_is_better: true}]",
    "metric_list: [{metric: acc, aggregation: !function evil.run, higher_is_better: true}]",
    "metric_list: [{metric: !function evil.run, aggregation: mean}]",
    "metric_list: [{metric: acc, hf_evaluate: true}]",
    "metric_list: [{metric: acc, aggregation: nowhere}]",
    "metric_list: 5",
    "metric_list: [5]",
    "metric_list: []",
    "output_type: generate_until",
    "output_type: 5",
    "output_type: evil",
    "process_docs: !function evil.run",
    "process_results: !function evil.run",
    "filter_list: [{name: x, filter: [{function: evil}]}]",
    "filter_list: [{name: x, filter: [{function: custom, filter_fn: !function evil.run}]}]",
    "class: evil.Task",
    "class: !function evil.run",
    "custom_dataset: !function evil.run",
    "dataset_path: evil.py",
    "dataset_path: ../tasks",
    "dataset_kwargs: {data_files: {validation: /etc/passwd}}",
    "dataset_kwargs: {data_files: {validation: ../w.jsonl}}",
    "dataset_kwargs: {trust_remote_code: true, data_files: {validation: choices.jsonl}}",
    "include: ../../etc/passwd",
    "include: choices.yaml",
    "include: [[a]]",
    "task: [choices]",
    "task: 5",
    "group: choices",
    "validation_split: nowhere",
    "num_fewshot: 99999999999",
    "num_fewshot: -1",
    "fewshot_config: {sampler: evil}",
    "fewshot_config: {sampler: !function evil.run}",
    "repeats: 100000000000",
    "metadata: 5",
    "use_prompt: promptsource:evil",
    "use_prompt: evil",
    "generation_kwargs: 5",
    "unsafe_code: true",
    "should_decontaminate: true",
    "description: 5",
    "target_delimiter: 5",
    "nowhere: 5",
    "a: &a [x,x,x]\nb: [*a,*a]",
    "!!python/object/apply:os.system ['touch MARKER']",
    "doc_to_text: !!python/name:os.system",
)


@group("task definitions", 110)
def _tasks(box: Box) -> Case:
    box.take("hf", "tasks")
    folder = box.folder / "tasks"
    (folder / "evil.py").write_text(f"open({str(box.marker)!r}, 'w')\n\n\ndef run(*a, **k):\n    return ''\n")
    (folder / "evil").mkdir()
    (folder / "evil/evil.py").write_text(f"open({str(box.marker)!r}, 'w')\n")
    definition, refuse = folder / "choices.yaml", False
    if box.number < len(TASK_LINES):
        line = note = TASK_LINES[box.number].replace("MARKER", str(box.marker))
        key = line.partition(":")[0] + ":"
        kept = [each for each in definition.read_text().splitlines() if not each.startswith(key)]
        if key == "metric_list:":
            kept = [each for each in kept if not each.startswith("  -")]
        definition.write_text("\n".join([*kept, line]) + "\n")
    elif box.number % 2:
        note, refuse = box.spoil("tasks/choices.yaml")
        refuse = False
    else:
        note = _lines(box, folder / "choices.jsonl") if box.number % 4 else _row(box, folder / "choices.jsonl")
    return Case(f"evaluate --input hf {TASKS} --output out.json --samples out.jsonl".split(), note[:120], refuse)


def _row(box: Box, path: Path) -> str:
    lines = path.read_bytes().splitlines()
    made = hostile.hostile_json(box.draw, json.loads(lines[0]), box.number // 4)
    path.write_bytes(b"\n".join([made.data, *lines[1:]]) + b"\n")
    return f"row: {made.note}"


def prepare(name: str, number: int, folder: Path, bases: Path) -> Case:
    """Make the case in `folder`, which must not exist."""
    folder.mkdir(parents=True)
    box = Box(folder, bases, random.Random(f"{name}:{number}"), number)
    return GROUPS[name][1](box)


def unmount(folder: Path) -> None:
    """Take away what `_small_disk` mounted."""
    import ctypes

    with contextlib.suppress(OSError):
        ctypes.CDLL(None, use_errno=True).umount2(str(folder).encode(), 2)


def load_all() -> None:
    """Import what the verbs import, once."""
    import pkgutil

    import megatron_prune

    for found in pkgutil.walk_packages(megatron_prune.__path__, "megatron_prune."):
        skipped = ("maxtext", "triton", "__main__", "modeling_llama_blocks")
        if not any(word in found.name for word in skipped):
            importlib.import_module(found.name)
    for other in ("transformers", "lm_eval.evaluator", "lm_eval.tasks", "tokenizers", "sentencepiece", "datasets"):
        importlib.import_module(other)
