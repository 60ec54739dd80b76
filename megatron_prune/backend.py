"""Device, process groups, seeds; and the one place that adapts megatron-core to a machine without CUDA.

Megatron-core names CUDA in many places (`torch.cuda.current_device()`, `device='cuda'`, `param.type()` compared with
'torch.cuda...'). Instead of patching torch for everybody, every loaded `megatron.core` module gets its own look-alike
of the `torch` module in which those names mean the CPU; torch as the user's code sees it stays untouched. Modules that
megatron-core imports later are adapted by an import hook. With CUDA present nothing is changed at all.

`import megatron_prune.backend` must come before any `import megatron.core`; the package's own modules do so. It has to
happen at import time: helper processes of asynchronous checkpoints import the main module again.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import itertools
import logging
import os
import random
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_prune import device as environment
from megatron_prune.errors import UserError
from megatron_prune.imports import (
    hollow_triton,
    keep_temporary_folder_clean,
    without_compiler,
    without_gpu_kernels,
    without_triton,
)
from megatron_prune.kernels.memory import keep_freed_memory
from megatron_prune.kernels.products import wide_products
from megatron_prune.kernels.selection import torch_deterministic

SUPPORTED_CORE = ("0.16", "0.19")
"""Of megatron-core: 0.16 is the last for Python 3.11, what follows needs 3.12. What is touched below was read from
0.16.1 and 0.19.2.
"""

_FACTORIES = (
    "tensor zeros ones empty full zeros_like ones_like empty_like full_like as_tensor arange rand randn randint "
    "randperm linspace"
).split()


def has_cuda() -> bool:
    """Whether this process computes on a GPU; MEGATRON_PRUNE_DEVICE=cpu leaves one unused."""
    return environment.has_cuda()


def device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def _is_cuda_device(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.startswith("cuda")
    )


def _on_cpu(factory: Any) -> Any:
    """`factory`, with `device='cuda'` read as the CPU and pinned memory left out."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda_device(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _LookAlike(types.ModuleType):
    """A module that answers like `original` except for the names in `replaced`."""

    def __init__(self, original: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(original.__name__, original.__doc__)
        self.__dict__.update(replaced)
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def _cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


class _Stream:
    """A stream, or an event in one, of a machine that does everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __getattr__(self, name: str) -> Any:
        if name in ("wait_stream", "wait_event", "wait", "record", "record_event", "synchronize"):
            return _nothing
        raise AttributeError(name)


def _look_alike_torch() -> _LookAlike:
    cuda = _LookAlike(
        torch.cuda,
        {
            "is_available": lambda: False,
            "current_device": lambda: torch.device("cpu"),
            "set_device": _nothing,
            "device_count": lambda: 1,
            "synchronize": _nothing,
            "get_rng_state": _cpu_rng_state,
            "set_rng_state": _set_cpu_rng_state,
            "manual_seed": torch.manual_seed,
            "current_stream": _Stream,
            "default_stream": _Stream,
            "stream": lambda _stream: contextlib.nullcontext(),
            "Stream": _Stream,
            "Event": _Stream,
        },
    )
    replaced = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _LookAlike(torch, {"cuda": cuda, **replaced})


_look_alike = _look_alike_torch()
keep_temporary_folder_clean()


def _adapt(module: types.ModuleType) -> None:
    """Point `module`'s name `torch` at the look-alike, and its CUDA generator functions at the CPU's."""
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = _look_alike
    if module.__name__ == "megatron.core.jit":
        module.__dict__["disable_jit_fuser"]()  # torch.compile's fusions are for GPUs, and loading it takes seconds
    if module.__name__ == "megatron.core.tensor_parallel.random":
        module.__dict__["_get_cuda_rng_state"] = _cpu_rng_state
        module.__dict__["_set_cuda_rng_state"] = _set_cpu_rng_state
    if module.__name__ == "megatron.core.optimizer.clip_grads":
        module.__dict__["l2_norm_impl"] = _norm_of_all
    if module.__name__ == "megatron.core.transformer.moe.moe_utils":
        module.__dict__.setdefault("te_general_gemm", None)  # 0.16 asks for it without Transformer Engine too
    if module.__name__ == "megatron.core.transformer.moe.token_dispatcher":
        module.__dict__["maybe_move_tensor_to_cpu"] = _as_on_cpu


def _norm_of_all(
    chunk: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], *_: Any
) -> tuple[torch.Tensor, None]:
    """Euclidean norm `[1]` of all elements, in place of Apex's kernel."""
    del chunk, overflow
    return square_sum(itertools.chain(*tensors)).sqrt().float().reshape(1), None


def _as_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Counts of tokens on the host, where megatron-core would leave those of a CPU tensor a tensor."""
    del record_stream
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


SQUARE_ROW = 4096
"""Elements whose squares are summed in float32 before float64 takes over."""


def square_sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of all elements' squares, scalar, float64; 0 without tensors.

    torch's float32 norm of a CPU tensor loses digits with its size: it is 0.16% too small for 28 million elements. By
    rows, in float32 inside of one, it is as exact as in float64 alone and takes a third of the time.
    """
    squares = [part for tensor in tensors for part in _row_squares(tensor.detach().flatten())]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device())


def _row_squares(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    whole = flat.numel() // SQUARE_ROW * SQUARE_ROW
    if whole:
        dtype = torch.promote_types(flat.dtype, torch.float32)
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, SQUARE_ROW), dim=1, dtype=dtype)
        yield rows.double().square().sum()
    if whole < flat.numel():
        yield torch.linalg.vector_norm(flat[whole:], dtype=torch.float64).square()


TRITON_DEMANDED = ".moe.ops.paged_stash"
"""A module of megatron-core 0.19 that imports Triton without asking whether it is there; its kernels are for GPUs."""


COMPILED = ".moe.router"
"""A module of megatron-core 0.19 that asks for PyTorch's compiler while it is imported."""


class _AdaptingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        hollow = module.__name__.endswith(TRITON_DEMANDED)
        as_it_is = without_compiler() if module.__name__.endswith(COMPILED) else contextlib.nullcontext()
        with without_gpu_kernels(), as_it_is, hollow_triton() if hollow else without_triton():
            self.loader.exec_module(module)
        _adapt(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _AdaptingFinder(importlib.abc.MetaPathFinder):
    """Adapts `megatron.core` modules right after they are executed, however late they are imported."""

    adapts_megatron = True
    """Tells it from other finders, also where this module is executed again after an import that failed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not (name == "megatron.core" or name.startswith("megatron.core.")):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec = find(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _AdaptingLoader(spec.loader)
                return spec
        return None


def _called_by_megatron(depth: int = 2) -> bool:
    return sys._getframe(depth).f_globals.get("__name__", "").startswith("megatron.core")


_tensor_type = torch.Tensor.type
_tensor_cuda = torch.Tensor.cuda


def _type_as_megatron_expects(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type()`; megatron-core compares the name with 'torch.cuda.FloatTensor' and so is told that name."""
    answer = _tensor_type(self, *args, **kwargs)
    if not args and not kwargs and isinstance(answer, str) and _called_by_megatron():
        return answer.replace("torch.", "torch.cuda.", 1)
    return answer


def _stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self if _called_by_megatron() else _tensor_cuda(self, *args, **kwargs)


NOISE = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}
"""Logger -> a warning of megatron-core that says nothing to the user. GPTModel: since 0.19 HybridModel is to follow it,
which has a final norm of Transformer Engine alone, no place for layers of unequal sizes, other names of weights, and
does not exist in 0.16; GPTModel goes on getting fixes.
"""
CPU_NOISE = {
    "megatron.core.tensor_parallel.random": "CPU RNG state changed within GPU RNG context",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "torch.utils.flop_counter": "triton not found",
}
"""The same without a GPU, where both generators are one, PyTorch's CUDA builds miss one, and Triton is hidden."""

WARNINGS = frozenset(
    {
        ("", "MimoModelConfig is experimental"),
        (r"megatron\.core", r"Could not determine rank"),
        (r"megatron\.core", r"The \.grad attribute of a Tensor that is not a leaf"),
        (r"torch\.distributed", r"`torch\.distributed\.\w+` is deprecated"),
    }
)
"""Module and message of such warnings of Python's; the distributed optimizer calls what torch has renamed."""
CPU_WARNINGS = frozenset(
    {
        (r"megatron\.core", r".*(Transformer Engine|Apex|apex).*"),
        (r"megatron\.core", r".*full scope is deprecated.*"),
        (r"megatron\.core", r".*load_state_dict.* is deprecated.*"),
        (r"torch\.distributed\.checkpoint", r".*we are deprecating ShardedTensor.*"),
    }
)
"""The same without a GPU."""


class _Without(logging.Filter):
    """Drops records with these words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()


QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Hardware queues of a GPU. With one, kernels start in the order in which they are launched, on which megatron-core
counts where a layer's collectives overlap with its products; FSDP's gathers need more than one to run beside products.
"""
_installed = False
_own_queue = False
"""Whether `QUEUES` was not set by the user."""


def _set_queues(layout: Layout) -> None:
    """One queue where layers are split; before this process uses its GPU. What the user has set stays."""
    if not _own_queue:
        return
    if layout.tensor == layout.context == 1:
        os.environ.pop(QUEUES, None)
    else:
        os.environ[QUEUES] = "1"


def install() -> None:
    """Adapt megatron-core to this machine; does nothing with CUDA present or when called again."""
    global _installed
    if _installed:
        return
    _installed = True
    global _own_queue
    _own_queue = QUEUES not in os.environ
    os.environ.setdefault(QUEUES, "1")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # PyTorch may have come before us
    for logger, words in (NOISE if has_cuda() else NOISE | CPU_NOISE).items():
        logging.getLogger(logger).addFilter(_Without(words))
    for source, message in WARNINGS if has_cuda() else WARNINGS | CPU_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=source)
    if has_cuda():
        return
    others = [finder for finder in sys.meta_path if not getattr(finder, "adapts_megatron", False)]
    sys.meta_path[:] = [_AdaptingFinder(), *others]
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            _adapt(module)
    setattr(torch.Tensor, "type", _type_as_megatron_expects)
    setattr(torch.Tensor, "cuda", _stay)


install()

import megatron.core  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


def core_version() -> tuple[int, ...]:
    """Of megatron-core: (0, 16)."""
    return tuple(int(x) for x in megatron.core.__version__.split(".")[:2])


def _check_core_version() -> None:
    if ".".join(map(str, core_version())) not in SUPPORTED_CORE:
        old, new = SUPPORTED_CORE
        raise UserError(
            f"megatron-core {megatron.core.__version__} is installed; megatron_prune works with {old} and {new}: "
            f"pip install 'megatron-core=={new}.*' (Python 3.12 or later) or 'megatron-core=={old}.*'"
        )


_check_core_version()
OWN_WRITER: dict[str, Any] = {"async_strategy": "mcore"} if core_version() >= (0, 17) else {}
"""For `dist_checkpointing.save`: its writer is megatron-core's own; since 0.17 it would ask for another package's."""


DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "^NVLS"}
"""By which libraries that a GPU computes with are told to give the same bits in every run: cuBLAS (products summed in
parts), Transformer Engine (gradients of attention), NCCL (sums made in the switch).
"""
_deterministic = False


def is_deterministic() -> bool:
    """Whether the same run must give the same bits on a GPU."""
    return _deterministic


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While active, where it is wanted, the same run gives the same bits on GPUs; to be entered before they are used.

    What has no such form is an error of torch. Afterwards everything is as it was. CPUs give the same bits anyway.
    """
    global _deterministic
    if not wanted:
        yield
        return
    before = {name: os.environ.get(name) for name in DETERMINISTIC}
    os.environ.update(DETERMINISTIC | {"NCCL_ALGO": before["NCCL_ALGO"] or DETERMINISTIC["NCCL_ALGO"]})
    _deterministic = True
    try:
        with torch_deterministic(True):
            yield
    finally:
        _deterministic = False
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass(frozen=True)
class Layout:
    """How one model is spread over the processes, and where this process stands in it."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    virtual_pipeline: int | None = None
    """Chunks of layers on each pipeline stage, interleaved with those of the others; None: one."""
    expert: int = 1
    """Processes that share out a layer's experts, out of those that are replicas for the rest of the model."""
    expert_tensor: int | None = None
    """Processes that share each expert; None: as many as share the other layers."""

    @property
    def expert_tensor_size(self) -> int:
        """Processes that share each expert."""
        return self.expert_tensor or self.tensor

    @property
    def chunks(self) -> int:
        """Separate pieces of the stack of layers on each process."""
        return self.virtual_pipeline or 1

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return dist.get_world_size() // (self.tensor * self.pipeline * self.context)

    @property
    def replicas_together(self) -> float:
        """Replicas whose tokens an expert gets at a time; above 1 they must make the same passes together."""
        return self.expert * self.expert_tensor_size / self.tensor

    def describe(self) -> str:
        """`tp2 pp1 cp1 dp4 sp`, for logs."""
        sequence = " sp" if self.sequence_parallel else ""
        virtual = f" vpp{self.virtual_pipeline}" if self.virtual_pipeline else ""
        experts = f" ep{self.expert}" if self.expert > 1 else ""
        experts += f" etp{self.expert_tensor}" if self.expert_tensor else ""
        return f"tp{self.tensor} pp{self.pipeline}{virtual} cp{self.context} dp{self.data}{experts}{sequence}"


def rank() -> int:
    """Global rank; 0 before the process groups exist and no launcher said otherwise."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def launch() -> str | None:
    """What tells this torchrun from others, the same after it has restarted its processes; None without torchrun."""
    identity = os.environ.get("TORCHELASTIC_RUN_ID")
    return str(os.getppid()) if identity == "none" else identity


def restarted() -> bool:
    """Whether torchrun has started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_layout(layout: Layout, world: int) -> None:
    """Refuse layouts that cannot exist on `world` processes, before any of them waits for another."""
    product = layout.tensor * layout.pipeline * layout.context
    if world % product:
        raise UserError(
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} parallel needs a multiple "
            f"of {product} processes and {world} run: start with torchrun --nproc-per-node {product}"
        )
    experts = layout.expert * layout.expert_tensor_size * layout.pipeline
    if world % experts:
        raise UserError(
            f"expert {layout.expert} x expert tensor {layout.expert_tensor_size} x pipeline {layout.pipeline} parallel "
            f"needs a multiple of {experts} processes and {world} run: start more, or give a smaller "
            "--expert-model-parallel-size or --expert-tensor-parallel-size"
        )
    if layout.virtual_pipeline is not None and layout.pipeline == 1:
        raise UserError(
            f"virtual-pipeline-model-parallel-size {layout.virtual_pipeline} was given with "
            "pipeline-model-parallel-size 1; it needs 2 or more: drop the flag"
        )
    if layout.sequence_parallel and layout.tensor == 1:
        raise UserError(
            "sequence-parallel was given with tensor-model-parallel-size 1; it needs 2 or more: drop the flag"
        )


def initialize(layout: Layout, seed: int = 0, timeout_minutes: float = 10.0) -> None:
    """Create torch.distributed and megatron-core process groups and seed every generator.

    One process needs no launcher: a process group of one is made in memory. A layout that is there already is replaced.
    A process that waits longer than `timeout_minutes` for another ends with an error. Without a GPU the process keeps
    memory that is freed from here on.
    """
    check_layout(layout, world_size())
    _set_queues(layout)
    if not has_cuda():
        keep_freed_memory()
    if not dist.is_initialized():
        connect(timedelta(minutes=timeout_minutes))
    release()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,  # beside NCCL's, for optimizer states of megatron-core's own
    )
    seed_everything(seed)


def connect(timeout: timedelta) -> None:
    """Create torch.distributed's processes, each with its GPU.

    NCCL is not told the device: its communicators would be made at once, and those of the layout by splitting this one,
    which others have found slower and, with processes that are in no group, hanging.
    """
    kind = "nccl" if has_cuda() else "gloo"
    if has_cuda():
        torch.cuda.set_device(_gpu_of_this_process())
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart of the processes, and groups that have ended, with the addresses of
            # what is gone. A store of rank 0's own is new each time, and the nodes of a job may count different numbers
            # of restarts.
            start = f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            store = dist.PrefixStore(f"{start}_{next(_connections)}", store)
        dist.init_process_group(kind, store=store, rank=rank, world_size=world, timeout=timeout)
    else:
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


_connections = itertools.count()
"""How often this process has connected, as often as all others of the launch."""


def _gpu_of_this_process() -> int:
    """By its number among the processes of this machine: each has a GPU of its own."""
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise UserError(
            f"process {number} of this machine (LOCAL_RANK, from 0) has no GPU, there are {gpus}: start at most {gpus} "
            f"processes, or all on the CPU with {environment.DEVICE}=cpu"
        )
    return number


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and megatron-core's tensor-parallel generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the generator that libraries use)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def release() -> None:
    """Forget the layout; the processes stay connected.

    megatron-core forgets its groups without ending them: each keeps its threads and connections, and a process that
    runs one verb after another gets slower with each.
    """
    if parallel_state.model_parallel_is_initialized():
        groups = parallel_state._global_process_group_list or ()
        parallel_state.destroy_model_parallel()
        for group in dict.fromkeys(groups):
            if group in dist.distributed_c10d._world.pg_map:  # neither None, for all processes, nor ended already
                dist.destroy_process_group(group)


def shutdown() -> None:
    """Forget the layout and disconnect the processes."""
    release()
    global _alone
    _alone = None
    if dist.is_initialized():
        dist.destroy_process_group()


_alone: ProcessGroupCollection | None = None


def alone() -> ProcessGroupCollection:
    """Process groups in which this rank is by itself: what a whole, unsharded layer on one rank is built with.

    Collective on its first call: every rank must call it.
    """
    global _alone
    if _alone is None:
        mine = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
        groups = ProcessGroupCollection()
        for name in "tp pp mp embd pos_embd cp tp_cp tp_dp_cp ep expt_tp tp_ep tp_ep_pp dp dp_cp expt_dp".split():
            setattr(groups, name, mine)
        groups.hcp = [mine]
        _alone = groups
    return _alone


@contextlib.contextmanager
def running(layout: Layout, seed: int = 0, timeout_minutes: float = 10.0) -> Iterator[None]:
    """Process groups for the duration of a verb, also torn down on error; processes connected before stay connected.

    On a CPU products of types that it lacks are made in float32 meanwhile.
    """
    connected = dist.is_initialized()
    initialize(layout, seed, timeout_minutes)
    try:
        with wide_products():
            yield
    finally:
        release()
        if not connected:
            shutdown()
