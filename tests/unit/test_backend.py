"""The adaptation to a machine without CUDA, and the guards against megatron-core's silent traps."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_prune import imports
from megatron_prune.errors import UserError
from megatron_prune.model.build import RMSNorm, transformer_config
from megatron_prune.model.families import ModelConfig, family_of

no_gpu = pytest.mark.skipif(backend.has_cuda(), reason="the adaptation is only there without a GPU")

HF_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


def config() -> ModelConfig:
    """A small LLaMA."""
    return family_of(HF_CONFIG).from_hf(HF_CONFIG)


@no_gpu
def test_the_users_torch_is_untouched() -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).cuda()


@no_gpu
def test_megatron_sees_a_cpu_where_it_names_cuda() -> None:
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch is not torch
    assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
    assert clip_grads.torch.cuda.current_device() == torch.device("cpu")
    assert clip_grads.torch.Tensor is torch.Tensor


@no_gpu
def test_modules_imported_late_are_adapted_too() -> None:
    program = (
        "import megatron_prune.backend, sys, torch\n"
        "assert 'megatron.core.dist_checkpointing.strategies.fully_parallel' not in sys.modules\n"
        "import megatron.core.dist_checkpointing.strategies.fully_parallel as late\n"
        "assert late.torch is not torch and late.torch.cuda.synchronize() is None\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@no_gpu
def test_triton_is_not_loaded_by_megatron_but_stays_importable() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    program = (
        "import sys, megatron_prune.backend, megatron.core.models.gpt\n"
        "assert 'triton' not in sys.modules\n"
        "import triton.language"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@no_gpu
def test_the_compiler_is_not_loaded_by_megatron_but_stays_usable() -> None:
    """It takes a second; models with experts are those that ask for it."""
    program = (
        "import sys, torch\n"
        "compiler = torch.compile\n"
        "import megatron_prune.backend, megatron.core.models.gpt, megatron.core.transformer.moe.router as router\n"
        "assert 'torch._inductor' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "assert torch.compile is compiler and router.torch.compile is compiler\n"
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item() == 2\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_import_is_silent_about_missing_gpu_libraries_but_not_about_others() -> None:
    program = "import warnings; warnings.simplefilter('default')\nimport megatron_prune.backend\n"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Apex" not in found.stderr and "Transformer Engine" not in found.stderr
    with pytest.warns(UserWarning, match="Apex is bad"):
        warnings.warn("Apex is bad", UserWarning, stacklevel=1)


def test_importing_the_compiler_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    outer = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    folders = {"TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    program = "import megatron_prune.backend, torch._dynamo"
    subprocess.run([sys.executable, "-c", program], check=True, env=outer | folders)
    assert not list((tmp_path / "tmp").iterdir())


def test_one_process_needs_no_launcher_and_layouts_may_follow_one_another() -> None:
    for _ in range(2):
        with backend.running(backend.Layout()):
            assert dist.get_world_size() == 1
            assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert not dist.is_initialized()


def test_process_groups_are_torn_down_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), backend.running(backend.Layout()):
        raise RuntimeError("inside")
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


@pytest.mark.parametrize(
    ("layout", "world", "message"),
    [
        (backend.Layout(tensor=2), 3, "needs a multiple of 2 processes and 3 run"),
        (backend.Layout(tensor=2, pipeline=2), 2, "multiple of 4"),
        (backend.Layout(context=2), 3, "context 2 parallel needs a multiple of 2 processes and 3 run"),
        (backend.Layout(virtual_pipeline=2), 1, "virtual-pipeline-model-parallel-size 2 was given"),
        (backend.Layout(sequence_parallel=True), 1, "sequence-parallel was given"),
    ],
)
def test_impossible_layouts_are_refused(layout: backend.Layout, world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backend.check_layout(layout, world)


@pytest.mark.parametrize("version", ["0.15.3", "0.17.1", "0.20.0"])
def test_another_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", version)
    with pytest.raises(UserError, match=f"megatron-core {version} is installed"):
        backend._check_core_version()


def test_norms_are_marked_for_sequence_parallel_gradients() -> None:
    """megatron-core's own torch norm refuses sequence parallelism; ours must carry the mark its optimizer looks for."""
    with backend.running(backend.Layout()):
        core = transformer_config(config(), backend.Layout(), torch.float32)
        core.sequence_parallel = True
        assert RMSNorm(core, 32).weight.sequence_parallel is True


@no_gpu
def test_pipeline_outputs_are_not_freed_under_gloo() -> None:
    """Freeing them while gloo still reads them gives wrong and changing numbers."""
    core = transformer_config(config(), backend.Layout(), torch.float32)
    assert core.deallocate_pipeline_outputs is False


def test_masked_linears_do_not_use_fused_weight_gradients() -> None:
    """A masked weight is no leaf and has no main_grad: with the fusion its gradient would be lost."""
    from megatron_prune.model.build import build_model
    from megatron_prune.model.masked_linear import MaskDraw
    from megatron_prune.model.prunable import PrunableModel

    with backend.running(backend.Layout()):
        model = PrunableModel(config(), backend.Layout(), build_model(config(), backend.Layout(), torch.float32))
        model.learn_masks(MaskDraw(2, 4, 0))
        for linear in model.linears():
            assert linear.module.gradient_accumulation_fusion is False
            logits = linear.module.mask_logits
            assert logits.tensor_model_parallel and logits.partition_dim == linear.module.shard_axis


def test_mask_logits_are_a_parameter_group_of_their_own() -> None:
    """megatron-core tells groups apart by weight-decay and learning-rate multipliers when it loads a checkpoint."""
    from megatron_prune.model.build import build_model
    from megatron_prune.model.masked_linear import MaskDraw
    from megatron_prune.model.prunable import PrunableModel
    from megatron_prune.option_groups import Training
    from megatron_prune.training.loop import Trainer
    from megatron_prune.training.state import adam_of

    with backend.running(backend.Layout()):
        model = PrunableModel(config(), backend.Layout(), build_model(config(), backend.Layout(), torch.float32))
        model.learn_masks(MaskDraw(2, 4, 0))
        training = Training(lr=1e-3, min_lr=0.0, train_iters=3, global_batch_size=1)
        trainer = Trainer(model, training, data=None, multipliers={"*mask_logits": 10.0})  # type: ignore[arg-type]
        assert adam_of(trainer.optimizer) == "torch"
        groups = trainer.optimizer.param_groups
        identities = [(g["wd_mult"], g["lr_mult"]) for g in groups]
        assert len(set(identities)) == len(identities) >= 2
        assert sorted(g["max_lr"] for g in groups)[-1] == pytest.approx(1e-2)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is here")
def test_a_gpu_without_transformer_engine_gets_our_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's module for it can be imported without it, and its classes then fail when a model is built."""
    from megatron_prune.model import build

    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    assert build._te_modules() is None


@pytest.mark.skipif(backend.has_cuda(), reason="GPUs have kernels of their own for this")
def test_the_norm_of_many_gradients_keeps_its_digits() -> None:
    """torch's own float32 norm, which megatron-core would take, is 1e-3 off for a large embedding."""
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    large = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))
    exact = math.hypot(float(torch.linalg.vector_norm(large, dtype=torch.float64)), 3.0)
    with backend.running(backend.Layout()):
        found = get_grad_norm_fp32([large, torch.full((9,), 1.0)], grad_stats_parallel_group=dist.group.WORLD)
        assert found == pytest.approx(exact, rel=1e-6)
        assert float(get_grad_norm_fp32([], grad_stats_parallel_group=dist.group.WORLD)) == 0
    assert abs(float(torch.norm(large)) / exact - 1) > 1e-4


@pytest.mark.parametrize("cuda", [False, True])
def test_what_says_nothing_to_the_user_is_left_out(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """And nothing else is: on a GPU both generators are not one, and another warning of the same logger is shown."""
    always, on_cpu = f"always.{cuda}", f"on_cpu.{cuda}"
    monkeypatch.setattr(backend, "NOISE", {always: "some words"})
    monkeypatch.setattr(backend, "CPU_NOISE", {on_cpu: "some words"})
    monkeypatch.setattr(backend, "has_cuda", lambda: cuda)
    monkeypatch.setattr(backend, "_installed", False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    with warnings.catch_warnings():
        backend.install()

    def shown(name: str, text: str) -> bool:
        logger = logging.getLogger(name)
        return bool(logger.filter(logger.makeRecord(name, logging.WARNING, "", 0, text, (), None)))

    assert not shown(always, "about some words and more") and shown(always, "something else")
    assert shown(on_cpu, "about some words and more") == cuda and shown(on_cpu, "something else")


def test_kernels_of_a_hollow_triton_can_be_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and with options; before and after, what is imported is what it was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with imports.hollow_triton():
        import triton
        import triton.language as tl

        @triton.jit
        def plain(x: tl.constexpr) -> None: ...

        @triton.jit(do_not_specialize=["x"])
        def special(x: tl.constexpr) -> None: ...

        assert callable(plain) and callable(special)
    with pytest.raises(ImportError):
        import triton
    assert "triton.language" not in sys.modules or sys.modules["triton.language"] is not tl


def test_an_import_that_is_tried_again_does_not_recurse() -> None:
    """As in a notebook, where the first try failed: two finders would ask each other for ever."""
    again = """
import sys
import megatron_prune.backend
del sys.modules["megatron_prune.backend"]
import megatron_prune.backend
finders = [finder for finder in sys.meta_path if getattr(finder, "adapts_megatron", False)]
name = next(n for n in ("megatron.core.models.bert", "megatron.core.models.T5") if n not in sys.modules)
__import__(name)
print(len(finders))
"""
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] in ("0", "1")  # 0 where there is a GPU, and nothing to adapt
