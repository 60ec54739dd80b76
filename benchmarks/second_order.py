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

Writes RESULTS/second_order_DEVICE_DATE.json: the table for the largest width, and "growth" for all.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.results import DEVICE, SHARED, arguments, option, write_result
from bench.running import Times, apart, best, cost, in_turns
from bench.study import Texts

if __name__ == "__main__":
    GIVEN = arguments(
        __doc__,
        option("--sparsegpt", type=Path, required=True, help="a checkout of github.com/IST-DASLab/sparsegpt"),
        DEVICE,
        option("--widths", type=int, nargs="+", default=[1024, 2048, 3072, 4096]),
        option("--repeat", type=int, default=2),
        option("--model", type=Path, help="also compare masks on layers of this Hugging Face model"),
        SHARED,
    )

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prune.decision.target import NM, Unstructured
from megatron_prune.methods.sparsegpt import SparseGPT
from megatron_prune.statistics.hessian import Hessian

Target = NM | Unstructured
TARGETS: dict[str, Target] = {"2:4": NM(2, 4), "0.5": Unstructured(0.5)}
WINDOW = 2048
WARM_UP = 256
"""Width of the layer that each process solves first, unmeasured."""
REAL_LAYERS = (0, 14, 29)
REAL_WINDOWS, REAL_LENGTH = 32, 512
SIDES = ("", " (sparsegpt repo)")
NAMES = ["times faster", "equal mask entries", "error above theirs"]
COLUMNS = ["layer", *(f"wall s{side}" for side in SIDES), *NAMES, *(f"peak GiB{side}" for side in SIDES)]
Costs = dict[str, Times]
"""`wall_s` and `peak_bytes` of the Hessian and of each target."""
Solved = tuple[Tensor, Tensor]
"""(mask, new weight)"""


def layer(width: int) -> dict[str, Tensor]:
    """weight [width, width] and inputs [4 width, width] as the docstring above says."""
    generator = torch.Generator().manual_seed(width)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    spread = torch.arange(1, width + 1).rsqrt()
    scale = torch.randn(width, generator=generator).div(2).exp()
    inputs = torch.randn(4 * width, width, generator=generator).mul_(spread) @ rotation
    return {"weight": 0.02 * torch.randn(width, width, generator=generator), "inputs": inputs.mul_(scale)}


class Ours:
    """The method as `prune` runs it."""

    def accumulate(self, weight: Tensor, windows: list[Tensor]) -> Tensor:
        """The Hessian of all windows."""
        statistic = Hessian(weight.shape[1], weight.device)
        for window in windows:
            statistic.update(window)
        return statistic.value()

    def solve(self, weight: Tensor, hessian: Tensor, target: Target) -> Solved:
        """From a Hessian."""
        solved: list[Solved] = []
        linear = SimpleNamespace(
            name="layer",
            weight=lambda: weight,
            statistic=SimpleNamespace(value=lambda: hessian),
            blocks={"layer": torch.arange(len(weight))},
            gather=lambda x: x,
            local=lambda x: x,
            keep=lambda *found: solved.append(found),
        )
        SparseGPT().decide(SimpleNamespace(linears=lambda *_, **__: [linear], masks=lambda: None), target)  # type: ignore[arg-type]
        return solved[0]


class Theirs:
    """The authors' code."""

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        if not torch.cuda.is_available():
            torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
        import sparsegpt  # type: ignore[import-not-found]

        self.made_for = sparsegpt.SparseGPT

    def solver(self, weight: Tensor) -> Any:
        """For a linear with this weight."""
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        linear.weight.data = weight.clone()
        return self.made_for(linear)

    def accumulate(self, weight: Tensor, windows: list[Tensor]) -> Tensor:
        """The Hessian of all windows; theirs is per window, not per token."""
        solver = self.solver(weight)
        for window in windows:
            solver.add_batch(window, None)
        return solver.H

    def solve(self, weight: Tensor, hessian: Tensor, target: Target) -> Solved:
        """From a Hessian; they count the removed of a group."""
        solver = self.solver(weight)
        solver.H = hessian.clone()
        pattern = (target.m - target.n, target.m) if isinstance(target, NM) else (0, 0)
        with contextlib.redirect_stdout(io.StringIO()):
            solver.fasterprune(0.5, *pattern)
        new = solver.layer.weight.data
        return new != 0, new


SOLVERS: dict[str, Callable[[Path], Any]] = {"ours": lambda _: Ours(), "theirs": Theirs}


@torch.no_grad()
def run_one(name: str, folder: Path, device: str, checkout: Path) -> Costs:
    """Measure one solver on the layer in `folder` and leave what it made there."""
    costs: Costs = {}
    solver = SOLVERS[name](checkout)
    for tensors in (layer(WARM_UP), load_file(folder / "layer")):
        weight, inputs = tensors["weight"].to(device), tensors.pop("inputs").to(device)
        windows = list(inputs.split(WINDOW))
        _, costs["hessian"] = cost(partial(solver.accumulate, weight, windows), device, 2)
        hessian = Ours().accumulate(weight, windows)
        del inputs, windows
        made = {"hessian": hessian.cpu()}
        for key, target in TARGETS.items():
            (mask, new), costs[key] = cost(partial(solver.solve, weight, hessian, target), device, 2)
            made |= {f"{key} mask": mask.cpu(), f"{key} weight": new.cpu().contiguous()}
    save_file(made, folder / name)
    return costs


def agreement(weight: Tensor, hessian: Tensor, ours: Solved, theirs: Solved) -> list[float]:
    """Share of equal mask entries, and how much larger our error tr((W - W') H (W - W')^T) is, relative to theirs."""
    errors = []
    for _, new in (ours, theirs):
        delta = new - weight
        errors.append(float(((delta @ hessian) * delta).sum(dtype=torch.float64)))
    return [float((ours[0] == theirs[0]).double().mean()), errors[0] / errors[1] - 1]


def compare(width: int, repeats: int) -> dict[str, Any]:
    """Both solvers on the layer of this width, in turn: costs of each, and how far they agree."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(layer(width), folder / "layer")

        def one(name: str) -> Costs:
            costs = apart(run_one, name, folder, GIVEN.device, GIVEN.sparsegpt, threads=None)[0]
            print(width, name, costs, flush=True)
            return costs

        runs = in_turns({name: partial(one, name) for name in SOLVERS}, repeats, uncounted=0)
        made = {name: load_file(folder / name) for name in SOLVERS}
        weight = load_file(folder / "layer")["weight"]
    pairs = {t: [(made[s][f"{t} mask"], made[s][f"{t} weight"]) for s in SOLVERS] for t in TARGETS}
    agreed = {t: agreement(weight, made["ours"]["hessian"], *pair) for t, pair in pairs.items()}
    costs = {name: {key: best([one[key] for one in found]) for key in found[0]} for name, found in runs.items()}
    return {"width": width, "costs": costs, "agreed": agreed}


def row(name: str, found: dict[str, Any], key: str) -> list[Any]:
    """One line of the table."""
    ours, theirs = (found["costs"][solver][key] for solver in SOLVERS)
    memory = [cost["peak_bytes"] / 2**30 for cost in (ours, theirs)]
    agreed = found["agreed"].get(key, [None, None])
    return [name, ours["wall_s"], theirs["wall_s"], theirs["wall_s"] / ours["wall_s"], *agreed, *memory]


@torch.no_grad()
def real() -> list[list[Any]]:
    """[matrix, target, share of equal entries, relative difference of the error] on layers of a real model."""
    from transformers import AutoModelForCausalLM

    from megatron_prune.data.tokenizer import load_tokenizer

    tokens = Texts(GIVEN.shared).c1_windows(load_tokenizer(GIVEN.model), REAL_WINDOWS, REAL_LENGTH)
    model: Any = AutoModelForCausalLM.from_pretrained(GIVEN.model, dtype=torch.bfloat16).eval().to(GIVEN.device)
    names = [n for n, m in model.named_modules() if n.endswith("_proj") and int(n.split(".")[2]) in REAL_LAYERS]
    weights = {name: model.get_submodule(name).weight.float() for name in names}
    statistics = {name: Hessian(w.shape[1], w.device) for name, w in weights.items()}
    for name, s in statistics.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, s=s: s.update(x[0].flatten(0, -2)))
    for window in tokens.to(GIVEN.device).split(4):
        model.model(window)
    solvers = [made_for(GIVEN.sparsegpt) for made_for in SOLVERS.values()]
    rows = []
    for name, weight in weights.items():
        hessian = statistics[name].value()
        for key, target in TARGETS.items():
            pair = [solver.solve(weight, hessian, target) for solver in solvers]
            rows.append([name, key, *agreement(weight, hessian, *pair)])
    return rows


def worst(layers: list[list[Any]], target: str) -> list[Any]:
    """The line of a real model's matrices."""
    found = [entry[2:] for entry in layers if entry[1] == target]
    cells = [min(equal for equal, _ in found), max((error for _, error in found), key=abs)]
    return [f"{len(found)} matrices of a real model, {target}", None, None, None, *cells, None, None]


def main() -> None:
    """Run both and write the result file."""
    *smaller, largest = sorted(GIVEN.widths)
    growth = [*(compare(width, 1) for width in smaller), compare(largest, GIVEN.repeat)]
    rows = [row(f"{largest} x {largest}, {target}", growth[-1], target) for target in TARGETS]
    rows.append(row(f"Hessian of {4 * largest} tokens", growth[-1], "hessian"))
    layers = real() if GIVEN.model else []
    rows += [worst(layers, target) for target in TARGETS if layers]
    protocol = (
        f"Factor and solve from the same Hessian, best of {GIVEN.repeat} processes that do it twice; inputs with a 1 / "
        "i spectrum. Error: squared error of the layer's outputs, relative difference. Memory above weight and "
        f"Hessian. Real model: SmolLM2-135M, layers {', '.join(map(str, REAL_LAYERS))}, inputs from "
        f"{REAL_WINDOWS * REAL_LENGTH} tokens of C4; the worst matrix."
    )
    device = torch.cuda.get_device_name() if GIVEN.device == "cuda" else None
    about: dict[str, Any] = {"growth": growth, "real_layers": layers, "threads": torch.get_num_threads()}
    write_result(f"second_order_{GIVEN.device}", GIVEN, COLUMNS, rows, protocol, device=device, **about)


if __name__ == "__main__":
    main()
