"""SparseGPT's solver on one layer, ours and IST-DASLab/sparsegpt's in turn in one run: time, mask, error, memory.

    git clone https://github.com/IST-DASLab/sparsegpt CHECKOUT
    python benchmarks/second_order.py --sparsegpt CHECKOUT [--device cuda] [--model HF_DIRECTORY --shared ../shared]

The layer is width x width; its weights are normal, its inputs correlated: tokens with covariance Q diag(1 / i) Q^T, Q a
random rotation, then every channel scaled by exp(normal / 2), 4 x width tokens in windows of 2048. Every solver runs in
a process of its own on the same tensors and starts, for each target, from the same Hessian (ours, float32). Everything
is done twice, since a first touch of memory costs more and a model has hundreds of matrices, and the best time of the
repeats counts (only the largest width is repeated); memory is the peak above weight and Hessian. With `--model` the
masks are also compared on all matrices of three layers of a real model, with inputs from C4. Their code is run as it
is; on a machine without CUDA only `torch.cuda.synchronize` is replaced from outside, by a no-op.

Writes benchmarks/results/second_order_DEVICE_DATE.json: the table for the largest width, and "growth" for all.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from gumbel_mask import process_bytes
from quality import C4_TRAINING, HERE, hardware, versions
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prune.decision.target import NM, Unstructured
from megatron_prune.methods.sparsegpt import SparseGPT
from megatron_prune.statistics.hessian import Hessian

TARGETS = {"2:4": NM(2, 4), "0.5": Unstructured(0.5)}
SOLVERS = ("ours", "theirs")
WINDOW = 2048
WARM_UP = 256
"""Width of the layer that each process solves first, unmeasured."""
REAL_LAYERS = (0, 14, 29)
REAL_WINDOWS, REAL_LENGTH = 32, 512


class Cost(NamedTuple):
    """What one piece of work took."""

    wall_s: float
    peak_bytes: int
    """Above what was held at its start."""


def layer(width: int) -> tuple[Tensor, Tensor]:
    """(weight [width, width], inputs [4 width, width]) as the docstring above says."""
    generator = torch.Generator().manual_seed(width)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    spread = torch.arange(1, width + 1).rsqrt()
    scale = torch.randn(width, generator=generator).div(2).exp()
    inputs = torch.randn(4 * width, width, generator=generator).mul_(spread) @ rotation
    return 0.02 * torch.randn(width, width, generator=generator), inputs.mul_(scale)


def measured(device: str, work: Callable[[], Any]) -> tuple[Any, Cost]:
    """What `work` returns, and the shorter time and the larger peak of doing it twice."""
    first = measured_once(device, work)[1]
    result, second = measured_once(device, work)
    return result, Cost(min(first.wall_s, second.wall_s), max(first.peak_bytes, second.peak_bytes))


def measured_once(device: str, work: Callable[[], Any]) -> tuple[Any, Cost]:
    """What `work` returns, and what it took."""
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
    before = torch.cuda.memory_allocated() if on_gpu else process_bytes("VmRSS")
    began = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if on_gpu else process_bytes("VmHWM")
    return result, Cost(seconds, peak - before)


class OneLinear:
    """A layer of its own, whole on this process, as methods see it."""

    name = "layer"

    def __init__(self, weight: Tensor, hessian: Tensor) -> None:
        self.dense = weight
        self.statistic = SimpleNamespace(value=lambda: hessian)
        self.blocks = {self.name: torch.arange(len(weight))}

    def weight(self) -> Tensor:
        return self.dense

    def gather(self, x: Tensor) -> Tensor:
        return x

    local = gather

    def keep(self, mask: Tensor, weight: Tensor | None = None) -> None:
        self.mask, self.solved = mask, weight


def solve_ours(weight: Tensor, hessian: Tensor, target: NM | Unstructured, checkout: Path) -> tuple[Tensor, Tensor]:
    """(mask, new weight) by the method as `prune` runs it."""
    linear = OneLinear(weight, hessian)
    SparseGPT().decide(SimpleNamespace(linears=lambda *_, **__: [linear], masks=lambda: None), target)
    assert linear.solved is not None
    return linear.mask, linear.solved


def peer(weight: Tensor, checkout: Path) -> Any:
    """Their solver for a linear with this weight."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    from sparsegpt import SparseGPT as Theirs  # type: ignore[import-not-found]

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight.data = weight.clone()
    return Theirs(linear)


def solve_theirs(weight: Tensor, hessian: Tensor, target: NM | Unstructured, checkout: Path) -> tuple[Tensor, Tensor]:
    """(mask, new weight) by theirs; they count the removed of a group."""
    solver = peer(weight, checkout)
    solver.H = hessian.clone()
    pattern = (target.m - target.n, target.m) if isinstance(target, NM) else (0, 0)
    with contextlib.redirect_stdout(io.StringIO()):
        solver.fasterprune(0.5, *pattern)
    new = solver.layer.weight.data
    return new != 0, new


def accumulate_ours(weight: Tensor, windows: list[Tensor], checkout: Path) -> Tensor:
    """The Hessian of all windows."""
    statistic = Hessian(weight.shape[1], weight.device)
    for window in windows:
        statistic.update(window)
    return statistic.value()


def accumulate_theirs(weight: Tensor, windows: list[Tensor], checkout: Path) -> Tensor:
    """The Hessian of all windows; theirs is per window, not per token."""
    solver = peer(weight, checkout)
    for window in windows:
        solver.add_batch(window, None)
    return solver.H


ACCUMULATE = {"ours": accumulate_ours, "theirs": accumulate_theirs}
SOLVE = {"ours": solve_ours, "theirs": solve_theirs}


@torch.no_grad()
def run_one(solver: str, folder: Path, device: str, checkout: Path) -> dict[str, Cost]:
    """Measure one solver on the layer in `folder` and leave what it made there."""
    costs: dict[str, Cost] = {}
    for tensors in (dict(zip(("weight", "inputs"), layer(WARM_UP), strict=True)), load_file(folder / "layer")):
        weight, inputs = tensors["weight"].to(device), tensors.pop("inputs").to(device)
        windows = list(inputs.split(WINDOW))
        _, costs["hessian"] = measured(device, lambda w=weight, x=windows: ACCUMULATE[solver](w, x, checkout))
        hessian = accumulate_ours(weight, windows, checkout)
        del inputs, windows
        made = {}
        for name, target in TARGETS.items():
            work = lambda w=weight, h=hessian, t=target: SOLVE[solver](w, h, t, checkout)  # noqa: E731
            (mask, new), costs[name] = measured(device, work)
            made |= {f"{name} mask": mask.cpu(), f"{name} weight": new.cpu().contiguous()}
    save_file(made | {"hessian": hessian.cpu()}, folder / solver)
    return costs


def agreement(
    weight: Tensor, hessian: Tensor, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]
) -> list[float]:
    """Share of equal mask entries, and how much larger our error tr((W - W') H (W - W')^T) is, relative to theirs."""
    errors = []
    for _, new in (ours, theirs):
        delta = new - weight
        errors.append(float(((delta @ hessian) * delta).sum(dtype=torch.float64)))
    return [float((ours[0] == theirs[0]).double().mean()), errors[0] / errors[1] - 1]


def compare(width: int, repeats: int, given: argparse.Namespace) -> dict[str, Any]:
    """Both solvers on the layer of this width, in turn: costs of each, and how far they agree."""
    costs: dict[str, list[dict[str, list[float]]]] = {solver: [] for solver in SOLVERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weight, inputs = layer(width)
        save_file({"weight": weight, "inputs": inputs}, folder / "layer")
        del inputs
        for _ in range(repeats):
            for solver in SOLVERS:
                command = [sys.executable, __file__, "--run", solver, "--folder", name, "--device", given.device]
                output = subprocess.check_output([*command, "--sparsegpt", str(given.sparsegpt)], text=True)
                costs[solver].append(json.loads(output.splitlines()[-1]))
                print(width, solver, output.splitlines()[-1], flush=True)
        made = {solver: load_file(folder / solver) for solver in SOLVERS}
    best = {s: {key: best_of([c[key] for c in found]) for key in found[0]} for s, found in costs.items()}
    pairs = {t: [(made[s][f"{t} mask"], made[s][f"{t} weight"]) for s in SOLVERS] for t in TARGETS}
    agreed = {t: agreement(weight, made["ours"]["hessian"], *pair) for t, pair in pairs.items()}
    return {"width": width, "costs": best, "agreed": agreed}


def best_of(found: list[list[float]]) -> dict[str, float]:
    """The shortest time and the largest peak of several costs."""
    return {"wall_s": min(cost[0] for cost in found), "peak_bytes": max(cost[1] for cost in found)}


def row(name: str, found: dict[str, Any], key: str) -> list[Any]:
    """One line of the table."""
    ours, theirs = (found["costs"][solver][key] for solver in SOLVERS)
    memory = [cost["peak_bytes"] / 2**30 for cost in (ours, theirs)]
    agreed = found["agreed"].get(key, [None, None])
    return [name, ours["wall_s"], theirs["wall_s"], theirs["wall_s"] / ours["wall_s"], *agreed, *memory]


@contextlib.contextmanager
def hessians_of(model: Any, statistics: dict[str, Hessian]) -> Iterator[None]:
    """While active, the inputs of these modules go to their statistics."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, s=s: s.update(x[0].flatten(0, -2)))
        for name, s in statistics.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def real(given: argparse.Namespace) -> list[list[Any]]:
    """(matrix, target, share of equal entries, relative difference of the error) on layers of a real model."""
    from transformers import AutoModelForCausalLM

    from megatron_prune.data.calibration import windows
    from megatron_prune.data.tokenizer import load_tokenizer

    c4 = given.shared / "data" / "c4" / "c4_en_sample.jsonl"
    tokens = windows([c4], load_tokenizer(given.model), REAL_WINDOWS, REAL_LENGTH, 0, slice(0, C4_TRAINING)).tokens
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval().to(given.device)
    names = [n for n, m in model.named_modules() if n.endswith("_proj") and int(n.split(".")[2]) in REAL_LAYERS]
    weights = {name: model.get_submodule(name).weight.float() for name in names}
    statistics = {name: Hessian(w.shape[1], w.device) for name, w in weights.items()}
    with hessians_of(model, statistics):
        for window in tokens.to(given.device).split(4):
            model.model(window)
    rows = []
    for name, weight in weights.items():
        hessian = statistics[name].value()
        for target in TARGETS:
            pair = [SOLVE[solver](weight, hessian, TARGETS[target], given.sparsegpt) for solver in SOLVERS]
            rows.append([name, target, *agreement(weight, hessian, *pair)])
    return rows


def result_of(given: argparse.Namespace) -> dict[str, Any]:
    """Everything measured."""
    widths = sorted(given.widths)
    growth = [compare(width, given.repeat if width == widths[-1] else 1, given) for width in widths]
    largest = growth[-1]
    size = f"{largest['width']} x {largest['width']}"
    rows = [row(f"{size}, {target}", largest, target) for target in TARGETS]
    rows.append(row(f"Hessian of {4 * largest['width']} tokens", largest, "hessian"))
    layers = real(given) if given.model else []
    for target in TARGETS if layers else ():
        found = [entry[2:] for entry in layers if entry[1] == target]
        worst = [min(equal for equal, _ in found), max((error for _, error in found), key=abs)]
        rows.append([f"{len(found)} matrices of a real model, {target}", None, None, None, *worst, None, None])
    processor = torch.cuda.get_device_name() if given.device == "cuda" else hardware()
    names = ["wall s", "wall s (sparsegpt repo)", "times faster", "equal mask entries", "error above theirs"]
    return {
        "columns": ["layer", *names, "peak GiB", "peak GiB (sparsegpt repo)"],
        "rows": rows,
        "protocol": f"Factor and solve from the same Hessian, best of {given.repeat} processes that do it twice; "
        "inputs with a 1 / i spectrum. Error: squared error of the layer's outputs, relative difference. Memory above "
        f"weight and Hessian. Real model: SmolLM2-135M, layers {', '.join(map(str, REAL_LAYERS))}, inputs from "
        f"{REAL_WINDOWS * REAL_LENGTH} tokens of C4; the worst matrix.",
        "growth": growth,
        "real_layers": layers,
        "threads": torch.get_num_threads(),
        "hardware": processor,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def main() -> None:
    """Run both and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsegpt", type=Path, required=True, help="a checkout of github.com/IST-DASLab/sparsegpt")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 3072, 4096])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--model", type=Path, help="also compare masks on layers of this Hugging Face model")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--run", choices=SOLVERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was given and PyTorch sees no GPU")
    if given.run:
        print(json.dumps(run_one(given.run, given.folder, given.device, given.sparsegpt)))
        return
    result = result_of(given)
    path = HERE / "results" / f"second_order_{given.device}_{result['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
