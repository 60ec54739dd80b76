"""The checks of one GPU, most risk first; on a CPU the same in small (`gpu_check.py` says how to run them)."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_prune.backend as backend  # isort: skip
import torch
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.kernels import gumbel, second_order
from megatron_prune.kernels.gumbel import Draw, Position, masked_weight, patterns
from megatron_prune.kernels.philox import gumbel_noise
from megatron_prune.log import environment

from .acceptance import GIB, Check, Found, Place, Skip, furthest, losses, metrics, within
from .kill_test import curve, last_step, masks, other_bits, start, wait_until

ROOT = Path(__file__).resolve().parents[1]
DRAW = Draw(seed=7, step=3, microbatch=2, tensor_id=1)
SOFT: dict[str, Any] = {"n": 2, "m": 4, "scale": 2.0, "temperature": 0.7, "draw": DRAW}
BFLOAT16, EXACT = 1e-2, 1e-4
"""Largest relative differences where the masked weight is rounded to bfloat16, and of float32."""


# --- the machine ---


def machine(place: Place) -> Found:
    """Float32 products are whole; which norm, attention and Adam megatron-core's model gets, and what is installed."""
    from megatron.core import optimizer

    with backend.running(backend.Layout()):
        model = open_model(place.small_hf).load(backend.Layout())
        kinds = {type(module).__name__ for chunk in model.chunks for module in chunk.modules()}
    about = environment()
    value = {
        "gpu": about["devices"][0],
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "modules": sorted(kind for kind in kinds if "Norm" in kind or "Attention" in kind),
        "adam": f"{optimizer.Adam.__module__}.{optimizer.Adam.__name__}",
        "cuda": torch.version.cuda,
        "python": about["python"],
        **about["packages"],
    }
    return Found(backend.has_cuda() and not value["tf32"], value, {"tf32": False})


# --- masks ---


def fast(place: Place) -> Any:
    """The implementation that this device is meant to use."""
    return "triton" if place.on_gpu else "cpu"


def example(place: Place, rows: int, groups: int, weight: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [rows, 4 groups], logits [rows, groups, 6] float32, gradient of the masked weight)."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, groups, 6, generator=generator)
    both = [torch.randn(rows, 4 * groups, generator=generator).to(place.device, weight) for _ in range(2)]
    return both[0], logits.to(place.device), both[1]


def evaluate(weight: Tensor, logits: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(masked weight, gradient of the logits) of one call."""
    logits = logits.clone().requires_grad_()
    where = Position.whole(logits.shape[0], logits.shape[1], weight.device)
    output = masked_weight(weight, logits, **{**SOFT, "position": where, **options})
    output.backward(grad)
    accumulator = options.get("accumulate_into")
    found = logits.grad if accumulator is None else accumulator
    assert found is not None
    return output.detach(), found


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference by the largest value."""
    b = b.to(a.device)
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def mask_kernels(place: Place) -> Found:
    """The fast kernels against PyTorch on this device, and against C on the CPU: soft, hard, adding, of shards."""
    found = {"masked weight, bfloat16": 0.0, "gradient of logits": 0.0}
    size = (4096, 1024) if place.on_gpu else (64, 48)
    for rows, groups in (size, (5, 37)):
        tensors = example(place, rows, groups, torch.bfloat16)
        for hard in (False, True):
            for adding in (False, True):
                given = [{"accumulate_into": torch.ones_like(tensors[1])} if adding else {} for _ in range(2)]
                ours = evaluate(*tensors, hard=hard, implementation=fast(place), **given[0])
                plain = evaluate(*tensors, hard=hard, implementation="eager", **given[1])
                _worse(found, ours, plain)
        if place.on_gpu:
            there = evaluate(*(tensor.cpu() for tensor in tensors))  # C, where there is a compiler
            _worse(found, evaluate(*tensors, implementation=fast(place)), there)
    found["parts that differ from the whole"] = float(_parts_that_differ(place))
    found["winners that differ"] = float(_winners_that_differ(place))
    found["noise of a million groups"] = _noise_difference(place)
    limits = {
        "masked weight, bfloat16": BFLOAT16,
        "gradient of logits": EXACT,
        "parts that differ from the whole": 0,
        "winners that differ": 0,
        "noise of a million groups": 2e-6,
    }
    return within(found, limits)


def _worse(found: dict[str, float], ours: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for key, a, b in zip(("masked weight, bfloat16", "gradient of logits"), ours, other, strict=True):
        found[key] = max(found[key], apart(a, b))


def _parts_that_differ(place: Place) -> int:
    """Of the quarters of a weight, as 2 x 2 processes have them, those that are not the bits of the whole."""
    rows, groups = 64, 32
    weight, logits, grad = example(place, rows, groups)
    whole = evaluate(weight, logits, grad, implementation=fast(place))
    differing = 0
    for row_ids in (torch.arange(0, rows, 2), torch.arange(1, rows, 2)):
        for first in (0, groups // 2):
            r, g = row_ids.to(place.device), slice(first, first + groups // 2)
            w = slice(4 * g.start, 4 * g.stop)
            part = [weight[r, w], logits[r, g], grad[r, w]]
            position = Position(r, first, groups)
            made = evaluate(*(x.contiguous() for x in part), position=position, implementation=fast(place))
            same = torch.equal(made[0], whole[0][r, w]) and torch.equal(made[1], whole[1][r, g])
            differing += not same
    return differing


def _winners_that_differ(place: Place) -> int:
    """Groups whose decoded pattern is another with the fast kernel, equal logits among them."""
    logits = torch.randn(256, 300, 6, generator=torch.Generator().manual_seed(0)).round(decimals=1).to(place.device)
    return int((gumbel.winners(logits, fast(place)) != gumbel.winners(logits, "eager")).sum())


def _noise_difference(place: Place) -> float:
    """Of masks that come from the noise alone, whose steepness is one half."""
    groups = 10**6
    weight = torch.ones(1000, 4 * groups // 1000, device=place.device)
    logits = torch.zeros(1000, groups // 1000, 6, device=place.device)
    options = {**SOFT, "temperature": 1.0, "position": Position.whole(1000, groups // 1000, place.device)}
    with torch.no_grad():
        ours, plain = (masked_weight(weight, logits, **options, implementation=x) for x in (fast(place), "eager"))
    return float((ours - plain).abs().max())


def gradients(place: Place) -> Found:
    """The fast kernel against autograd of the definition in float64."""
    weight, logits, grad = example(place, 64, 16)
    found = {}
    for hard in (False, True):
        ours = evaluate(weight, logits, grad, hard=hard, implementation=fast(place))
        exact = logits.double().cpu().requires_grad_()
        output = definition(weight.double().cpu(), exact, hard)
        output.backward(grad.double().cpu())
        assert exact.grad is not None
        kind = "hard" if hard else "soft"
        found[f"{kind}, masked weight"] = apart(ours[0].cpu(), output.detach())
        found[f"{kind}, gradient of logits"] = apart(ours[1].cpu(), exact.grad)
    return within(found, dict.fromkeys(found, EXACT))


def definition(weight: Tensor, logits: Tensor, hard: bool) -> Tensor:
    """weight * mask, mask = softmax((scale * logits + Gumbel noise) / temperature) @ patterns, straight through."""
    places = torch.arange(logits[..., 0].numel()).view(logits.shape[:2])
    noisy = SOFT["scale"] * logits + gumbel_noise(places, logits.shape[-1], DRAW.key())
    table = patterns(2, 4).to(logits.dtype)
    mask = (noisy / SOFT["temperature"]).softmax(-1) @ table
    if hard:
        mask = table[noisy.argmax(-1)] + mask - mask.detach()
    return weight * mask.flatten(1)


def wide_index(place: Place) -> Found:
    """Logits beyond 2^31 elements: the last rows are those of a small call at their place."""
    rows, groups, tail = 24576, 14592, 4
    generator = torch.Generator(place.device).manual_seed(0)
    make: dict[str, Any] = {"device": place.device, "dtype": torch.bfloat16, "generator": generator}
    weight, logits = torch.randn(rows, 4 * groups, **make), torch.randn(rows, groups, 6, **make).requires_grad_()
    ids = torch.arange(rows, device=place.device)
    whole = masked_weight(weight, logits, **SOFT, position=Position(ids, 0, groups))
    grad = torch.ones_like(whole)
    whole.backward(grad)
    assert logits.grad is not None and logits.numel() > 2**31
    part = logits.detach()[-tail:].clone()
    small = evaluate(weight[-tail:].clone(), part, grad[-tail:], position=Position(ids[-tail:], 0, groups))
    same = torch.equal(whole.detach()[-tail:], small[0]) and torch.equal(logits.grad[-tail:], small[1])
    return Found(same, {"elements": logits.numel(), "last rows equal": same}, {"last rows equal": True})


def roofline(place: Place) -> Found:
    """Share of the bandwidth of a plain copy at which a 4096 x 4096 mask goes, in bfloat16 with float32 logits."""
    from gumbel_mask import Case, copy_bandwidth, gpu_once, necessary_bytes

    tensors, bandwidth = Case(4096).make("cuda"), copy_bandwidth(3)
    gpu_once("ours", tensors)
    times = min((gpu_once("ours", tensors) for _ in range(5)), key=lambda one: one["total_s"])
    needed = necessary_bytes(*tensors[:2])
    shares = {part: needed[part] / bandwidth / times[f"{part}_s"] for part in ("forward", "backward")}
    value = {**shares, "copy_gb_per_s": bandwidth / 1e9, "call_us": times["call_s"] * 1e6}
    return Found(min(shares.values()) >= 0.6, value, {"forward": ">= 0.6", "backward": ">= 0.6"})


# --- SparseGPT ---


def sparsegpt(place: Place) -> Found:
    """2:4 of one matrix: the fast solver against PyTorch's, rows in three parts, and how long it takes."""
    rows, columns = (4096, 4096) if place.on_gpu else (48, 128)
    generator = torch.Generator(place.device).manual_seed(0)
    weight = torch.randn(rows, columns, device=place.device, generator=generator)
    inputs = torch.randn(2 * columns, columns, device=place.device, generator=generator)
    inputs = inputs @ (torch.eye(columns, device=place.device) + 0.02 * inputs[:columns])
    hessian = inputs.t() @ inputs / len(inputs)

    def solve(part: Tensor) -> tuple[Tensor, Tensor]:
        return second_order.solve_nm(part, second_order.factorise(hessian.clone(), 0.01), 2, 4)

    solve(weight)  # compiles
    _wait(place)
    began = time.perf_counter()
    mask, new = solve(weight)
    _wait(place)
    seconds = time.perf_counter() - began
    parts = [solve(part.contiguous()) for part in weight.tensor_split(3)]
    with mock.patch.object(second_order, "_fast", lambda device: None):
        plain_mask, plain = solve(weight)
    errors = [float((((w - weight) @ hessian) * (w - weight)).sum(dtype=torch.float64)) for w in (new, plain)]
    found = {
        "output error, relative difference": abs(errors[0] / errors[1] - 1),
        "mask entries that differ": float((mask != plain_mask).double().mean()),
        "parts that differ": float(not torch.equal(torch.cat([part[1] for part in parts]), new)),
        "seconds": seconds,
    }
    limits = {"output error, relative difference": 1e-3, "mask entries that differ": 1e-3, "parts that differ": 0}
    return within(found, {**limits, "seconds": 2.0 if place.on_gpu else 60.0})


def _wait(place: Place) -> None:
    if place.on_gpu:
        torch.cuda.synchronize()


# --- the road ---


def road(place: Place) -> Found:
    """Import, SparseGPT, masks learned in 20 steps: the loss falls, and what a step costs beside dense training."""
    steps, run, dense = 20, place.path("road"), place.path("road_dense")
    place.large_run  # noqa: B018  (made first: its time is the check's)
    place.forget()
    learning = place.learning(steps, lr=LEARNING_RATE, min_lr=LEARNING_RATE)
    place.verb("prune", input=place.large_checkpoint, output=run, method="maskllm", target="2:4", **learning)
    found = losses(run)
    first, last = sum(found[:4]) / 4, sum(found[-4:]) / 4
    value: dict[str, Any] = {"first losses": first, "last losses": last, "tokens/s": metrics(run)[-1]["tokens_per_s"]}
    passed = all(map(math.isfinite, found)) and last < first
    limit: dict[str, Any] = {"last losses": "< first losses"}
    if place.on_gpu:
        place.verb("train", input=place.large_checkpoint, output=dense, **place.learning(8))
        value["masks / dense, a step"] = _median_step(run) / _median_step(dense)
        value["waits for the GPU in a micro-batch"] = _waits(place)
        passed &= value["masks / dense, a step"] <= 1.6 and value["waits for the GPU in a micro-batch"] <= 0
        limit |= {"masks / dense, a step": 1.6, "waits for the GPU in a micro-batch": 0}
    return Found(passed, value, limit)


LEARNING_RATE = 1e-3


def _median_step(run: Path) -> float:
    times = sorted(record["step_s"] for record in metrics(run)[2:])
    return times[len(times) // 2]


def _waits(place: Place) -> float:
    """How often each further micro-batch of a step makes Python wait for the GPU."""
    counts = []
    for windows in (2, 6):
        run = place.path(f"waits_{windows}")
        options = {**place.learning(3), "global_batch_size": windows, "seq_length": 256}
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                place.verb("prune", input=place.small_hf, output=run, method="maskllm", target="2:4", **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(each.message) for each in told))
    return (counts[1] - counts[0]) / (4 * 3)


def memory(place: Place) -> Found:
    """The peak of the masks' run against what `plan` says before."""
    run, output = place.path("road"), place.path("plan.json")
    if not run.exists():
        raise Skip("needs the run of the check `road`")
    learning = place.learning(20)
    place.verb(
        "plan", input=place.large_checkpoint, method="maskllm", target="2:4", processes=1, output=output, **learning
    )
    stage = json.loads(output.read_text())["stages"][0]
    planned = sum(stage.values()) / GIB
    seen = max(record["peak_memory_gib"] for record in metrics(run))
    return Found(0.95 <= seen / planned <= 1.15, {"GiB": seen, "planned": planned}, "0.95 to 1.15 of the plan")


# --- resuming ---


def killed(place: Place) -> Found:
    """SIGKILL in step 12 of a run of its own process, `--resume`: as if left alone; saved behind its back, or not."""
    found = {}
    kinds = {"deterministic": ["--deterministic", "--async-save"]} | ({"plain": []} if place.on_gpu else {})
    for kind, more in kinds.items():
        options = place.learning(
            40, save_interval=5, input=place.small_hf, method="maskllm", target="2:4", log_interval=1
        )
        options |= {"seq_length": 256 if place.on_gpu else 32}
        flags = [*_flags(options), *more]
        alone, run = place.path(f"alone_{kind}"), place.path(f"killed_{kind}")
        place.verb("prune", *flags, "--output", alone)
        process = start(flags, run)
        wait_until(lambda run=run: last_step(run) >= 12, process)  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"the run ended before it was killed, with status {process.returncode}")
        place.verb("prune", *flags, "--output", run, "--resume")
        found[f"{kind}, loss"] = furthest(losses(run), losses(alone))
        if kind == "deterministic":
            found[f"{kind}, other curve"] = float(curve(run) != curve(alone))
        found[f"{kind}, masks"] = other_bits(masks(run), masks(alone))
    limits: dict[str, float] = {"deterministic, loss": 0, "deterministic, other curve": 0, "deterministic, masks": 0}
    limits |= {"plain, loss": 1e-3, "plain, masks": 1e-3} if place.on_gpu else {}
    return within(found, limits)


def _flags(options: dict[str, object]) -> list[str]:
    from .acceptance import flags

    return flags(**options)


def fsdp(place: Place) -> Found:
    """Four steps of the FSDP engine, with a teacher and recomputation, against the other engine; stopped, resumed."""
    from dataclasses import replace

    sizes = replace(place.small, dtype="float32")
    student, teacher = place.model("float32_hf", sizes), place.model("float32_teacher", sizes, seed=1)
    options = place.learning(4, input=student, teacher=teacher, lm_weight=1, recompute=True, lr=1e-3)
    options |= {"seq_length": 256 if place.on_gpu else 32}
    runs = {name: place.path(f"fsdp_{name}") for name in ("megatron", "alone", "stopped")}
    place.verb("train", **options, output=runs["megatron"])
    place.verb("train", **options, output=runs["alone"], engine="fsdp")
    place.verb("train", **options, output=runs["stopped"], engine="fsdp", time_limit=1e-9)
    if len(losses(runs["stopped"])) != 1:
        raise RuntimeError("the run was to stop after its first step")
    place.verb("train", **options, output=runs["stopped"], engine="fsdp", resume=True)
    found = {
        "from the other engine": furthest(losses(runs["alone"]), losses(runs["megatron"])),
        "resumed": furthest(losses(runs["stopped"]), losses(runs["alone"])),
    }
    return within(found, dict.fromkeys(found, 1e-3))


# --- proof and scores ---


def verified(place: Place) -> Found:
    """Megatron's logits against transformers' in float32, dense and pruned, and the export's bits."""
    found: dict[str, float] = {}
    limits: dict[str, float] = {}
    for kind, checkpoint, hf in (
        ("dense", place.large_checkpoint, place.large_hf),
        ("pruned", place.large_sparse, place.large_sparse_hf),
    ):
        output = place.path(f"verify_{kind}.json")
        place.verb("verify", input=checkpoint, against=hf, output=output, seq_length=128, tolerance=1)
        logits = json.loads(output.read_text())["logits"]
        found[f"{kind}, by the largest logit"] = logits["max_absolute_difference"] / logits["largest_logit"]
        found[f"{kind}, other argmax"] = 1 - logits["same_argmax"]
        limits |= {f"{kind}, by the largest logit": 1e-4, f"{kind}, other argmax": 1e-3}
    back = place.path("exported")
    place.verb("export", input=place.large_checkpoint, output=back)
    found["exported tensors that differ"] = float(_tensors_that_differ(place.large_hf, back))
    return within(found, limits | {"exported tensors that differ": 0})


def _tensors_that_differ(a: Path, b: Path) -> int:
    from megatron_prune.model.convert import HFReader

    first, second = HFReader(str(a)), HFReader(str(b))
    names = set(first.names()) | set(second.names())
    if set(first.names()) != set(second.names()):
        return len(names)
    return sum(not torch.equal(first.read(name), second.read(name)) for name in names)


TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {validation: words.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}}"
doc_to_choice: answers
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def tasks(place: Place) -> Found:
    """Log-likelihoods of a task's answers: megatron-core's model against transformers', and a GPU's against a CPU's."""
    if importlib.util.find_spec("lm_eval") is None:
        raise Skip("lm_eval is not installed")
    folder = _write_task(place, 200 if place.on_gpu else 12)
    checkpoint = place.imported(place.small_hf)
    ours = _likelihoods(place, folder, checkpoint, "ours")
    found = {"from transformers' model": _furthest_of(ours, _likelihoods(place, folder, place.small_hf, "theirs"))}
    if place.on_gpu:
        words = [sys.executable, "-m", "megatron_prune", *_evaluate(place, folder, checkpoint, "cpu")]
        subprocess.run(words, check=True, timeout=120, env=os.environ | {"MEGATRON_PRUNE_DEVICE": "cpu"})
        found["from the CPU's"] = _furthest_of(ours, _read(place.path("samples_cpu.jsonl")))
    return within(found, dict.fromkeys(found, 0.05))


def _write_task(place: Place, items: int) -> Path:
    folder = place.path("tasks")
    folder.mkdir()
    texts = [json.loads(line)["text"].split() for line in place.text.read_text().splitlines()]
    rows = []
    for number in range(items):
        words = texts[number % len(texts)][number // len(texts) :]
        answers = [" ".join(words[10 + 3 * choice : 13 + 3 * choice]) for choice in range(4)]
        rows.append({"question": " ".join(words[:10]), "answers": answers, "right": number % 4})
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.yaml").write_text(TASK)
    return folder


def _evaluate(place: Place, folder: Path, model: Path, name: str) -> list[str]:
    samples, output = place.path(f"samples_{name}.jsonl"), place.path(f"scores_{name}.json")
    options = {"input": model, "tasks": "words", "tasks_folder": folder, "samples": samples, "output": output}
    return ["evaluate", *_flags(options)]


def _likelihoods(place: Place, folder: Path, model: Path, name: str) -> list[list[float]]:
    place.verb(*_evaluate(place, folder, model, name))
    return _read(place.path(f"samples_{name}.jsonl"))


def _read(samples: Path) -> list[list[float]]:
    """Of each item, the log-likelihood of each answer."""
    rows = map(json.loads, samples.read_text().splitlines())
    return [[float(each[0] if isinstance(each, list) else each) for each in row["log_likelihoods"]] for row in rows]


def _furthest_of(a: list[list[float]], b: list[list[float]]) -> float:
    if [len(each) for each in a] != [len(each) for each in b] or not a:
        return float("inf")
    return max(abs(x - y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def benched(place: Place) -> Found:
    """Prefill and decode of the exported 2:4 model, dense and with 2:4 kernels where there are any."""
    output = place.path("bench.json")
    sizes = {"prompt_length": 512, "new_tokens": 16} if place.on_gpu else {"prompt_length": 16, "new_tokens": 2}
    place.verb("bench", input=place.large_sparse_hf, output=output, batch_sizes=[1, 8], repeats=2, **sizes)
    result = json.loads(output.read_text())
    value = {f"dense, batch {one['batch_size']}": one for one in result["dense"]}
    if not place.on_gpu:
        passed = bool(result["no_sparse_kernels"]) and len(value) == 2
        return Found(
            passed,
            {name: one["decode_s_per_token"] for name, one in value.items()},
            "runs, and says there are no kernels",
        )
    share = result["largest_logit_difference"] / result["largest_logit"]
    ratios = {
        f"batch {dense['batch_size']}, dense / 2:4, {part}": dense[key] / sparse[key]
        for dense, sparse in zip(result["dense"], result["sparse"], strict=True)
        for part, key in (("prefill", "prefill_s"), ("decode", "decode_s_per_token"))
    }
    return Found(
        share <= 0.02, {"difference by the largest logit": share, **ratios}, {"difference by the largest logit": 0.02}
    )


def trained(place: Place) -> Found:
    """Three steps of full, LoRA and distilled training: zeros stay; smaller models by darwinlm and sheared_llama."""
    pruned = place.path("trained_from")
    small = place.imported(place.small_hf)
    place.verb("prune", input=small, output=pruned, method="magnitude", target="2:4")
    kinds: dict[str, dict[str, object]] = {
        "full": {},
        "lora": {"lora_rank": 4},
        "distilled": {"teacher": place.small_hf},
    }
    found: dict[str, Any] = {}
    for name, more in kinds.items():
        run, output = place.path(f"trained_{name}"), place.path(f"trained_{name}.json")
        place.verb("train", input=pruned, output=run, **place.learning(3, lr=1e-3), **more)
        place.verb("verify", input=run, target="2:4", output=output)
        found[f"{name}, last loss"] = losses(run)[-1]
    length = place.length if not place.on_gpu else 256
    layers = place.small.layers - 1
    text = {"calibration": place.text, "calibration_samples": 6, "calibration_seq_length": length}
    shape = {"input": small, "target": f"parameters={_parameters(place) * 8 // 10}", "search": "integer", "levels": 4}
    place.verb("prune", **shape, **text, output=place.path("darwinlm"), method="darwinlm")
    shear = {**place.learning(2), "seq_length": length, "lr_warmup_iters": 0}
    place.verb(
        "prune",
        input=small,
        output=place.path("sheared"),
        method="sheared_llama",
        target=f"num_layers={layers}",
        **shear,
    )
    for name in ("darwinlm", "sheared"):
        output = place.path(f"{name}.json")
        place.verb("verify", input=place.path(name), output=output)
        result = json.loads(output.read_text())
        found[f"{name}, shape holds"] = bool(result["shape"]["holds"])
    passed = all(math.isfinite(value) and bool(value) for value in found.values())
    return Found(passed, found, "finite losses, zeros kept, shapes reached")


def _parameters(place: Place) -> int:
    from megatron_prune.model.convert import HFReader
    from megatron_prune.model.cost import parameters

    return parameters(HFReader(str(place.small_hf)).model_config)


def unit_tests(place: Place) -> Found:
    """The project's own tests of the kernels, on this device; those of 4:8 take minutes to compile."""
    folder = ROOT / "tests" / "unit" / "kernels"
    if not folder.exists() or importlib.util.find_spec("pytest") is None:
        raise Skip("the tests, or pytest, are not here")
    chosen = "not 4-8" if place.on_gpu else "(regularizer or decode) and not 4-8"
    files = [str(folder / "test_gumbel.py"), str(folder / "test_second_order.py")]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=150)
    told = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", told)}
    return Found(done.returncode == 0 and counts.get("passed", 0) > 0, counts or told, "all pass")


CHECKS = [
    Check("machine", machine, "says which GPU, norm, attention and optimizer there are"),
    Check("mask_kernels", mask_kernels),
    Check("gradients", gradients),
    Check("wide_index", wide_index, "needs 20 GB of a GPU's memory"),
    Check("roofline", roofline, "measures the bandwidth of a GPU"),
    Check("sparsegpt", sparsegpt),
    Check("road", road),
    Check("memory", memory, "compares what a GPU's allocator says"),
    Check("killed", killed),
    Check("fsdp", fsdp),
    Check("verified", verified),
    Check("tasks", tasks),
    Check("benched", benched),
    Check("trained", trained),
    Check("unit_tests", unit_tests),
]
