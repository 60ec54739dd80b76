"""The configuration of each verb. A field here is a flag on the command line and a key in a YAML file.

`config.parallelism.tensor_model_parallel_size` in code, `--tensor-model-parallel-size` as a flag and
`tensor_model_parallel_size:` in YAML are the same thing; every verb's dataclass composes the groups it needs.
Ranges are checked when an object is made; whether files exist and fit together is checked by the code that
opens them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_prune.errors import UserError
from megatron_prune.option_groups import (
    CHAT,
    MOST_BATCH,
    MOST_LENGTH,
    WEIGHTS_DTYPE,
    Calibration,
    Dtype,
    LoRA,
    Losses,
    Parallelism,
    TaskOptions,
    Training,
)
from megatron_prune.options import REQUIRED, MayExist, Options, entries, group, option

EXPORT = option(None, "Hugging Face directory to write too: the result trimmed, exported and verified; must not exist")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(Options):
    """Text -> Megatron's .bin and .idx: token ids, ready for training"""

    examples: ClassVar[tuple[str, ...]] = (
        "--input c4.jsonl.gz --output c4 --tokenizer SmolLM2-135M",
        "--input hub:allenai/c4:en:train --output c4 --tokenizer SmolLM2-135M --workers 8",
    )

    output_may_exist: ClassVar[MayExist] = "always"

    input: tuple[str, ...] = option(
        REQUIRED,
        "files of documents (.txt, .raw, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz, .parquet), or "
        "hub:NAME[:CONFIG[:SPLIT]], streamed",
    )
    output: Path = option(REQUIRED, "prefix of the files to write: PREFIX.bin, .idx and .json; must not exist")
    tokenizer: Path = option(REQUIRED, "Hugging Face directory, or a SentencePiece tokenizer.model")
    workers: int = option(0, "processes; 0 = one for each core", at_least=0, at_most=4096)
    append_eod: bool = option(False, "end each document with the end-of-text token")
    json_key: str = option("text", "key of the document in a JSON object")
    apply_chat_template: bool = option(False, CHAT.format("documents"))
    strict: bool = option(False, "stop at the first bad line instead of counting it")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(Options):
    """A model and a method -> a run with a decision, which weights or units stay; --export: the pruned model, too"""

    basic: ClassVar[tuple[str, ...]] = (
        "calibration",
        "calibration_samples",
        "calibration_seq_length",
        "apply_chat_template",
        "export",
        "prior",
        "data",
        "seq_length",
        "global_batch_size",
        "micro_batch_size",
        "train_iters",
        "lr",
        "resume",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "SmolLM2-135M run --method sparsegpt --target 2:4 --calibration c4.jsonl --export sparse",
        "SmolLM2-135M run --method minitron --target parameters=100M --calibration c4.jsonl --export small",
    )

    output_may_exist: ClassVar[MayExist] = "resumed"

    input: Path = option(
        REQUIRED, "Megatron checkpoint, from `import` or `trim`, run of `train`, or Hugging Face directory"
    )
    output: Path = option(REQUIRED, "run folder to write; must not exist, unless with --resume or --restartable")
    method: str = option(REQUIRED, "pruning method, from `megatron-prune methods`")
    target: str = option(
        REQUIRED, "N:M (N KEPT of M, e.g. 2:4), a sparsity such as 0.5, sizes such as num_layers=24, parameters=100M"
    )
    prior: str | None = option(
        None, "mask that a learned method starts from: a run, a decision, a mask .npz or a method"
    )
    initial_logits: Path | None = option(None, "earlier run whose learned logits are the start (transfer)")
    export: Path | None = EXPORT
    resume: bool = option(False, "go on from the last checkpoint in --output")
    restartable: bool = option(False, "begin, or go on where --output already holds the unfinished run")
    method_options: dict[str, Any] = option({}, "the method's own hyper-parameters")
    latency_table: Path | None = option(None, "table that `latency` measured, for a target such as latency_us=800K")
    statistics: Path | None = option(
        None, "folder of a structured method's statistics: read where they are there, kept where not"
    )
    apply_chat_template: bool = option(False, CHAT.format("--calibration, --data and --eval-data"))
    calibration: Calibration = group(Calibration)
    losses: Losses = group(Losses)
    training: Training = group(Training)
    parallelism: Parallelism = group(Parallelism)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior is not None and self.initial_logits is not None:
            raise UserError("--prior and --initial-logits given; allowed: one of them, both say where learning starts")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """A pruned model -> the same model with better weights: recovery, distillation, continued pretraining"""

    basic: ClassVar[tuple[str, ...]] = (
        "data",
        "teacher",
        "export",
        "engine",
        "seq_length",
        "global_batch_size",
        "micro_batch_size",
        "train_iters",
        "lr",
        "lora_rank",
        "resume",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "run recovered --data c4.jsonl --teacher SmolLM2-135M --train-iters 200 --export recovered_hf",
        "run recovered --data c4.jsonl --lora-rank 16 --train-iters 200",
    )

    output_may_exist: ClassVar[MayExist] = "resumed"

    input: Path = option(REQUIRED, "Megatron checkpoint, run folder or Hugging Face directory")
    output: Path = option(REQUIRED, "run folder to write; must not exist, unless with --resume or --restartable")
    engine: Literal["megatron", "fsdp"] = option(
        "megatron",
        "megatron: megatron-core, in the layout below; fsdp: transformers' model from a Hugging Face directory, or a "
        "run that pruned one, every parameter sharded over all processes by PyTorch's FSDP2, a Hugging Face directory "
        "comes out",
    )
    export: Path | None = EXPORT
    keep_zeros: bool = option(True, "weights of prunable linears that are zero at the start stay zero")
    resume: bool = option(False, "go on from the last checkpoint in --output")
    restartable: bool = option(False, "begin, or go on where --output already holds the unfinished run")
    apply_chat_template: bool = option(False, CHAT.format("--data and --eval-data"))
    losses: Losses = group(Losses)
    lora: LoRA = group(LoRA)
    training: Training = group(Training)
    parallelism: Parallelism = group(Parallelism)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine != "fsdp":
            return
        given = {
            **dict.fromkeys(self.parallelism.several(), True),
            "--use-distributed-optimizer": self.training.use_distributed_optimizer,
            "--overlap-grad-reduce": self.training.overlap_grad_reduce,
            "--lora-rank": self.lora.rank > 0,
        }
        if any(given.values()):
            names = ", ".join(name for name, found in given.items() if found)
            raise UserError(
                f"--engine fsdp: {names} given; FSDP shards all parameters and their optimizer over all processes and "
                "trains all of them: leave it out, or use --engine megatron"
            )
        if self.training.moe_aux_loss_coeff:
            raise UserError(
                "--engine fsdp: --moe-aux-loss-coeff given; its models have no loss that spreads tokens over experts: "
                "leave it out, or use --engine megatron"
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """A checkpoint or a run -> files that other software reads"""

    basic: ClassVar[tuple[str, ...]] = (
        "format",
        "layers",
        "quantize",
        "calibration",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "run sparse_hf",
        "run masks.npz --format mask-npz",
    )

    input: Path = option(REQUIRED, "run folder, or Megatron checkpoint (hf, fms, maxtext)")
    output: Path = option(REQUIRED, "directory (hf, fms, maxtext) or file (mask-npz) to write; must not exist")
    format: Literal["hf", "fms", "mask-npz", "maxtext"] = option(
        "hf",
        "hf: from_pretrained opens it; fms: IBM's foundation-model-stack, LLaMA models; mask-npz: packed bits per "
        "weight; maxtext: Orbax, for TPUs",
    )
    layers: Literal["padded", "custom", "blocks"] | None = option(
        None,
        "form of a model whose layers differ: padded with zeros (left out: this), custom: with a modelling file that "
        "the reader must trust, blocks: sizes in config.json, without code",
    )
    quantize: Literal["fp8", "int4_awq", "nvfp4"] | None = option(
        None,
        "quantise the decoder's linears with nvidia-modelopt, for TensorRT-LLM, fp8 and nvfp4 for vLLM too; ranges are "
        "measured on --calibration, zeros stay zeros",
    )
    weights_dtype: Literal["float32", "bfloat16"] = option("float32", WEIGHTS_DTYPE)
    apply_chat_template: bool = option(False, CHAT.format("--calibration"))
    calibration: Calibration = group(Calibration)
    parallelism: Parallelism = group(Parallelism)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights_dtype != "float32" and self.format != "maxtext":
            raise UserError(
                f"--weights-dtype {self.weights_dtype} was given with --format {self.format}, whose weights have the "
                "model's own type; allowed: --format maxtext"
            )
        if self.quantize is None:
            return
        given = f"--quantize {self.quantize}"
        if self.format != "hf":
            raise UserError(f"{given} was given with --format {self.format}; allowed: --format hf")
        if self.layers in ("custom", "blocks"):
            raise UserError(
                f"{given} was given with --layers {self.layers}, which no engine opens: use --layers padded, or "
                "prune to layers that are alike"
            )
        if self.parallelism.several():
            raise UserError(
                f"{given} was given with a layout of several processes and one quantises, which holds the whole model: "
                "leave the layout out"
            )
        if not self.calibration.text:
            raise UserError(f"{given} needs calibration text and none was given: --calibration FILE.jsonl (or .txt)")

    def idle(self) -> Mapping[str, str]:
        """Masks are no model, and ranges are measured to quantise."""
        keys = ["apply_chat_template", *(entry.key for entry in entries(Calibration))]
        idle = {} if self.quantize else dict.fromkeys(keys, "without --quantize")
        return idle | ({"layers": "with --format mask-npz"} if self.format == "mask-npz" else {})


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """Perplexity, or scores of lm-eval's tasks, of a run, a checkpoint, a Hugging Face or MaxText directory"""

    basic: ClassVar[tuple[str, ...]] = (
        "text",
        "window",
        "windows",
        "apply_chat_template",
        "tasks",
        "dense",
        "num_fewshot",
        "limit",
        "output",
        "dtype",
        "micro_batch_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "run --text wikitext2_test.txt --output perplexity.json",
        "sparse_hf --dense SmolLM2-135M --tasks piqa arc_easy",
    )

    input: str = option(REQUIRED, "run folder, Megatron checkpoint, Hugging Face directory, hub id, model for MaxText")
    text: Path | None = option(None, "text file, tokenised whole, without a beginning-of-text token")
    output: Path | None = option(None, "JSON file for the result; left out: printed only")
    window: int | None = option(
        None,
        "tokens in a window; windows do not overlap; left out: 1024, or what the model reads",
        at_least=2,
        at_most=MOST_LENGTH,
    )
    windows: int | None = option(
        None,
        "windows evaluated, from the start of the text; 0 = all; left out: 32, or all where there are fewer",
        at_least=0,
        at_most=2**40,
    )
    dtype: Dtype | Literal["float16"] | None = option(
        None, "type of the weights while evaluating; left out: the checkpoint's own; float16: Hugging Face models only"
    )
    micro_batch_size: int = option(1, "windows in one forward pass", at_least=1, at_most=MOST_BATCH)
    apply_chat_template: bool = option(
        False,
        "--text are conversations, rows with messages, and questions of --tasks are messages: the model's own chat "
        "template makes them text",
    )
    expert_load: bool = option(False, "of a Megatron checkpoint: count the tokens that each expert gets; a pass more")
    checkpoint: Path | None = option(None, "of a model for MaxText: the run that has trained it, or one step of it")
    settings: tuple[str, ...] = option((), "of a model for MaxText: more of MaxText's settings, KEY=VALUE ...")
    tasks: TaskOptions = group(TaskOptions)
    parallelism: Parallelism = group(Parallelism)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.text is None) == (not self.tasks.names):
            given = "both were given" if self.text is not None else "neither was given"
            raise UserError(f"--text (a perplexity) or --tasks (scores of tasks): {given}; give one of them")

    def idle(self) -> Mapping[str, str]:
        """Windows are of a text."""
        keys = ("window", "windows", "micro_batch_size", "expert_load")
        idle = {} if self.apply_chat_template else {"fewshot_as_multiturn": "without --apply-chat-template"}
        return idle | (dict.fromkeys(keys, "with --tasks") if self.tasks.names else {})


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Options):
    """What 2:4 sparsity brings an exported model here: prefill, decode and memory, dense and sparse"""

    examples: ClassVar[tuple[str, ...]] = (
        "sparse_hf",
        "run --batch-sizes 1 8 32 --prompt-length 1024 --output bench.json",
    )

    input: str = option(REQUIRED, "2:4 model: run folder, Megatron checkpoint, Hugging Face directory or hub id")
    output: Path | None = option(None, "JSON file for the result; left out: printed only")
    batch_sizes: tuple[int, ...] = option((1, 8), "sequences at a time, each measured", at_most=MOST_BATCH)
    prompt_length: int | None = option(
        None, "tokens of each prompt; left out: 512, or what the model reads", at_least=1, at_most=MOST_LENGTH
    )
    new_tokens: int = option(32, "tokens decoded after the prompt", at_least=1, at_most=MOST_LENGTH)
    repeats: int = option(3, "runs of which the best counts, after one that does not", at_least=1, at_most=10**6)
    dtype: Dtype | None = option(None, "type of the weights; left out: the model's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError(f"--batch-sizes: {self.batch_sizes} given; allowed: one or more numbers from 1")

    @property
    def path(self) -> Path:
        """`input` as a path."""
        return Path(self.input)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Options):
    """Proof of what changed: pattern, true zeros, density per layer, logits"""

    basic: ClassVar[tuple[str, ...]] = (
        "against",
        "target",
        "output",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "sparse_hf --against run",
        "somebodys_model --target 2:4",
    )

    input: Path = option(REQUIRED, "Megatron checkpoint, run folder or exported Hugging Face directory")
    against: str | None = option(None, "Hugging Face directory, hub id or checkpoint to compare with")
    target: str | None = option(None, "pattern every pruned weight must satisfy; left out: the one recorded")
    output: Path | None = option(None, "JSON file for the result; left out: printed only")
    tolerance: float | None = option(
        None,
        "largest difference of logits, computed in float32, by the largest logit; left out: 1e-5, on a GPU 1e-4",
        at_least=0,
    )
    seq_length: int = option(
        64, "tokens of the random input that the logits are compared on", at_least=2, at_most=MOST_LENGTH
    )
    seed: int = option(0, "of the random input", at_least=0)
    parallelism: Parallelism = group(Parallelism)

    def idle(self) -> Mapping[str, str]:
        """Logits are compared with another model's."""
        return {} if self.against else dict.fromkeys(("tolerance", "seq_length", "seed"), "without --against")


@dataclass(frozen=True, kw_only=True)
class PermuteConfig(Options):
    """A dense checkpoint -> the same model with its channels in an order in which N:M patterns keep more of it"""

    basic: ClassVar[tuple[str, ...]] = (
        "calibration",
        "calibration_samples",
        "calibration_seq_length",
        "apply_chat_template",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "dense permuted --calibration c4.jsonl",
        "dense permuted --target 4:8 --calibration c4.jsonl --tensor-model-parallel-size 2",
    )

    input: Path = option(REQUIRED, "Megatron checkpoint or Hugging Face directory, not pruned yet")
    output: Path = option(REQUIRED, "Megatron checkpoint to write; must not exist")
    target: str = option("2:4", "the pattern to come: N:M, N kept of every M inputs")
    calibration: Calibration = group(Calibration)
    parallelism: Parallelism = group(Parallelism)
    apply_chat_template: bool = option(False, CHAT.format("calibration text"))


@dataclass(frozen=True, kw_only=True)
class LatencyConfig(Options):
    """Time of a model's attention and MLP at several sizes on this device, for budgets of latency"""

    examples: ClassVar[tuple[str, ...]] = (
        "SmolLM2-135M latency.json",
        "SmolLM2-135M latency.json --batch-size 8 --prompt-length 1024",
    )

    input: Path = option(REQUIRED, "Megatron checkpoint or Hugging Face directory; its weights are not read")
    output: Path = option(REQUIRED, "JSON file to write; must not exist")
    levels: int = option(
        10, "sizes between a whole attention or MLP and none, as darwinlm has them", at_least=1, at_most=10_000
    )
    batch_size: int = option(1, "prompts at a time", at_least=1, at_most=MOST_BATCH)
    prompt_length: int = option(512, "tokens of each prompt", at_least=1, at_most=MOST_LENGTH)
    repeats: int = option(
        9, "rounds over all sizes, of which the median counts, after one that does not", at_least=1, at_most=10**6
    )
    dtype: Dtype | None = option(None, "type of the weights; left out: the model's own")
