"""Flags and YAML become typed configurations; every mistake is one line that names the flag."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_prune.__main__ import VERBS
from megatron_prune.command_line import parse
from megatron_prune.config import EvaluateConfig, PruneConfig
from megatron_prune.errors import UserError
from megatron_prune.methods.base import get_method, methods
from megatron_prune.methods.maskllm import SHORT
from megatron_prune.option_groups import Calibration, Parallelism, Training
from megatron_prune.options import Share, entries, field_key, flatten, parse_documents, save_yaml
from megatron_prune.verbs.import_hf import ImportConfig
from megatron_prune.verbs.methods import describe

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["--input", "ckpt", "--output", "run", "--method", "maskllm", "--target", "2:4"]


def prune(*argv: str) -> PruneConfig:
    return parse(PruneConfig, [*NEEDED, *argv], "megatron-prune prune")


def test_defaults_need_only_the_required_flags() -> None:
    config = prune()
    assert (config.input, config.output, config.method, config.target) == (
        Path("ckpt"),
        Path("run"),
        "maskllm",
        "2:4",
    )
    assert config.parallelism == Parallelism()
    assert config.calibration == Calibration()
    assert config.training == Training()
    assert config.method_options == {}


@pytest.mark.parametrize(
    "argv",
    [
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
        ["--tensor_model_parallel_size", "2", "--sequence_parallel"],
        ["--tensor-model-parallel-size=2", "--sequence-parallel=true"],
        ["--tensor_model-parallel_size=2", "--sequence-parallel", "true"],
    ],
)
def test_hyphens_and_underscores_are_the_same(argv: list[str]) -> None:
    assert prune(*argv).parallelism == Parallelism(tensor_model_parallel_size=2, sequence_parallel=True)


def test_groups_are_flat() -> None:
    argv = [
        "--calibration",
        "a.txt",
        "b.jsonl",
        "--calibration-samples",
        "3",
        "--data",
        "c.txt",
        "--seed",
        "5",
    ]
    config = prune(*argv)
    assert config.calibration == Calibration(text=(Path("a.txt"), Path("b.jsonl")), samples=3)
    assert config.training == Training(data=(Path("c.txt"),), seed=5)


@pytest.mark.parametrize("verb", VERBS)
def test_keys_are_unique_and_documented(verb: str) -> None:
    options = list(entries(VERBS[verb].config))
    assert len({option.key for option in options}) == len(options)
    assert all(option.field.metadata["help"] for option in options)


def test_a_switch_can_be_negated(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recompute: true\n")
    assert prune("--config", str(file)).training.recompute is True
    assert prune("--config", str(file), "--no-recompute").training.recompute is False


def test_yaml_reads_like_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\nmin-lr: 1e-4\ntarget: 1:4\ndata: [a.txt, b.txt]\nprior: null\nmethod: maskllm\n")
    argv = ["--config", str(file), "--input", "ckpt", "--output", "run"]
    config = parse(PruneConfig, argv, "p")
    assert config.training.lr == 1e-3 and config.training.min_lr == 1e-4
    assert config.target == "1:4"
    assert config.training.data == (Path("a.txt"), Path("b.txt"))
    assert config.prior is None


def test_flags_override_yaml_and_later_files_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("train_iters: 1\nseed: 1\nlog_interval: 1\n")
    second.write_text("train_iters: 2\nseed: 2\n")
    training = prune("--train-iters", "3", f"--config={first}", "--config", str(second)).training
    assert (training.train_iters, training.seed, training.log_interval) == (3, 2, 1)


SHEARED = ["--input", "ckpt", "--output", "run", "--method", "sheared_llama", "--target", "num_layers=2"]


def sheared(*argv: str) -> Training:
    return parse(PruneConfig, [*SHEARED, *argv], "megatron-prune prune").training


def test_a_method_has_its_papers_defaults_for_options_that_are_not_its_own(tmp_path: Path) -> None:
    """Xia et al. 2023, appendix A; flags and YAML beat them, and shares follow what was given."""
    own = sheared()
    assert (own.train_iters, own.global_batch_size, own.lr, own.adam_eps) == (3200, 32, 1e-4, 1e-8)
    assert (own.min_lr, own.lr_warmup_iters) == (pytest.approx(1e-5), 320)
    assert own.clip_grad == Training().clip_grad
    short = sheared("--train-iters", "25", "--lr", "1e-3")
    assert (short.lr_warmup_iters, short.min_lr) == (2, pytest.approx(1e-4))
    assert sheared("--lr-warmup-iters", "0", "--min-lr", "0").lr_warmup_iters == 0
    file = tmp_path / "run.yaml"
    file.write_text("adam_eps: 1e-5\nlr: 2e-4\n")
    mended = sheared("--config", str(file), "--lr", "3e-4")
    assert (mended.adam_eps, mended.lr, mended.min_lr) == (1e-5, 3e-4, pytest.approx(3e-5))
    with pytest.raises(UserError, match="--lr-warmup-iters: 320 given"):
        sheared("--train-iters", "20", "--lr-warmup-iters", "320")


def test_defaults_of_methods_are_options_of_prune() -> None:
    known = {entry.key: entry for entry in entries(PruneConfig)}
    found = {info.name: info.defaults for info in methods()}
    assert found["shortened_llama"] == {"calibration_samples": 10, "calibration_seq_length": 128}
    assert {name for name, own in found.items() if own} == {"shortened_llama", "sheared_llama"}
    for own in found.values():
        for key, default in own.items():
            other = default.of if isinstance(default, Share) else key
            assert other in known and type(known[key].default) in (int, float)
            assert isinstance(default, Share) or type(default) is type(known[key].default)


def test_a_methods_own_defaults_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sheared("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for help in ("optimizer steps (default: 3200)", "learning rate at the last step (default: 0.1 x --lr)"):
        assert help in shown
    (listed,) = [line for info in methods() if info.name == "sheared_llama" for line in describe(info)[-1:]]
    assert "--train-iters 3200" in listed and "--lr-warmup-iters 0.1 x --train-iters" in listed


def test_a_recipe_changes_defaults_of_the_method_and_of_training() -> None:
    """`short` is the quickstart's, whose results are measured; flags beat it."""
    short = prune("--recipe", "short")
    assert (short.training.lr, short.training.min_lr, short.training.adam_eps) == (1.8e-3, 1.8e-4, 1e-4)
    assert prune("--recipe", "short", "--lr", "1e-3").training.lr == 1e-3
    assert prune("--recipe", "paper").training == prune().training == Training()
    quickstart = yaml.safe_load((ROOT / "examples" / "quickstart" / "maskllm.yaml").read_text())
    method = get_method("maskllm", recipe="short")
    for key in SHORT:
        found = getattr(method, key) if hasattr(method, key) else getattr(short.training, key)
        assert found == (float(quickstart[key]) if isinstance(found, float) else quickstart[key]), key
    assert get_method("maskllm", recipe="short", scale_start=7.0).scale_start == 7.0
    assert get_method("maskllm") == get_method("maskllm", recipe="paper")
    with pytest.raises(UserError, match="recipe 'quick' was given; allowed: paper, short"):
        get_method("maskllm", recipe="quick")


def test_saved_yaml_repeats_the_run(tmp_path: Path) -> None:
    config = prune("--calibration", "a.txt", "--lr", "3e-4", "--no-recompute", "--initial-logits", "old")
    save_yaml(config, tmp_path / "config.yaml")
    assert parse(PruneConfig, ["--config", str(tmp_path / "config.yaml")], "p") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == flatten(config)


def test_a_list_can_be_emptied(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: [a.txt]\n")
    assert prune("--config", str(file), "--data").training.data == ()


def test_hyper_parameters_of_the_method() -> None:
    needed = ["--input", "a", "--output", "b", "--method", "maskllm", "--target", "2:4"]
    for name in ("--prior-strength", "--prior_strength", "--method-options.prior-strength"):
        config = parse(PruneConfig, [*needed, name, "2.5", "--hard"], "p")
        assert config.method_options == {"prior_strength": 2.5, "hard": True}


def test_hyper_parameters_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: maskllm\ntarget: 2:4\nstd: 2e-2\nmethod_options:\n  hard: true\n")
    config = parse(PruneConfig, ["--config", str(file), "--input", "a", "--output", "b"], "p")
    assert config.method_options == {"std": 0.02, "hard": True}
    save_yaml(config, tmp_path / "saved.yaml")
    assert parse(PruneConfig, ["--config", str(tmp_path / "saved.yaml")], "p") == config


MISTAKES = {
    "nearest flag": (["--calibration-sample", "3"], "--calibration-samples"),
    "nearest flag, underscores": (["--tensor_modl_parallel_size", "3"], "--tensor-model-parallel-size"),
    "an abbreviation is not a flag": (
        ["--tensor-model-parallel", "3"],
        "did you mean --tensor-model-parallel-size",
    ),
    "method_options needs a name": (["--method-options", "3"], "unknown option"),
    "not a whole number": (["--train-iters", "many"], "--train-iters: many given; allowed: one whole number"),
    "not a number": (["--lr", "fast"], "--lr: fast given; allowed: one number"),
    "not a choice": (["--lr-decay-style", "step"], "cosine or linear or constant"),
    "not a switch": (["--recompute", "perhaps"], "true or false"),
    "below the range": (
        ["--tensor-model-parallel-size", "0"],
        "--tensor-model-parallel-size: 0 given; allowed: at least 1",
    ),
    "on an open bound": (["--lr", "0"], "--lr: 0.0 given; allowed: above 0"),
    "above the range": (["--adam-beta1", "1.5"], "at least 0 and below 1"),
    "not finite": (["--lr", "nan"], "--lr: nan given"),
    "a group's field": (["--calibration-samples", "0"], "--calibration-samples: 0 given"),
    "two values for one": (["--seed", "1", "2"], "--seed: 1 2 given"),
    "no value": (["--seed", "--lr", "1"], "--seed: nothing given"),
    "min_lr above lr": (["--lr", "1e-6"], "--min-lr: 5e-06 given; allowed: at most --lr (1e-06)"),
    "warm-up too long": (["--train-iters", "5", "--lr-warmup-iters", "5"], "--lr-warmup-iters: 5 given"),
    "sequence parallel alone": (["--sequence-parallel"], "--tensor-model-parallel-size above 1"),
    "two starts": (["--prior", "a", "--initial-logits", "b"], "one of them"),
    "bad range": (["--calibration-documents", "5:5"], "--calibration-documents: '5:5' given"),
    "no file": (["--config"], "--config: no file given"),
    "missing file": (["--config", "nowhere.yaml"], "nowhere.yaml is not a file"),
    "unknown method": (["--method", "masklm"], "maskllm"),
}


@pytest.mark.parametrize(("argv", "part"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(argv: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        prune(*argv)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


YAML_MISTAKES = {
    "nearest key": ("train_iter: 3", "did you mean --train-iters?"),
    "unknown key": ("zzzz: 3", "--help lists"),
    "nested unknown": ("training:\n  lr: 3", "training.lr"),
    "wrong type": ("train_iters: soon", "--train-iters: soon given"),
    "not a mapping": ("- a\n- b", "holds a list"),
    "no YAML": ("a: [1", "is not YAML"),
    "no value": ("seed:", "seed: '' given"),
    "list for a scalar": ("seed: [1, 2]", "--seed: 1 2 given"),
    "list in a list": ("data: [[a]]", "data: [['a']] given"),
}


@pytest.mark.parametrize(("text", "part"), YAML_MISTAKES.values(), ids=YAML_MISTAKES.keys())
def test_yaml_mistakes_are_one_line(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        prune("--config", str(tmp_path / "run.yaml"))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_missing_flags_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"missing: --input .*, --output "):
        parse(ImportConfig, [], "p")


def test_ranges_hold_without_a_command_line() -> None:
    with pytest.raises(UserError, match="--calibration-seq-length: 1 given"):
        Calibration(seq_length=1)
    with pytest.raises(UserError, match="--window"):
        EvaluateConfig(input="a", text=Path("b"), window=0)


def test_data_parallel_size() -> None:
    layout = Parallelism(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert layout.data_parallel_size(8) == 2
    with pytest.raises(UserError, match="6 processes given; .* multiple of 4"):
        layout.data_parallel_size(6)


def test_num_microbatches() -> None:
    training = Training(micro_batch_size=2, global_batch_size=12)
    assert training.num_microbatches(data_parallel_size=3) == 2
    with pytest.raises(UserError, match="--global-batch-size: 12 given; allowed: a multiple of .* = 8"):
        training.num_microbatches(data_parallel_size=4)


def test_document_ranges() -> None:
    assert parse_documents("k", None) == slice(None)
    assert parse_documents("k", "7") == slice(None, 7)
    assert parse_documents("k", "3:9") == slice(3, 9)
    assert parse_documents("k", "3:") == slice(3, None)
    assert Calibration(documents="1624").document_range == slice(None, 1624)
    for text in ("0", "9:3", "a", "1:2:3", "-4"):
        with pytest.raises(UserError):
            parse_documents("k", text)


def test_field_key_is_the_flat_name() -> None:
    assert [field_key(option.field) for option in entries(Calibration)][:2] == [
        "calibration",
        "calibration_samples",
    ]
