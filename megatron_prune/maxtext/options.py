"""The configuration of each verb of `python -m megatron_prune.maxtext`: fields are flags and YAML keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from megatron_prune import option_groups
from megatron_prune.errors import UserError
from megatron_prune.kernels.definition import MAX_M
from megatron_prune.option_groups import WEIGHTS_DTYPE, Training, check_schedule
from megatron_prune.options import REQUIRED, MayExist, Options, group, option, same_as


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Options):
    """A Hugging Face directory -> a model for MaxText"""

    input: Path = option(
        REQUIRED, "Hugging Face directory (safetensors): LLaMA, Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE"
    )
    output: Path = option(REQUIRED, "folder to write; must not exist")
    masks: Path | None = option(None, "mask .npz: which weights are removed and stay zero; left out: none")
    weights_dtype: Literal["float32", "bfloat16"] = option("float32", WEIGHTS_DTYPE)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """A model for MaxText, as it is or trained -> a Hugging Face directory"""

    input: Path = option(REQUIRED, "model for MaxText: the folder from convert or export --format maxtext")
    output: Path = option(REQUIRED, "Hugging Face directory to write; must not exist")
    checkpoint: Path | None = option(None, "run that has trained it, or one step of it; left out: the model as it is")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Options):
    """Whether every removed weight is +0.0; exit status 1 when one is not"""

    input: Path = option(REQUIRED, "model for MaxText with masks")
    checkpoint: Path | None = option(None, "run that has trained it, or one step of it; left out: the model as it is")


@dataclass(frozen=True, kw_only=True)
class Data(Options):
    """What is read in training"""

    data: tuple[str, ...] = option((), "[WEIGHT] PREFIX ... from `megatron-prune preprocess`; left out: synthetic data")
    data_cache: Path | None = option(None, "local folder for the order of the data; left out: in the user's cache")
    seq_length: int = same_as(Training, "seq_length")
    seed: int = same_as(Training, "seed", "of the order of the data, and of the noise of masks that are learned")


@dataclass(frozen=True, kw_only=True)
class Losses(option_groups.Losses):
    """What is learned from the text and from a teacher"""

    teacher: Path | None = same_as(
        option_groups.Losses,
        "teacher",
        "model to learn from, usually the unpruned one: a folder from convert or export --format maxtext",
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Data):
    """MaxText's trainer with removed weights held at zero; the same command goes on after an interruption"""

    output_may_exist: ClassVar[MayExist] = "always"

    input: Path = option(REQUIRED, "model for MaxText: the folder from convert or export --format maxtext")
    output: Path = option(
        REQUIRED, "run folder, seen by all hosts; a run that is there goes on from its newest checkpoint"
    )
    steps: int = option(REQUIRED, "optimizer steps, over all continuations", at_least=1, at_most=10**8)
    save_interval: int = same_as(Training, "save_interval")
    keep_checkpoints: int = same_as(Training, "keep_checkpoints")
    keep_zeros: bool = option(True, "removed weights stay zero, by the masks beside the model")
    settings: tuple[str, ...] = option((), "more of MaxText's settings, KEY=VALUE ...: learning_rate=1e-4 ...")
    losses: Losses = group(Losses)


@dataclass(frozen=True, kw_only=True)
class LearnConfig(Data):
    """N:M masks learned on frozen weights (MaskLLM); the same command goes on after an interruption"""

    output_may_exist: ClassVar[MayExist] = "always"

    input: Path = option(REQUIRED, "model for MaxText, dense: the folder from convert or export --format maxtext")
    output: Path = option(REQUIRED, "run folder, seen by all hosts; masks.npz in it is the result")
    n: int = option(2, "weights kept in a group", at_least=1)
    m: int = option(4, "weights in a group", at_least=2, at_most=MAX_M)
    prior: Path | None = option(None, "mask .npz that learning starts from; left out: noise of --std")
    steps: int = same_as(Training, "train_iters", "optimizer steps, over all continuations")
    global_batch_size: int = same_as(Training, "global_batch_size", "windows in an optimizer step, over all devices")
    save_interval: int = same_as(Training, "save_interval")
    lr: float = same_as(Training, "lr")
    min_lr: float = same_as(Training, "min_lr")
    lr_multiplier: float = option(10.0, "learning rate of the mask logits, in units of --lr", above=0)
    lr_warmup_iters: int = same_as(Training, "lr_warmup_iters")
    clip_grad: float = same_as(Training, "clip_grad")
    adam_beta1: float = same_as(Training, "adam_beta1")
    adam_beta2: float = same_as(Training, "adam_beta2")
    adam_eps: float = same_as(Training, "adam_eps")
    scale_start: float = option(1e2, "factor of the logits against the Gumbel noise, first step", above=0)
    scale_end: float = option(5e2, "the same, last step", above=0)
    temperature_start: float = option(4.0, "softmax temperature, first step", above=0)
    temperature_end: float = option(0.05, "the same, last step", above=0)
    schedule_shape: Literal["linear", "geometric"] = option("linear", "of scale and temperature")
    prior_strength: float = option(3.0, "logit step between the prior and its neighbours, in std", above=0)
    std: float = option(0.01, "unit of the start's logits; also their spread without a prior", above=0)
    weight_regularization: float = option(1e-5, "weight of -sum((W * mask)^2), falling to 0", at_least=0)
    hard: bool = option(False, "sample whole patterns, straight-through gradient")
    settings: tuple[str, ...] = option((), "more of MaxText's settings, KEY=VALUE ...")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n >= self.m:
            raise UserError(f"--n {self.n} --m {self.m} given; N:M keeps N of every M inputs: N must be below M")
        check_schedule(self.lr, self.min_lr, self.lr_warmup_iters, self.steps)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Options):
    """Log-likelihoods of requests; `megatron-prune evaluate` calls this"""

    output_may_exist: ClassVar[MayExist] = "always"

    input: Path = option(REQUIRED, "model for MaxText")
    checkpoint: Path | None = option(None, "run that has trained it, or one step of it; left out: the model as it is")
    requests: Path = option(REQUIRED, "requests (.npz)")
    output: Path = option(REQUIRED, "answers (.npz)")
    tokens_per_batch: int = option(1024, "tokens in a forward pass", at_least=1, at_most=2**30)
    rows_multiple: int | None = option(
        None, "devices that share the rows; left out: those of all hosts", at_least=1, at_most=2**20
    )
    dtype: Literal["bfloat16", "float32", "float16"] = option("float32", "of the computation")
    settings: tuple[str, ...] = option((), "more of MaxText's settings, KEY=VALUE ...")
