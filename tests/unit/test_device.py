"""What the environment says of devices: the CPU where it is asked for, whole float32 products, a GPU a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch

from megatron_prune import device, imports, log
from megatron_prune.errors import UserError
from tests.distributed.launch import environment

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own."""
    outer = os.environ | {"PYTHONPATH": str(ROOT)} | more
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=outer)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sees two."""
    monkeypatch.delenv(device.DEVICE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_the_cpu_is_taken_where_it_is_asked_for(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.has_cuda()
    monkeypatch.setenv(device.DEVICE, "")
    assert backend.has_cuda()
    monkeypatch.setenv(device.DEVICE, "cpu")
    assert not backend.has_cuda() and backend.device() == torch.device("cpu")
    assert len(log.device_names()) == 1 and "cpu_threads" in log.environment()


@pytest.mark.parametrize("value", ["cuda", "CPU", "gpu:0", "cpu "])
def test_another_device_is_refused_in_one_line(value: str) -> None:
    verb = (
        "from megatron_prune.__main__ import main; raise SystemExit(main(['verify', '--input', 'x', '--output', 'y']))"
    )
    done = run(verb, **{device.DEVICE: value})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"MEGATRON_PRUNE_DEVICE='{value}' was given; allowed: cpu" in done.stderr


def test_megatron_core_is_adapted_where_the_cpu_is_asked_for() -> None:
    """Although PyTorch sees a GPU: nothing of megatron-core may take it."""
    program = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "import megatron_prune.backend as backend\n"
        "from megatron.core import utils\n"
        "from megatron.core.optimizer import clip_grads\n"
        "assert clip_grads.torch is not torch and not utils.torch.cuda.is_available()\n"
        "with backend.running(backend.Layout()):\n"
        "    print(torch.distributed.get_backend())\n"
    )
    done = run(program, **{device.DEVICE: "cpu"})
    assert done.returncode == 0 and done.stdout == "gloo\n", done.stderr


def test_megatron_core_takes_no_optimizer_without_a_kernel_for_the_cpu(tmp_path: Path) -> None:
    """Transformer Engine and Apex are in NVIDIA's image, also where no GPU is used."""
    for package in ("transformer_engine/pytorch/optimizers", "apex/optimizers"):
        folder = tmp_path / package
        folder.mkdir(parents=True)
        for place in (folder, *folder.relative_to(tmp_path).parents):
            (tmp_path / place / "__init__.py").write_text("class FusedAdam: ...\nclass FusedSGD: ...\n")
    program = (
        "import megatron_prune.backend, torch\n"
        "from megatron.core import optimizer\n"
        "assert optimizer.Adam in (torch.optim.Adam, torch.optim.AdamW), optimizer.Adam\n"
        "import transformer_engine.pytorch.optimizers, apex"
    )
    done = run(program, PYTHONPATH=f"{tmp_path}:{ROOT}", **{device.DEVICE: "cpu"})
    assert done.returncode == 0, done.stderr


def test_triton_counts_as_missing_where_the_cpu_is_asked_for(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.DEVICE, "cpu")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with imports.without_triton():
        assert sys.modules["triton"] is None


@pytest.mark.parametrize(("local_rank", "gpu"), [(None, 0), ("0", 0), ("1", 1)])
def test_each_process_of_a_machine_has_its_gpu(
    gpus: None, monkeypatch: pytest.MonkeyPatch, local_rank: str | None, gpu: int
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert backend._gpu_of_this_process() == gpu


def test_a_process_without_a_gpu_is_refused(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 .* has no GPU, there are 2: .* at most 2 .*_DEVICE=cpu"):
        backend.connect(backend.timedelta(seconds=1))


@pytest.mark.parametrize(("gpus_there", "expected"), [(0, "cpu"), (1, "cpu"), (3, "cpu"), (4, None), (8, None)])
def test_layouts_are_compared_on_one_kind_of_device(
    monkeypatch: pytest.MonkeyPatch, gpus_there: int, expected: str | None
) -> None:
    monkeypatch.delenv(device.DEVICE, raising=False)
    assert environment(gpus_there).get(device.DEVICE) == expected


def test_float32_products_are_whole_whatever_the_image_says() -> None:
    """And `import megatron_prune` alone, which comes before PyTorch, imports none."""
    program = "import torch; print(torch.backends.cuda.matmul.allow_tf32)"
    assert run(program, **{device.TF32: "1"}).stdout == "True\n"  # so it is in NVIDIA's image
    first = "import megatron_prune, sys, os; assert 'torch' not in sys.modules\n"
    done = run(f"{first}assert '{device.TF32}' not in os.environ\n{program}", **{device.TF32: "1"})
    assert done.stdout == "False\n", done.stderr


def test_float32_products_are_whole_where_pytorch_came_first() -> None:
    program = (
        "import torch; assert torch.backends.cuda.matmul.allow_tf32\n"
        "import megatron_prune.backend\n"
        "from megatron_prune.log import environment\n"
        "assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32\n"
        "assert torch.get_float32_matmul_precision() == 'highest' and environment()['tf32'] is False\n"
    )
    done = run(program, **{device.TF32: "1"})
    assert done.returncode == 0 and "tf32" not in done.stderr.lower(), done.stderr


def test_the_image_does_not_round_float32_products() -> None:
    assert "ENV TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0" in (ROOT / "docker" / "Dockerfile").read_text().splitlines()
