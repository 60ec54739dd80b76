"""Groups of options that several verbs share. Ranges are checked when an object is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_prune.errors import UserError
from megatron_prune.options import Options, option, parse_documents, parse_split

Dtype = Literal["bfloat16", "float32"]
MOST_PROCESSES = 2**20
MOST_LENGTH = 2**24
"""Of a sequence, in tokens."""
MOST_BATCH = 2**20
"""Windows at a time."""
MOST_TOKENS = 2**32
"""Of a tensor of windows, which is made at once."""
MOST_WINDOWS = 10**12
"""That a run may train on: an order of them is drawn."""
WEIGHTS_DTYPE = (
    "of the weights in a folder for MaxText, which trains in float32 in any case; bfloat16 takes half the room and "
    "loses nothing of a model of that type"
)
"""Help of an option that two verbs have."""


CHAT = "{} are conversations, rows with messages: the model's own chat template makes them text"
"""Help of an option that several verbs have."""


def check_tokens(what: str, count: int, length: int) -> None:
    """UserError for more windows than one tensor holds."""
    if count * length > MOST_TOKENS:
        raise UserError(f"{what}: {count} windows of {length} tokens given; allowed: {MOST_TOKENS} tokens in all")


@dataclass(frozen=True, kw_only=True)
class Parallelism(Options):
    """Layout over processes"""

    tensor_model_parallel_size: int = option(1, "processes that share each layer", at_least=1, at_most=MOST_PROCESSES)
    pipeline_model_parallel_size: int = option(
        1, "processes that share the stack of layers", at_least=1, at_most=MOST_PROCESSES
    )
    virtual_pipeline_model_parallel_size: int | None = option(
        None,
        "chunks of layers on each pipeline stage, interleaved: a smaller bubble",
        at_least=2,
        at_most=MOST_PROCESSES,
    )
    sequence_parallel: bool = option(False, "shard norms and dropouts over the tensor-parallel processes too")
    context_parallel_size: int = option(1, "processes that share each sequence", at_least=1, at_most=MOST_PROCESSES)
    expert_model_parallel_size: int = option(
        1, "processes that share out the experts of a layer", at_least=1, at_most=MOST_PROCESSES
    )
    expert_tensor_parallel_size: int | None = option(
        None,
        "processes that share each expert; without it the tensor-parallel size",
        at_least=1,
        at_most=MOST_PROCESSES,
    )
    distributed_timeout_minutes: float = option(
        10.0, "longest wait for another process before the job is given up", above=0, at_most=1e6
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError("--sequence-parallel: true given; it needs --tensor-model-parallel-size above 1")

    def several(self) -> dict[str, int]:
        """Flags that ask for several processes, or for parts of a stage, with their sizes: no layout of one has any."""
        sizes = {entry.name: getattr(self, entry.name) for entry in fields(self) if "parallel_size" in entry.name}
        return {f"--{name.replace('_', '-')}": size for name, size in sizes.items() if size is not None and size > 1}

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` processes; a world that does not divide is an error."""
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        if world_size % model:
            raise UserError(
                f"{world_size} processes given; tensor x pipeline x context parallel sizes need a multiple of {model}"
            )
        return world_size // model


@dataclass(frozen=True, kw_only=True)
class Calibration(Options):
    """Calibration text of one-shot methods"""

    text: tuple[Path, ...] = option(
        (),
        "files of documents (.txt, .raw, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz, .parquet), or by name: c4, "
        "wikitext2, fineweb-edu, hub:NAME[:CONFIG[:SPLIT]], or sample, which comes with the package",
        key="calibration",
    )
    samples: int = option(
        128, "windows drawn, over all processes", at_least=1, key="calibration_samples", at_most=2**20
    )
    seq_length: int = option(
        2048,
        "tokens in a window; at most what the model was made for",
        at_least=2,
        key="calibration_seq_length",
        at_most=MOST_LENGTH,
    )
    seed: int = option(0, "of the draw", at_least=0, key="calibration_seed")
    documents: str | None = option(
        None, "documents drawn from: K (the first K) or START:STOP", key="calibration_documents"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_documents("calibration_documents", self.documents)
        check_tokens("--calibration-samples", self.samples, self.seq_length)

    @property
    def document_range(self) -> slice:
        """`documents` as a slice of the list of documents."""
        return parse_documents("calibration_documents", self.documents)


def check_schedule(lr: float, min_lr: float, warmup: int, steps: int) -> None:
    """UserError for a learning rate that would rise to its end, or a warm-up as long as the whole run."""
    if min_lr > lr:
        raise UserError(f"--min-lr: {min_lr} given; allowed: at most --lr ({lr})")
    if warmup >= steps:
        raise UserError(f"--lr-warmup-iters: {warmup} given; allowed: below {steps}")


@dataclass(frozen=True, kw_only=True)
class Training(Options):
    """Training of learned methods"""

    data: tuple[Path, ...] = option(
        (), "files of training documents (as calibration), or [WEIGHT] PREFIX ... from `preprocess`"
    )
    data_documents: str | None = option(None, "documents trained on: K (the first K) or START:STOP")
    data_split: str | None = option(
        None, "parts of preprocessed --data: TRAIN,HELD_OUT[,UNUSED], e.g. 99,1; left out: all of it for training"
    )
    data_cache: Path | None = option(
        None, "folder for the order of preprocessed data, seen by all nodes; left out: in the user's cache"
    )
    domain_interval: int | None = option(
        None,
        "optimizer steps after which shares of the domains (prefixes or files of --data) follow their held-out losses; "
        "left out: the shares stay",
        at_least=1,
    )
    domain_targets: tuple[float, ...] = option(
        (), "with --domain-interval: the loss that is aimed at for each domain, in nats per token"
    )
    eval_data: tuple[Path, ...] = option(
        (), "held-out documents, as text or prefixes, for the loss every --eval-interval steps"
    )
    eval_documents: str | None = option(None, "held-out documents used: K (the first K) or START:STOP")
    eval_windows: int = option(32, "held-out windows of --seq-length tokens", at_least=1, at_most=2**24)
    seq_length: int = option(2048, "tokens in a training window", at_least=2, at_most=MOST_LENGTH)
    micro_batch_size: int = option(
        1, "windows in one forward pass of one model replica", at_least=1, at_most=MOST_BATCH
    )
    global_batch_size: int = option(
        256, "windows in one optimizer step, over all replicas", at_least=1, at_most=MOST_BATCH
    )
    train_iters: int = option(2000, "optimizer steps", at_least=1, at_most=10**8)
    lr: float = option(5e-5, "peak learning rate", above=0)
    min_lr: float = option(5e-6, "learning rate at the last step", at_least=0)
    lr_decay_style: Literal["cosine", "linear", "constant"] = option("cosine", "shape from --lr to --min-lr")
    lr_warmup_iters: int = option(0, "optimizer steps of linear warm-up", at_least=0)
    clip_grad: float = option(1.0, "largest norm of all gradients together; 0 = no limit", at_least=0)
    adam_beta1: float = option(0.9, "decay of Adam's mean", at_least=0, below=1)
    adam_beta2: float = option(0.95, "decay of Adam's variance", at_least=0, below=1)
    adam_eps: float = option(1e-5, "Adam's epsilon", above=0)
    use_distributed_optimizer: bool = option(
        False, "shard optimizer state and master weights over the data-parallel processes"
    )
    overlap_grad_reduce: bool = option(
        False, "add gradients up over the data-parallel processes while the backward pass goes on"
    )
    moe_aux_loss_coeff: float = option(
        0.0, "weight of the loss that spreads the tokens of each sequence over the experts; 0: none", at_least=0
    )
    recompute: bool = option(False, "recompute each layer in the backward pass: less memory, a third more time")
    seed: int = option(0, "of the order of the data and of the method's noise", at_least=0)
    deterministic: bool = option(
        False, "the same bits in every run of one layout also on GPUs, which takes longer; on CPUs it is so anyway"
    )
    log_interval: int = option(1, "optimizer steps between lines of metrics", at_least=1)
    peak_tflops: float | None = option(
        None, "TFLOP/s of one device, for the utilisation in the metrics; left out: from the GPU's name", above=0
    )
    save_interval: int = option(100, "optimizer steps between checkpoints; the last step is always saved", at_least=1)
    keep_checkpoints: int = option(2, "newest checkpoints that stay; older ones are removed", at_least=1, at_most=10**6)
    async_save: bool = option(False, "write checkpoints in the background, from a copy in the host's memory")
    time_limit: float | None = option(
        None,
        "minutes after which the run saves and ends with status 0, for --resume; left out: no limit",
        above=0,
        at_most=1e7,
    )
    eval_interval: int = option(100, "optimizer steps between held-out evaluations", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_documents("data_documents", self.data_documents)
        parse_documents("eval_documents", self.eval_documents)
        parse_split("data_split", self.data_split)
        if self.domain_targets and self.domain_interval is None:
            raise UserError("--domain-targets: given without --domain-interval; give both, or none of them")
        check_schedule(self.lr, self.min_lr, self.lr_warmup_iters, self.train_iters)
        check_tokens("--micro-batch-size", self.micro_batch_size, self.seq_length)
        check_tokens("--eval-windows", self.eval_windows, self.seq_length)
        if self.train_iters * self.global_batch_size > MOST_WINDOWS:
            raise UserError(
                f"--train-iters x --global-batch-size: {self.train_iters} x {self.global_batch_size} windows given; "
                f"allowed: at most {MOST_WINDOWS}"
            )

    @property
    def data_range(self) -> slice:
        """`data_documents` as a slice of the list of documents."""
        return parse_documents("data_documents", self.data_documents)

    @property
    def eval_range(self) -> slice:
        """`eval_documents` as a slice of the list of documents."""
        return parse_documents("eval_documents", self.eval_documents)

    @property
    def split(self) -> tuple[float, float, float]:
        """`data_split` as three numbers."""
        return parse_split("data_split", self.data_split)

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Forward passes of one replica in one optimizer step; a batch that does not divide is an error."""
        width = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % width:
            raise UserError(
                f"--global-batch-size: {self.global_batch_size} given; allowed: a multiple of micro batch"
                f" {self.micro_batch_size} x {data_parallel_size} data-parallel replicas = {width}"
            )
        return self.global_batch_size // width


@dataclass(frozen=True, kw_only=True)
class Losses(Options):
    """What is learned from the text and from a teacher"""

    teacher: Path | None = option(
        None, "model to learn from, usually the unpruned one: Megatron checkpoint, run or Hugging Face directory"
    )
    teacher_dtype: Dtype | None = option(None, "type of the teacher's weights; left out: its own")
    lm_weight: float | None = option(None, "weight of the next-token loss; left out: 1, with a teacher 0", at_least=0)
    distillation_weight: float | None = option(
        None, "weight of T^2 KL(teacher || student) of the next token; left out: 1 with a teacher", at_least=0
    )
    distillation_temperature: float = option(1.0, "T: both models' logits are divided by it", above=0)
    hidden_weight: float = option(
        0.0, "weight of the distance between the outputs of layers at the same depth, their mean", at_least=0
    )
    hidden_loss: Literal["cosine", "mse"] = option("cosine", "that distance: 1 - cosine, or squared per channel")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None and (self.distillation_weight or self.hidden_weight):
            raise UserError("--distillation-weight or --hidden-weight: given without --teacher; give --teacher MODEL")
        if not (self.lm or self.distillation or self.hidden_weight):
            raise UserError("all weights of losses are 0: give --lm-weight, --distillation-weight or --hidden-weight")

    def idle(self) -> Mapping[str, str]:
        """What needs a teacher, and what of it needs a loss that is switched on."""
        found: dict[str, str] = {}
        if self.teacher is None:
            found["teacher_dtype"] = "without --teacher"
        if not self.distillation:
            found["distillation_temperature"] = "without a distillation loss (--teacher, --distillation-weight)"
        if not self.hidden_weight:
            found["hidden_loss"] = "without --hidden-weight"
        return found

    @property
    def lm(self) -> float:
        """`lm_weight`, or what follows from the teacher."""
        return self.lm_weight if self.lm_weight is not None else float(self.teacher is None)

    @property
    def distillation(self) -> float:
        """`distillation_weight`, or what follows from the teacher."""
        return self.distillation_weight if self.distillation_weight is not None else float(self.teacher is not None)


@dataclass(frozen=True, kw_only=True)
class LoRA(Options):
    """Low-rank adapters, merged into the weights at the end"""

    rank: int = option(
        0, "rank of the adapters; 0 = none, all weights are trained", at_least=0, key="lora_rank", at_most=2**16
    )
    alpha: float = option(16.0, "their change of a weight is alpha / rank * B A", above=0, key="lora_alpha")
    dropout: float = option(
        0.0,
        "share of an adapter's input channels left out, drawn anew each step",
        at_least=0,
        below=1,
        key="lora_dropout",
    )
    targets: tuple[str, ...] = option(
        ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        "linears that get one, by Megatron's names or Hugging Face's (q_proj k_proj v_proj ...)",
        key="lora_targets",
    )

    def idle(self) -> Mapping[str, str]:
        """All but the rank, without one."""
        return {} if self.rank else dict.fromkeys(("lora_alpha", "lora_dropout", "lora_targets"), "without --lora-rank")


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Tasks of lm-eval"""

    def idle(self) -> Mapping[str, str]:
        """All of it, without tasks."""
        keys = ("tasks_folder", "num_fewshot", "fewshot_as_multiturn", "limit", "tokens_per_batch", "samples", "dense")
        return {} if self.names else dict.fromkeys(keys, "without --tasks")

    names: tuple[str, ...] = option((), "tasks of lm-eval by name, scored by likelihood", key="tasks")
    tasks_folder: tuple[Path, ...] = option(
        (), "folders with the tasks' rows, and definitions of your own; left out: lm-eval's tasks, from the hub"
    )
    num_fewshot: int | None = option(
        None, "examples before each question; left out: the task's own", at_least=0, at_most=10_000
    )
    fewshot_as_multiturn: bool = option(
        True, "with --apply-chat-template: each example is a turn of its own; otherwise all stand in one message"
    )
    limit: float | None = option(
        None, "items of each task, the first ones; below 1: a share of them", above=0, at_most=1e12
    )
    tokens_per_batch: int | None = option(
        None,
        "tokens in a forward pass over questions; left out: 256 on a CPU, 16384 on a GPU, 1024 in MaxText",
        at_least=1,
        at_most=2**30,
    )
    samples: Path | None = option(None, "JSONL file for every item: log-likelihoods of its answers, target and scores")
    dense: str | None = option(
        None, "model to stand in the first line: its result of the same tasks (JSON), or a model, evaluated first"
    )
