"""FLOPs of a step as counted by torch, peaks by device name, and what the metrics of a run say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import megatron_prune.backend as backend
from megatron_prune.__main__ import main
from megatron_prune.decision.source import open_model
from megatron_prune.log import read_metrics
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.option_groups import Training
from megatron_prune.training.learning import LearningRunner
from megatron_prune.training.loop import Trainer
from megatron_prune.training.throughput import GIB, flops_per_token, known_peak_tflops, peak_memory, speed
from tests.models import byte_tokenizer, tiny_llama, tiny_model, words

KINDS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class Words:
    """Random tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def sample(self, index: int) -> torch.Tensor:
        """`[length + 1]` token ids."""
        return torch.randint(0, 128, (self.length + 1,), generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize("train_weights", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_are_those_that_torch_counts(tmp_path: Path, family: str, train_weights: bool) -> None:
    training = Training(seq_length=24, micro_batch_size=2, global_batch_size=4, train_iters=1)
    with backend.running(backend.Layout()):
        model = open_model(tiny_model(tmp_path / family, family)).load(backend.Layout())
        model.chunks[0].requires_grad_(False)
        model.learn_masks(MaskDraw(2, 4, seed=0))
        for linear in model.linears():
            linear.module.weight.requires_grad_(train_weights)
        trainer = Trainer(model, training, Words(training.seq_length))
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted on a CPU
            result = trainer.step(0)
    assert counter.get_total_flops() == result.tokens * flops_per_token(model.config, training.seq_length)


def test_a_window_bounds_what_attention_sees(tmp_path: Path) -> None:
    mistral = open_model(tiny_model(tmp_path / "mistral", "mistral")).config
    assert flops_per_token(mistral, 6) < flops_per_token(mistral, 7) == flops_per_token(mistral, 999)


def test_speed() -> None:
    assert speed(300, 2.0, 5 * 10**12, 4, None) == {"tokens_per_s": 150.0, "model_tflop_per_s": 750.0}
    assert speed(300, 2.0, 5 * 10**12, 4, 375.0)["model_flop_utilisation"] == 0.5


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GB200", None),
        ("AMD EPYC", None),
    ],
)
def test_peaks_by_name(device: str, peak: float | None) -> None:
    assert known_peak_tflops(device, "bfloat16") == peak
    assert known_peak_tflops(device, "float32") is None


def test_peak_memory_holds_what_was_taken() -> None:
    block = torch.ones(2**26, device=backend.device())
    assert peak_memory() > block.nbytes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run of five steps with metrics every second step, and how often masks were looked at."""
    root = tmp_path_factory.mktemp("watched")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    inputs = ["--input", str(root / "hf"), "--output", str(root / "run"), "--data", str(root / "words.jsonl")]
    sizes = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", "5", "--lr", "3e-3"]
    looks = 0
    look = LearningRunner._mask_statistics

    def counted(runner: LearningRunner) -> dict[str, float]:
        nonlocal looks
        looks += 1
        return look(runner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearningRunner, "_mask_statistics", counted)
        watch = ["--log-interval", "2", "--peak-tflops", "2"]
        assert main(["prune", "--method", "maskllm", "--target", "2:4", *inputs, *sizes, *watch]) == 0
    return root / "run", looks


def test_bfloat16_logits_have_float32_masters(run: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    root = run[0].parent
    words = ["prune", "--method", "maskllm", "--target", "2:4", "--data", str(root / "words.jsonl")]
    words += ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", "2", "--logits-dtype", "bfloat16"]
    assert main([*words, "--input", str(root / "hf"), "--output", str(root / "refused")]) == 2
    assert "the model is float32" in capsys.readouterr().err
    byte_tokenizer(tiny_llama(root / "bf16", vocab_size=257, dtype=torch.bfloat16))
    assert main([*words, "--input", str(root / "bf16"), "--output", str(root / "narrow")]) == 0
    (saved,) = (root / "narrow" / "checkpoints").glob("*/")
    state = FileSystemReader(saved).read_metadata().state_dict_metadata
    kinds = {name: value.properties.dtype for name, value in state.items() if name.endswith("linear_qkv.mask_logits")}
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    assert sum(dtype == torch.bfloat16 for dtype in kinds.values()) == 1 and len(kinds) == 4, kinds


def test_masks_are_looked_at_only_when_metrics_are_written(run: tuple[Path, int]) -> None:
    folder, looks = run
    assert [record["step"] for record in read_metrics(folder)] == [2, 4, 5] and looks == 3


def test_metrics_by_kind_of_linear_add_up(run: tuple[Path, int]) -> None:
    """LLaMA-shaped, hidden 32, MLP 64, 4 heads and 2 groups: groups of four weights in each linear of a layer."""
    groups = dict(zip(KINDS, (64 * 8, 32 * 8, 128 * 8, 32 * 16), strict=True))
    last = read_metrics(run[0])[-1]
    assert last["differs_from_start_fraction"] > 0
    for name in ("max_probability", "mask_entropy", "changed_fraction"):
        mean = sum(last[f"{name}/{kind}"] * count for kind, count in groups.items()) / sum(groups.values())
        assert mean == pytest.approx(last[name]) and len({last[f"{name}/{kind}"] for kind in KINDS}) > 1


def test_speed_and_memory_of_a_run(run: tuple[Path, int]) -> None:
    model = open_model(run[0].parent / "hf").config
    for record in read_metrics(run[0]):
        tflops = record["tokens_per_s"] * flops_per_token(model, 16) / 1e12
        assert record["model_tflop_per_s"] == pytest.approx(tflops)
        assert record["model_flop_utilisation"] == pytest.approx(tflops / 2)
        assert record["tokens_per_s"] == pytest.approx(2 * 16 / record["step_s"])
        assert 0 < record["peak_memory_gib"] <= peak_memory() / GIB


def test_tensorboard_has_every_metric(run: tuple[Path, int]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    for name in read_metrics(run[0])[0].keys() - {"step"}:
        assert [event.step for event in events.Scalars(name)] == [2, 4, 5], name
