"""Every JSON file that verbs read, in every hostile form of `tests.hostile`: read, or refused in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.__main__ import main
from megatron_prune.data.about import read_about as read_text_about
from megatron_prune.data.about import read_report
from megatron_prune.decision import run_folder
from megatron_prune.decision.latency import SAME, LatencyTable
from megatron_prune.decision.masks import MaskInfo, Masks
from megatron_prune.decision.trimming import Trim, is_trim
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.evaluation.verify import watched
from megatron_prune.log import read_metrics
from megatron_prune.model.checkpoint import _check_size, check_manifest, damage_of
from megatron_prune.model.cost import parameters
from megatron_prune.model.description import Description, read_description
from megatron_prune.model.families import family_of
from megatron_prune.model.fms import FmsReader
from megatron_prune.search.levels import Levels
from megatron_prune.statistics.store import StatisticsStore
from megatron_prune.training.checkpoints import read_about
from megatron_prune.verbs.inspect import InspectConfig
from megatron_prune.verbs.inspect import run as inspect
from megatron_prune.verbs.report import ReportConfig
from megatron_prune.verbs.report import run as report
from tests.hostile import assert_harmless, complaint
from tests.models import TINY_SIZES, tiny_llama

CONFIG = family_of({"model_type": "llama"}).from_hf({"model_type": "llama", **TINY_SIZES["llama"]})
INFO = MaskInfo("wanda", "2:4", {"a": 1.5}, "llama", CONFIG.fingerprint(), 7, {"count": 2}, {"by": "test"})
RUN = {"input": "in", "method": "wanda", "target": "2:4", "state": "decided", "launch": None}


def put(file: Path, content: Any) -> Path:
    """A JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def page(*inputs: Path) -> Callable[[], None]:
    """The `report` verb on these."""
    output = inputs[0].parent / "page.html"

    def run() -> None:
        output.unlink(missing_ok=True)
        report(ReportConfig(inputs=inputs, output=output))

    return run


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """A run with a decision of masks."""
    mask = torch.tensor([True, True, False, False]).repeat(8, 2)
    layers = [(n, {f"model.layers.{n}.mlp.up_proj.weight": mask}) for n in (0, 1)]
    put(tmp_path / "run" / "run.json", RUN)
    Masks.save(tmp_path / "run" / "decision", INFO, layers)
    return tmp_path / "run"


@pytest.fixture
def trimmed(tmp_path: Path) -> Path:
    """A run with a structured decision."""
    put(tmp_path / "run" / "run.json", {**RUN, "target": "num_layers=1", "method": "shortgpt"})
    info = dataclasses.replace(INFO, method="shortgpt", target="num_layers=1")
    Trim(info, Units.all(CONFIG).without_layers([0])).save(tmp_path / "run" / "decision", CONFIG)
    return tmp_path / "run"


def test_run_json(masks: Path) -> None:
    assert assert_harmless(masks / "run.json", page(masks)) > 100


def test_run_json_without_the_newer_key(masks: Path) -> None:
    put(masks / "run.json", {key: value for key, value in RUN.items() if key != "launch"})
    assert run_folder.read_run(masks).launch is None


def test_decision_json(masks: Path) -> None:
    def use() -> None:
        found = Masks.load(masks / "decision")
        found.summary()
        found.check()
        inspect(InspectConfig(input=masks))

    assert assert_harmless(masks / "decision" / "decision.json", use) > 400


def test_trim_json(trimmed: Path) -> None:
    assert is_trim(trimmed / "decision")
    show = page(trimmed)

    def use() -> None:
        inspect(InspectConfig(input=trimmed))
        show()

    assert assert_harmless(trimmed / "decision" / "trim.json", use) > 300


def test_megatron_prune_json(tmp_path: Path) -> None:
    Description(CONFIG, {"import": "hf", "mask": None}).write(tmp_path / "model")

    def use() -> None:
        inspect(InspectConfig(input=tmp_path / "model"))
        parameters(read_description(tmp_path / "model").config)

    assert assert_harmless(tmp_path / "model" / "megatron_prune.json", use) > 400


def test_manifest_json(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"12345")
    file = put(tmp_path / "manifest.json", {"a.bin": 5})
    assert assert_harmless(file, lambda: check_manifest(tmp_path)) > 50
    for name in ("../a", "/etc/passwd", "a/../b", ".", "", "a\0b", "x" * 2000):
        put(file, {name: 5})
        assert complaint(lambda: check_manifest(tmp_path)) is not None, name


def test_metrics_jsonl(masks: Path) -> None:
    file = masks / "metrics.jsonl"
    honest = {"step": 1, "loss": 2.5, "mask_entropy": None, "replaced": True, "parent": [0, 1]}
    show = page(masks)

    def lines() -> None:
        if not file.read_bytes().endswith(b"\n"):
            file.write_bytes(file.read_bytes() + b"\n")

    put(file, honest)
    assert assert_harmless(file, lambda: read_metrics(masks), lines) > 100
    for value in (None, True, [1], 1e199, -(2**63), 2**63 - 1):
        for step in (0, 2**63 - 1):
            file.write_text("".join(json.dumps({"step": n, "loss": value}) + "\n" for n in (step, 1)))
            complaint(show)
    file.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert len(read_metrics(masks)) == 1


RESULTS: dict[str, dict[str, Any]] = {
    "evaluate": {
        "perplexity": 20.5,
        "loss": 3.0,
        "predicted_tokens": 31,
        "protocol": "windows of 32",
        "text": {"source": "t.txt", "sha256": "00", "tokens": 5},
        "input": "model",
        "kind": "megatron",
    },
    "tasks": {
        "results": [
            {
                "model": "m",
                "kind": "megatron",
                "tasks": {
                    "piqa": {
                        "metrics": {"acc": 0.5},
                        "standard_errors": {"acc": None},
                        "items": 2,
                        "num_fewshot": 0,
                        "version": 1.0,
                        "items_sha256": "ab",
                        "right": {"acc": "01"},
                    }
                },
                "groups": {"all": {"metrics": {"acc": 0.5}, "standard_errors": {"acc": 0.1}}},
            }
        ],
        "limit": None,
        "environment": {},
    },
    "verify": {
        "input": "m",
        "kind": "run",
        "pattern": {"target": "2:4", "broken_groups": {}, "too_dense": [], "holds": True},
        "zeros": {"zeros": 5, "negative_zeros": 0, "holds": True},
        "density": {"weights": 10, "density": 0.5, "per_weight": {}},
        "shape": {"target": "num_layers=1", "holds": True},
        "logits": {"against": "x", "max_absolute_difference": 0.0, "holds": True},
        "holds": True,
    },
    "bench": {
        "benchmark": "dense against 2:4",
        "input": "m",
        "no_sparse_kernels": None,
        "dense": [{"batch_size": 1, "prefill_tokens_per_s": 5.0, "decode_tokens_per_s": 5.0, "peak_bytes": 5}],
        "sparse": [{"batch_size": 1, "prefill_tokens_per_s": 5.0, "decode_tokens_per_s": 5.0, "peak_bytes": 5}],
    },
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results(tmp_path: Path, kind: str) -> None:
    file = put(tmp_path / "result.json", RESULTS[kind])
    assert assert_harmless(file, page(file)) > 50


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_text_that_a_report_shows(masks: Path, name: str) -> None:
    (masks / name).write_bytes(b"caf\xe9")
    assert name in (complaint(page(masks)) or "")
    (masks / name).write_bytes(b"x" * 20_000_000)
    assert "allowed: at most" in (complaint(page(masks)) or "")


def test_latest_json(masks: Path) -> None:
    file = put(masks / "checkpoints" / "latest.json", {"step": 5})
    assert assert_harmless(file, lambda: run_folder.latest_step(masks)) > 30


def test_checkpoint_json(tmp_path: Path) -> None:
    folder = tmp_path / "step_0000005"
    file = put(folder / "checkpoint.json", {"step": 5, "seed": 0, "method": "maskllm"})
    assert assert_harmless(file, lambda: read_about(folder)) > 40


@pytest.mark.parametrize("name", ["manifest.json", "checksums.json"])
def test_a_damaged_list_of_files_is_damage_of_the_checkpoint(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another checkpoint is used then; nothing may be raised."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda box, mine: box.__setitem__(0, mine))
    (tmp_path / "a.bin").write_bytes(b"12345")
    put(tmp_path / "checksums.json", {"a.bin": "cbf53a1c"})
    size = (tmp_path / "checksums.json").stat().st_size
    put(tmp_path / "manifest.json", {"a.bin": 5, "checksums.json": size})
    assert damage_of(tmp_path) == []
    silent: list[str] = []

    def look() -> None:
        if not damage_of(tmp_path):
            silent.append((tmp_path / name).read_text())

    assert_harmless(tmp_path / name, look)
    honest = (tmp_path / name).read_text()
    assert all(json.loads(text) == json.loads(honest) for text in silent)


def test_inspect_ends_with_status_2(masks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (masks / "run.json").write_text("[]")
    assert main(["inspect", "--input", str(masks)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "run.json" in line
    with pytest.raises(UserError):
        read_description(masks)


def test_latency_table(tmp_path: Path) -> None:
    about = {"model": {name: getattr(CONFIG, name) for name in SAME}, "dtype": "float32", "environment": {}}
    table = LatencyTable(about, {(4, 2): 5.0, (2, 2): 3.0}, {64: 9.0, 32: 5.0}, 1.5)
    table.save(tmp_path / "table.json")

    def use() -> None:
        found = LatencyTable.load(tmp_path / "table.json")
        found.of(CONFIG)

    assert LatencyTable.load(tmp_path / "table.json") == table
    assert assert_harmless(tmp_path / "table.json", use) > 300


def test_a_text_that_was_preprocessed(tmp_path: Path) -> None:
    content = {"documents": 1, "tokens": 5, "bad_lines": 0, "listed_bad_lines": [], "vocab_size": 5, "dtype": "int32"}
    file = put(tmp_path / "t.json", content | {"end_of_text": None, "largest_id": 4, "input": ["a"]})
    assert assert_harmless(file, lambda: read_text_about(file)) > 50
    assert assert_harmless(file, lambda: read_report(file)) > 100


def test_an_older_text_says_less_of_itself(tmp_path: Path) -> None:
    assert read_text_about(put(tmp_path / "t.json", {"input": ["a.txt"]})) == {}


def test_statistics_json(tmp_path: Path) -> None:
    """Of another model, or damaged: refused; only the list of what is complete may differ."""
    found: list[Any] = []
    honest = {"format": 1, "model": "m", "weights": "w", "windows": [2, 8], "tokens": "t", "complete": ["mlp.Gram"]}
    put(tmp_path / "statistics.json", honest)

    def use() -> None:
        store = object.__new__(StatisticsStore)
        store.folder, store.about, store.finished = tmp_path, {**honest}, set()
        del store.about["complete"]
        store._open()
        found.append(store.finished)

    assert assert_harmless(tmp_path / "statistics.json", use) > 150
    assert all(isinstance(name, str) for names in found for name in names)


def levels(tmp_path: Path) -> Levels:
    """A database of levels whose description and statistics are not looked at."""
    found = object.__new__(Levels)
    found.folder, found.config, found.damping, found.cache = tmp_path, CONFIG, 0.01, {}
    found.sizes = {kind: [found._there(kind, layer, 4, False) for layer in range(2)] for kind in ("attention", "mlp")}
    return found


def test_levels_json(tmp_path: Path) -> None:
    levels(tmp_path)._describe()
    assert assert_harmless(tmp_path / "levels.json", levels(tmp_path)._describe) > 300


LEVEL_DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no errors": lambda found: found.pop("errors"),
    "errors of another length": lambda found: found.update(errors=torch.zeros(2, dtype=torch.float64)),
    "no weight": lambda found: found.pop("1.weight"),
    "weight of another shape": lambda found: found.update({"1.weight": torch.zeros(3, 3)}),
    "units beyond": lambda found: found["1.kept"].__setitem__(-1, 10**6),
    "units below": lambda found: found["1.kept"].__setitem__(0, -1),
    "units twice": lambda found: found["1.kept"].fill_(0),
    "units that are no numbers": lambda found: found.update({"1.kept": found["1.kept"].float()}),
}


@pytest.mark.parametrize("damage", LEVEL_DAMAGE)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_levels_in_safetensors(tmp_path: Path, kind: str, damage: str) -> None:
    database = levels(tmp_path)
    sizes = database.sizes[kind][0]
    tensors = {"errors": torch.zeros(len(sizes), dtype=torch.float64)}
    for number, level in enumerate(sizes[1:-1], start=1):
        kept = level.ffn if kind == "mlp" else level.groups * level.heads
        tensors[f"{number}.kept"] = torch.arange(kept, dtype=torch.int32)
        tensors[f"{number}.weight"] = torch.zeros(32, kept * (1 if kind == "mlp" else CONFIG.kv_channels))
    save_file(tensors, tmp_path / f"00000.{kind}.safetensors")
    assert complaint(lambda: levels(tmp_path).error(kind, 0, 1)) is None
    LEVEL_DAMAGE[damage](tensors)
    save_file(tensors, tmp_path / f"00000.{kind}.safetensors")
    assert complaint(lambda: levels(tmp_path).error(kind, 0, 1)) is not None
    (tmp_path / f"00000.{kind}.safetensors").write_bytes(b"x")
    assert complaint(lambda: levels(tmp_path).error(kind, 0, 1)) is not None


UNIT_DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "layers beyond": lambda found: found.update(layers=torch.tensor([7], dtype=torch.int32)),
    "no layers": lambda found: found.pop("layers"),
    "no hidden": lambda found: found.pop("hidden"),
    "a layer without heads": lambda found: found.pop("layers.00001.heads"),
    "another layer": lambda found: found.update({"layers.00009.ffn": torch.zeros(1, dtype=torch.int32)}),
    "floats": lambda found: found.update(hidden=torch.zeros(32)),
    "a matrix": lambda found: found.update(hidden=torch.zeros(4, 8, dtype=torch.int32)),
    "twice": lambda found: found["hidden"].fill_(0),
    "below": lambda found: found["layers.00001.ffn"].__setitem__(0, -5),
    "beyond": lambda found: found["layers.00001.groups"].__setitem__(-1, 10**6),
    "fewer channels": lambda found: found.update(hidden=found["hidden"][:5].clone()),
}


@pytest.mark.parametrize("damage", UNIT_DAMAGE)
def test_units_in_safetensors(trimmed: Path, damage: str) -> None:
    folder = trimmed / "decision"
    assert complaint(page(trimmed)) is None
    tensors = load_file(folder / "units.safetensors")
    UNIT_DAMAGE[damage](tensors)
    save_file(tensors, folder / "units.safetensors")
    about = json.loads((folder / "trim.json").read_text())
    about["sha256"] = hashlib.sha256((folder / "units.safetensors").read_bytes()).hexdigest()
    put(folder / "trim.json", about)
    assert complaint(page(trimmed)) is not None


FMS: dict[str, Any] = {
    **{"src_vocab_size": 128, "emb_dim": 32, "norm_eps": 1e-6, "nheads": 4, "kvheads": 2, "nlayers": 2, "pad_id": -1},
    **{"hidden_grow_factor": 2.0, "multiple_of": 1, "activation_fn": "swish", "p_dropout": 0.0, "attn_bias": False},
    **{"max_expected_seq_len": 512, "mlp_bias": False, "tie_heads": False, "rope_theta": 1e4, "rope_scaling": {}},
    **{"linear_config": None, "fused_weights": True},
}


def test_fms_config(tmp_path: Path) -> None:
    """Until the weights are looked for, which are not there."""

    def use() -> None:
        try:
            FmsReader(tmp_path)
        except UserError as error:
            if "safetensors" not in str(error):
                raise

    file = put(tmp_path / "fms_config.json", FMS)
    assert assert_harmless(file, use) > 100


def test_weights_that_the_files_cannot_hold_are_not_made(tmp_path: Path) -> None:
    """A description of a model of any size asks for no memory."""
    large = dataclasses.replace(CONFIG, hidden_size=2**20, vocab_size=2**24)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "__0_0.distcp").write_bytes(b"x" * 1000)
    assert "does not fit its own description" in (complaint(lambda: _check_size(tmp_path, large)) or "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_not_verified(value: float, dtype: torch.dtype) -> None:
    """Wherever they are: one in an embedding is enough."""
    weights = [("a", torch.zeros(4, 4, dtype=dtype)), ("b", torch.zeros(4, dtype=dtype))]
    found: dict[str, int] = {}
    assert [name for name, _ in watched(iter(weights), found)] == ["a", "b"] and not found
    weights[1][1][2] = value
    list(watched(iter(weights), found))
    assert found == {"b": 1}


def test_a_model_with_nan_is_not_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the verb, with what is wrong in its words and its result."""
    folder = tiny_llama(tmp_path / "hf")
    words = ["verify", "--input", str(folder), "--target", "num_layers=2", "--output", str(tmp_path / "v.json")]
    assert main(words) == 0
    (tmp_path / "v.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(words) == 1
    told = capsys.readouterr().out
    assert "NOT verified" in told and "model.norm.weight" in told
    assert json.loads((tmp_path / "v.json").read_text())["finite"] == {
        "not_finite": {"model.norm.weight": 1},
        "holds": False,
    }
    assert main(["verify", "--input", str(folder), "--target", "3:7"]) == 2
    assert "multiple of 7" in capsys.readouterr().err
