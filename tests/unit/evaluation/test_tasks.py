"""`evaluate --tasks`: the same answers as lm-eval's own model, the definitions, the result, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.__main__ import main
from tests.chats import TEMPLATE, chat_model
from tests.models import byte_tokenizer, stories260k, tiny_llama
from tests.tasks import EXPECTED, PUBLIC_ROWS, write_public_rows, write_tasks
from tests.unit.test_user_errors import refused

NAMES = ["choices", "wikitext"]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with groups of query heads in both forms, its tasks, and results of both forms."""
    root = tmp_path_factory.mktemp("tasks")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "model")]) == 0
    write_tasks(root / "tasks")
    for name in ("model", "hf"):
        dense = ["--dense", str(root / "model.json")] if name == "hf" else []
        assert main(evaluate(root, name, "--output", str(root / f"{name}.json"), *samples(root, name), *dense)) == 0
    return root


def evaluate(root: Path, model: str, *more: str, tasks: tuple[str, ...] = tuple(NAMES)) -> list[str]:
    """The verb on a model of the folder."""
    words = ["evaluate", "--input", str(root / model), "--tasks", *tasks, "--dtype", "float32"]
    return [*words, "--tasks-folder", str(root / "tasks"), *more]


def samples(root: Path, name: str) -> list[str]:
    """The flag for the items' file."""
    return ["--samples", str(root / f"{name}.jsonl")]


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of the items' file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def lm_eval_answers(directory: Path, tasks: Path, num_fewshot: int = 0, **chat: bool) -> list[list[float]]:
    """Log-likelihoods of every item by lm-eval's own Hugging Face model."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from megatron_prune.evaluation import harness

    model = HFLM(str(directory), device="cpu", dtype="float32", batch_size=3)
    loaded = harness.load_tasks(NAMES, [tasks], num_fewshot)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    found: Any = evaluator.evaluate(model, loaded, **chat)
    every = [sample for name in NAMES for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"])]
    return [[r[0][0] if isinstance(r[0], tuple) else r[0] for r in sample["resps"]] for sample in every]


def largest_difference(found: list[dict[str, Any]], expected: list[list[float]]) -> float:
    """Between the log-likelihoods of all answers to all items."""
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) for line, row in pairs for a, b in zip(line["log_likelihoods"], row, strict=True))


def test_answers_are_those_of_lm_evals_own_model(root: Path) -> None:
    expected = lm_eval_answers(root / "hf", root / "tasks")
    for name in ("model", "hf"):
        assert largest_difference(read(root / f"{name}.jsonl"), expected) < TOLERANCE
    other = lm_eval_answers(root / "hf", root / "tasks", num_fewshot=1)  # other questions, other answers
    assert largest_difference(read(root / "hf.jsonl"), other) > 100 * TOLERANCE


@pytest.mark.parametrize("multiturn", [True, False])
@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{- bos_token }}", "")])
def test_questions_in_the_models_chat_template_are_those_of_lm_eval(
    multiturn: bool, template: str, tmp_path: Path
) -> None:
    chat_model(tmp_path / "hf", template)
    write_tasks(tmp_path / "tasks")
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "model")]) == 0
    words = ["--apply-chat-template", *([] if multiturn else ["--no-fewshot-as-multiturn"]), "--num-fewshot", "2"]
    for name in ("model", "hf"):
        output = ["--output", str(tmp_path / f"{name}.json"), *samples(tmp_path, name)]
        assert main(evaluate(tmp_path, name, *words, *output)) == 0
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn}
    expected = lm_eval_answers(tmp_path / "hf", tmp_path / "tasks", 2, **chat)
    other = lm_eval_answers(tmp_path / "hf", tmp_path / "tasks", 2)
    for name in ("model", "hf"):
        answers = read(tmp_path / f"{name}.jsonl")
        assert largest_difference(answers, expected) < TOLERANCE
        assert largest_difference(answers, other) > 100 * TOLERANCE
    (result,) = json.loads((tmp_path / "hf.json").read_text())["results"]
    assert len(result["chat_template_sha256"]) == 64 and result["fewshot_as_multiturn"] is multiturn


def test_a_template_that_takes_no_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(tmp_path / "hf", "{{ raise_exception('only Latin') }}")
    write_tasks(tmp_path / "tasks")
    message = refused(evaluate(tmp_path, "hf", "--apply-chat-template"), capsys)
    assert "does not take a question (only Latin)" in message
    assert "has no effect without --apply-chat-template" in refused(
        evaluate(tmp_path, "hf", "--no-fewshot-as-multiturn"), capsys
    )


def test_a_trained_model_with_examples_before_each_question(tmp_path: Path) -> None:
    stories260k(tmp_path / "hf")
    write_tasks(tmp_path / "tasks")
    assert main(evaluate(tmp_path, "hf", "--num-fewshot", "2", *samples(tmp_path, "hf"))) == 0
    expected = lm_eval_answers(tmp_path / "hf", tmp_path / "tasks", num_fewshot=2)
    assert largest_difference(read(tmp_path / "hf.jsonl"), expected) < TOLERANCE


def test_the_result_says_what_was_measured(root: Path) -> None:
    dense, own = json.loads((root / "hf.json").read_text())["results"]
    assert (dense["kind"], own["kind"]) == ("megatron", "hugging face") and own["dtype"] == "float32"
    for name in NAMES:
        one, other = (result["tasks"][name] for result in (dense, own))
        assert one["right"] == other["right"] and one["items_sha256"] == other["items_sha256"]
        assert one["items"] == (12 if name == "choices" else 3) and one["num_fewshot"] == 0
    choices = own["tasks"]["choices"]
    answers = choices["right"]["acc"]
    assert choices["metrics"]["acc"] == pytest.approx(answers.count("1") / 12) and len(answers) == 12
    assert choices["standard_errors"]["acc"] > 0
    assert own["tasks"]["wikitext"]["metrics"]["word_perplexity"] > 1
    assert dense["tasks"]["wikitext"]["metrics"] == pytest.approx(own["tasks"]["wikitext"]["metrics"], rel=1e-5)


def test_the_dense_model_is_in_the_first_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer(tiny_llama(root / "other", vocab_size=257, seed=1))
    more = ["--dense", str(root / "model"), "--limit", "0.5"]
    assert main(evaluate(root, "other", *more, tasks=("choices",))) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("choices")]
    assert [line[:5] for line in lines] == [
        ["choices", metric, "6", "0", model] for metric in ("acc", "acc_norm") for model in ("model", "other")
    ]
    assert [len(line) for line in lines] == [7, 9, 7, 9]


def test_a_change_has_the_error_of_paired_items() -> None:
    from megatron_prune.evaluation.zeroshot import change

    one, other = (
        {"metrics": {"acc": right.count("1") / 8}, "right": {"acc": right}} for right in ("11110000", "11010010")
    )
    difference, error = change(one, other, "acc")
    assert difference == 0.0 and error == pytest.approx((2 / 7) ** 0.5 / 8**0.5)


def test_groups_have_lines_after_their_tasks() -> None:
    from megatron_prune.evaluation.zeroshot import table

    scores = {"metrics": {"acc": 0.5}, "standard_errors": {"acc": 0.1}}
    task = scores | {"items": 2, "num_fewshot": 5, "right": {"acc": "10"}}
    results = [{"model": name, "tasks": {"part": task}, "groups": {"all": scores}} for name in ("dense", "sparse")]
    lines = [line.split() for line in table(results)[1:-1]]
    assert [line[:2] for line in lines] == [["part", "acc"], ["part", "acc"], ["all", "acc"], ["all", "acc"]]
    assert lines[1][2:] == ["2", "5", "sparse", "0.5000", "0.1000", "+0.0000", "0.0000"]
    assert lines[3][2:] == ["sparse", "0.5000", "0.1000", "+0.0000"]


def test_the_packages_tasks_ask_what_the_public_ones_ask(tmp_path: Path) -> None:
    from megatron_prune.evaluation import harness

    tasks = harness.load_tasks(list(PUBLIC_ROWS), [write_public_rows(tmp_path / "rows")])["tasks"]
    right = {"piqa": 0, "rte": 0, "winogrande": 0}
    for name, task in tasks.items():
        task.build_all_requests(limit=1)
        assert [instance.args for instance in task.instances] == EXPECTED[name], name
        scores = task.process_results(task.eval_docs[0], [(-1.0, True), (-2.0, True)])
        assert scores["acc"] == (right.get(name, 1) == 0), name
        assert ("acc_norm" in scores) == (name not in ("winogrande", "boolq", "rte")), name


def test_articles_are_cut_at_their_titles(tmp_path: Path) -> None:
    from megatron_prune.evaluation import harness

    task = harness.load_tasks(["wikitext"], [write_tasks(tmp_path / "tasks")])["tasks"]["wikitext"]
    pages = [row["page"] for row in task.eval_docs]
    assert [page.splitlines()[0] for page in pages] == [" = One = ", " = Two = ", " = Three = "]
    assert " \n" + "\n".join(pages) == (tmp_path / "tasks" / "wiki.test.raw").read_text()


# --- what is refused ---

METRIC = "metric_list: [{metric: %s, aggregation: %s, higher_is_better: true}, {metric: acc}]\n"
DEFINITIONS = {
    "runs_code": ("process_results: !function os.system\n", "allowed: lm_eval.tasks.wikitext"),
    "runs_what_lm_eval_imports": (
        "doc_to_text: !function lm_eval.tasks.longproc.metrics.Popen\n",
        "was given; allowed",
    ),
    "runs_a_class": ("doc_to_text: !function lm_eval.tasks.wikitext.preprocess_wikitext.re.compile\n", "was given"),
    "function_of_a_list": ("doc_to_text: !function [os.system]\n", "was given; allowed"),
    "metric_of_a_folder": (METRIC % ("EVIL", "mean"), "no metric of lm-eval; allowed: acc"),
    "metric_of_a_file": (METRIC % ("EVIL/evil.py", "mean"), "no metric of lm-eval; allowed: acc"),
    "aggregation_of_a_folder": (METRIC % ("acc", "EVIL"), "no aggregation of lm-eval; allowed"),
    "aggregation_that_is_code": (METRIC % ("acc", "!function os.system"), "was given; allowed"),
    "metric_of_the_hub": ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate"),
    "metric_with_more": ("metric_list: [{metric: acc, module_type: x}]\n", "module_type"),
    "no_metric": ("metric_list: []\n", "metric_list"),
    "fetches": ("dataset_name: x\nclass: y\n", "'dataset_name'"),
    "fetches_rows": ("dataset_path: t/evil\n", "dataset_path"),
    "other_rows_of_the_machine": ("dataset_kwargs: {data_files: {validation: /etc/passwd}}\n", "below this folder"),
    "other_folder": ("dataset_kwargs: {data_files: {validation: ../a.jsonl}}\n", "below this folder"),
    "remote_code": ("dataset_kwargs: {data_files: {a: a}, trust_remote_code: true}\n", "trust_remote_code"),
    "filters": ("filter_list: [{name: a, filter: [{function: EVIL}]}]\n", "filter_list"),
    "sampler": ("fewshot_config: {sampler: EVIL}\n", "fewshot_config"),
    "unsafe": ("unsafe_code: true\n", "unsafe_code"),
    "includes": ("include: ../other.yaml\n", "include"),
    "own_rows": ("custom_dataset: !function os.system\n", "was given; allowed"),
    "overrides": ("metadata: {whole: true, paths: [a]}\n", "metadata.paths"),
    "python_object": ("doc_to_text: !!python/name:os.system\n", "could not determine a constructor"),
    "twice": ("doc_to_text: a\ndoc_to_text: b\n", "given twice"),
    "bomb": ("a: [&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]]\n", "'a'"),
    "escapes": ("doc_to_text: \"{{ ''.__class__.__mro__ }}\"\n", "does not fit its rows"),
    "long_text": ("doc_to_text: \"{{ 'a' * 10 ** 10 }}\"\n", "not allowed in a template"),
    "other_rows": ('doc_to_text: "{{nothing}}"\n', "does not fit its rows"),
    "generates": ("output_type: generate_until\n", "task of kind generate_until"),
    "unknown_kind": ("output_type: [a]\n", "output_type"),
    "no_choices": ('doc_to_choice: "{{ [] }}"\n', "does not fit its rows"),
    "empty_choice": ("doc_to_choice: ['a', '']\n", "does not fit its rows"),
    "no_task": ("dataset_kwargs: 5\n", "dataset_kwargs"),
    "not_yaml": ("a: [\n", "while parsing"),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definitions_are_data(name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, message = DEFINITIONS[name]
    folder = write_tasks(tmp_path / "tasks")
    plain = (folder / "choices.yaml").read_text()
    replaced = lines.split(":")[0]
    kept = [line for line in plain.splitlines() if line.split(":")[0] != replaced]
    kept = [line for line in kept if replaced != "metric_list" or not line.startswith("  - ")]
    (folder / "evil").mkdir()
    (folder / "evil" / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    (folder / "choices.yaml").write_text("\n".join(kept) + "\n" + lines.replace("EVIL", str(folder / "evil")))
    command = ["evaluate", "--input", str(root / "model"), "--tasks", "choices", "--tasks-folder", str(folder)]
    assert message in refused([*command, "--output", str(tmp_path / "x.json")], capsys)
    assert not (tmp_path / "x.json").exists()
    assert not (tmp_path / "ran").exists()


def test_a_task_that_generates_is_refused_before_its_rows_are_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tasks(tmp_path / "tasks")
    definition = (folder / "choices.yaml").read_text().replace("multiple_choice", "generate_until")
    (folder / "choices.yaml").write_text(definition)
    (folder / "choices.jsonl").unlink()
    command = ["evaluate", "--input", str(root / "model"), "--tasks", "choices", "--tasks-folder", str(folder)]
    assert "of kind generate_until" in refused(command, capsys)


@pytest.mark.parametrize("name", ["gsm8k", "bbh_zeroshot"])
def test_lm_evals_own_task_that_generates_is_refused_before_its_rows_are_fetched(
    name: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("rows are fetched")

    monkeypatch.setattr(datasets, "load_dataset", never)
    message = refused(["evaluate", "--input", str(root / "model"), "--tasks", name], capsys)
    assert "of kind generate_until" in message


def test_metrics_come_from_no_folder_and_no_hub(root: Path) -> None:
    from lm_eval.api.task import ConfigurableTask

    from megatron_prune.errors import UserError
    from megatron_prune.evaluation import harness

    harness.load_tasks(["choices"], [root / "tasks"])
    for entry in ({"metric": "t/evil"}, {"metric": "acc", "hf_evaluate": True}):
        config = {"task": "a", "output_type": "multiple_choice", "metric_list": [entry]}
        with pytest.raises(UserError, match="would be imported"):
            ConfigurableTask(config=config)


ROWS = {
    "a_list": ("[1]", "a JSON array"),
    "a_number_of_5000_digits": ('{"right": ' + "9" * 5000 + "}", "choices.jsonl:13"),
    "deep": ("[" * 100_000, "choices.jsonl:13"),
    "surrogate": ('{"question": "\\ud800"}', "does not fit its rows"),
    "a_large_number": ('{"right": ' + "9" * 40 + "}", "does not fit its rows"),
    "another_type": ('{"question": {"a": 1}, "answers": 5, "right": []}', "does not fit its rows"),
    "no_right_answer": ('{"question": "a", "answers": ["b", "c"], "right": null}', "do not fit each other"),
    "half_an_answer": ('{"question": "a", "answers": ["b", "c"], "right": 0.5}', "do not fit each other"),
    "missing_answers": ('{"question": "a", "right": 0}', "row 13"),
    "empty_answer": ('{"question": "a", "answers": ["b", ""], "right": 0}', "row 13"),
}


@pytest.mark.parametrize("name", ROWS)
def test_hostile_rows_are_one_line(name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, message = ROWS[name]
    folder = write_tasks(tmp_path / "tasks")
    with (folder / "choices.jsonl").open("a") as file:
        file.write(line + "\n")
    command = ["evaluate", "--input", str(root / "model"), "--tasks", "choices", "--tasks-folder", str(folder)]
    assert message in refused(command, capsys)


def test_a_fault_of_the_scorer_is_no_mistake_of_the_rows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("ours")

    from megatron_prune.evaluation import harness

    monkeypatch.setattr(harness.Harness, "_encode", broken)
    with pytest.raises(TypeError, match="ours"):
        main(evaluate(root, "model", tasks=("choices",)))


CASES = {
    "more_examples_than_rows": (["--num-fewshot", "1000"], "do not fit each other"),
    "both": (["--text", "a.txt"], "both were given"),
    "unknown": (["--tasks", "chioces"], "did you mean choices?"),
    "no_folder": (["--tasks-folder", "ROOT/nowhere"], "no such folder"),
    "no_rows": (["--tasks", "piqa"], "piqa_val.jsonl is not in"),
    "shared_sequences": (["--context-parallel-size", "2"], "leave it out"),
    "existing": (["--samples", "ROOT/hf.jsonl"], "already exists"),
    "not_a_result": (["--dense", "ROOT/hf/config.json"], "not a result of evaluate --tasks"),
    "other_items": (["--dense", "ROOT/hf.json", "--limit", "2"], "which are not the same"),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_one_line(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, message = CASES[name]
    words = evaluate(root, "model")
    if more[0] in ("--tasks", "--tasks-folder"):
        at = words.index(more[0])
        words = [*words[:at], *words[at + (3 if more[0] == "--tasks" else 2) :]]
    more = [word.replace("ROOT", str(root)) for word in more]
    assert message in refused([*words, *more, "--output", str(root / "x.json")], capsys)
    assert not (root / "x.json").exists()


def test_one_of_text_and_tasks_is_needed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither was given" in refused(["evaluate", "--input", str(root / "model")], capsys)


def test_a_damaged_row_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tasks(tmp_path / "tasks")
    with (folder / "choices.jsonl").open("a") as file:
        file.write("{nothing\n")
    command = ["evaluate", "--input", str(root / "model"), "--tasks", "choices", "--tasks-folder", str(folder)]
    assert "choices.jsonl:13" in refused(command, capsys)


def test_an_answer_longer_than_the_model_reads(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer(tiny_llama(tmp_path / "short", vocab_size=257, max_position_embeddings=8))
    command = ["evaluate", "--input", str(tmp_path / "short"), "--tasks", "choices"]
    message = refused([*command, "--tasks-folder", str(root / "tasks")], capsys)
    assert "allowed: 1 to 8, what the model reads" in message


def test_a_missing_harness_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    assert "pip install 'lm-eval" in refused(evaluate(root, "model"), capsys)


def test_several_processes_take_a_checkpoint(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "import it and evaluate the Megatron checkpoint" in refused(evaluate(root, "hf"), capsys)


class Offline:
    """lm-eval's own tasks on a machine that reaches nothing."""

    def __init__(self) -> None:
        self.all_tasks = ["hellaswag", "piqa"]
        self.task_index: dict[str, Any] = {}

    def load(self, names: list[str]) -> None:
        raise ConnectionError(f"no way to {names}")


@pytest.mark.parametrize(
    ("name", "message"), [("hellaswagg", "did you mean hellaswag?"), ("piqa", "give --tasks-folder")]
)
def test_lm_evals_own_tasks(
    name: str, message: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_prune.evaluation import harness

    monkeypatch.setattr(harness, "TaskManager", Offline)
    assert message in refused(["evaluate", "--input", str(root / "model"), "--tasks", name], capsys)


def test_without_a_network_the_hub_is_asked_once_and_nothing_is_said_of_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, at once, and the libraries are as before; other tests may have a network."""
    import datasets
    from huggingface_hub import constants

    from megatron_prune.evaluation import harness

    asked: list[str] = []

    class Unplugged:
        def head(self, url: str, timeout: float) -> None:
            asked.append(f"{url} {timeout}")
            raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(harness, "get_session", Unplugged)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} seconds"))
    message = refused(["evaluate", "--input", str(root / "hf"), "--tasks", "piqa"], capsys)
    assert "--tasks: the rows of piqa could not be fetched" in message and "--tasks-folder" in message
    assert asked == [f"{constants.ENDPOINT} 8"]
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
