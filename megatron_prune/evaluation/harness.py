"""A scorer as lm-eval sees a model, and an evaluation by lm-eval's own code. The only module that needs lm-eval's API.

Every process runs the harness on all items; the scorer divides the requests. Tokens, what an empty context is, windows
of long texts and seeds are those of lm-eval's Hugging Face model, so that the answers are.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import random
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
from huggingface_hub import constants, get_session
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from megatron_prune.data.pieces import HUB_SECONDS
from megatron_prune.data.rendering import Refused
from megatron_prune.data.requests import Request, Scorer
from megatron_prune.data.tokenizer import about_chat, chat_of, check_rows, model_rows, tokenize
from megatron_prune.errors import UserError, brief
from megatron_prune.evaluation import local_tasks
from megatron_prune.evaluation.local_tasks import SCORED, kind_refusal
from megatron_prune.foreign import fenced, reason


class Harness(TemplateLM):
    """A model by its likelihoods; it generates nothing.

    With a tokenizer that has its chat template at hand questions are messages, and examples earlier turns, or all of
    them one message without `multiturn`.
    """

    def __init__(self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, multiturn: bool = True) -> None:
        super().__init__()
        self.chat = chat_of(tokenizer)
        self.multiturn = multiturn
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.truncated = 0
        """Requests that lost tokens on the left, because the model cannot read as many."""
        self._tokens: dict[tuple[str, bool | None], list[int]] = {}
        if self.prefix_token_id is None:
            raise UserError("the tokenizer has neither a beginning-of-text nor an end-of-text token; tasks need one")
        check_rows(tokenizer, int(self.prefix_token_id), model_rows(tokenizer))
        self._prefix = str(tokenizer.decode(self.prefix_token_id))

    @property
    def eot_token_id(self) -> Any:
        """End of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval would tell prompts that it keeps apart by."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A prompt of messages; without its system message where the template takes none, as in lm-eval."""
        assert self.chat is not None, "asked for with a template only"
        try:
            return self.chat.prompt(chat_history, not add_generation_prompt)
        except Refused:
            pass
        try:
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.chat.prompt(rest, not add_generation_prompt)
        except Refused as error:
            raise UserError(
                f"--apply-chat-template: the chat template of {self.tokenizer.name_or_path} does not take a question "
                f"({error}); give --no-fewshot-as-multiturn or --num-fewshot 0, or leave --apply-chat-template out"
            ) from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the prefix token in letters gets none besides."""
        key = (string, add_special_tokens)
        if key not in self._tokens:
            self._encode([string], add_special_tokens)
        return self._tokens[key]

    def _encode(self, strings: Sequence[str], add_special_tokens: bool | None = None) -> None:
        """Tokenise many strings at once, for `tok_encode`."""
        for begins in (False, True):
            group = [string for string in strings if string.startswith(self._prefix) == begins]
            special = False if begins and add_special_tokens is None else add_special_tokens
            more = {} if special is None else {"add_special_tokens": special}
            for string, ids in zip(group, tokenize(self.tokenizer, group, **more) if group else [], strict=True):
                self._tokens[string, add_special_tokens] = ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would say it."""
        pairs = [request.args for request in requests if request.args[0] != ""]
        strings = {context + continuation for context, continuation in pairs} | {pair[0].rstrip() for pair in pairs}
        self._encode(sorted(strings))
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._tokens.clear()
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = self.scorer.longest
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= longest:
                raise UserError(
                    f"the answer {texts[1]!r} of a task is {len(continuation)} tokens long; allowed: 1 to {longest}, "
                    "what the model reads"
                )
            self.truncated += len(context) + len(continuation) > longest + 1
        total, greedy = self.scorer.score([Request(context, asked) for _, context, asked in requests])
        return [(float(value), bool(best)) for value, best in zip(total, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows as long as the model reads."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.scorer.longest, context_len=1):
                windows.append(Request(*make_disjoint_window(pair)))
                owners.append(number)
        self._tokens.clear()
        total, _ = self.scorer.score(windows)
        return np.bincount(owners, total, minlength=len(requests)).tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Not here: `load_tasks` lets no task through that asks for it."""
        raise NotImplementedError


def load_tasks(
    names: Sequence[str], folders: Sequence[Path] = (), num_fewshot: int | None = None
) -> dict[str, dict[str, Any]]:
    """Tasks and groups as `evaluate` takes them: from folders, or lm-eval's own from the hub.

    UserError for names that do not exist, tasks that cannot be fetched, and those that need more than likelihoods.
    """
    _quieten()
    lm_eval.api.task.get_metric = registered_metric
    loaded: dict[str, Any] = (
        TaskManager(include_defaults=not folders).load(local_tasks.load(names, folders))
        if folders
        else _from_hub(names)
    )
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in SCORED:
            raise kind_refusal(name, task.OUTPUT_TYPE)
        # A task that says 0 itself stays at 0, as in lm-eval.
        if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded


def _quieten() -> None:
    """The harness's own messages and bars, one for each task, which take no time and say nothing that goes wrong."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    setattr(lm_eval.api.task, "tqdm", lambda items, **_: items)


def registered_metric(name: str, hf_evaluate_metric: bool = False) -> Any:
    """A metric of lm-eval's own; where lm-eval would go on to import one from a folder or the hub, UserError."""
    if hf_evaluate_metric or name not in metric_registry:
        raise UserError(
            f"--tasks: metric {brief(name)} would be imported from a folder or the hub; allowed: "
            f"{', '.join(sorted(metric_registry))}"
        )
    return metric_registry.get(name)


def _check_kinds(manager: TaskManager, name: str, seen: set[str]) -> None:
    """UserError when a task, or one of a group, needs more than likelihoods; nothing is fetched for that."""
    entry = manager.task_index.get(name)
    if entry is None or name in seen:
        return
    seen.add(name)
    for member in sorted(entry.tags) if entry.kind == Kind.TAG else ():
        _check_kinds(manager, member, seen)
    if entry.kind in (Kind.TAG, Kind.PY_TASK) or entry.yaml_path is None:
        return
    content = load_yaml(entry.yaml_path, resolve_func=False)
    if entry.kind == Kind.GROUP:
        for member in _members(content):
            _check_kinds(manager, member, seen)
    elif content.get("output_type", "generate_until") not in SCORED:
        raise kind_refusal(name, content.get("output_type", "generate_until"))


def _members(group: Any) -> Iterator[str]:
    """Names in a group's list of tasks, and in those of groups written inside it."""
    tasks = group.get("task")
    for item in tasks if isinstance(tasks, list) else ():
        if isinstance(item, str):
            yield item
        elif isinstance(item.get("task"), list):
            yield from _members(item)
        else:
            yield str(item.get("task", item.get("group")))


def _from_hub(names: Sequence[str]) -> dict[str, Any]:
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"--tasks: lm-eval has no task {name!r}; {hint}")
    for name in names:
        _check_kinds(manager, name, set())
    with (
        _network_or_cache(),
        fenced(
            f"--tasks: the rows of {', '.join(names)} could not be fetched",
            "go online, or give --tasks-folder with files of this machine",
        ),
    ):
        return manager.load(list(names))


@contextlib.contextmanager
def _network_or_cache() -> Iterator[None]:
    """Where the hub does not answer, only the cache is asked: its library would ask on for half a minute."""
    offline = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        with fenced("the hub does not answer", "ask the cache"):
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except UserError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = offline


def evaluate(
    model: Harness, tasks: dict[str, Any], limit: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores of a model, and its answers to every item. Collective.

    For each task `metrics`, their standard errors, items, examples, version and the hash of what was asked; for groups
    their scores.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  (the generator that the harness uses)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    model.truncated = 0
    found = _evaluated(model, tasks, limit)
    about = {name: _about_task(found, name, task) for name, task in tasks["tasks"].items()}
    groups = {name: _metrics(scores) for name, scores in found.get("groups", {}).items()}
    scores = {"tasks": about, "truncated_requests": model.truncated} | ({"groups": groups} if groups else {})
    if model.chat is not None:
        scores |= about_chat(model.chat.sha256) | {"fewshot_as_multiturn": model.multiturn}
    return scores, [_answers(name, sample) for name in tasks["tasks"] for sample in _samples(found, name)]


def _evaluated(model: Harness, tasks: dict[str, Any], limit: float | None) -> Any:
    """lm-eval's own answer; what it, or a template, makes of a definition that fits no rows is a UserError."""
    try:
        return evaluator.evaluate(
            model,
            tasks,
            limit=limit,
            apply_chat_template=model.chat is not None,
            fewshot_as_multiturn=model.chat is not None and model.multiturn,
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError) or _raised_here(error):
            raise
        names = ", ".join(tasks["tasks"])
        raise UserError(
            f"--tasks {names}: rows, metrics or examples do not fit each other ({type(error).__name__}: "
            f"{reason(error)}); correct the task's definition or its rows"
        ) from error


def _raised_here(error: BaseException) -> bool:
    """Whether an exception comes from below the scorer that lm-eval was given: then it is a fault of ours."""
    _first, *below = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    own = [file.name for file in below if file.is_relative_to(Path(__file__).parents[1])]
    return bool(set(own) - {"templates.py", "local_tasks.py"})


def _samples(found: Any, name: str) -> list[dict[str, Any]]:
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def _answers(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """One item: log-likelihoods in nats, in the order of the choices."""
    values = [resps[0] for resps in sample["resps"]]
    values = [value[0] if isinstance(value, tuple) else value for value in values]
    scores = {name: sample[name] for name in sample["metrics"]}
    about = {"task": task, "item": sample["doc_id"], "target": sample["target"], "prompt": sample["prompt_hash"]}
    return about | {"log_likelihoods": values, "scores": scores}


def _about_task(found: Any, name: str, task: Task) -> dict[str, Any]:
    samples = _samples(found, name)
    return {
        **_metrics(found["results"][name]),
        "items": found["n-samples"][name]["effective"],
        "num_fewshot": found["n-shot"][name],
        "version": found["versions"][name],
        "items_sha256": _hash([[sample["arguments"], sample["target"]] for sample in samples]),
        "right": _right(samples),
    }


def _metrics(scores: dict[str, Any]) -> dict[str, Any]:
    """`acc,none` and `acc_stderr,none` -> a score and its standard error (None where the metric has none)."""
    by_name = {key.removesuffix(",none"): value for key, value in scores.items() if "," in key}
    errors = {key: value for key, value in by_name.items() if "_stderr" in key}
    metrics = {key: value for key, value in by_name.items() if key not in errors}
    named = {key: errors.get(key.replace(",", "_stderr,") if "," in key else f"{key}_stderr") for key in metrics}
    return {
        "metrics": metrics,
        "standard_errors": {key: value if isinstance(value, float) else None for key, value in named.items()},
    }


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _right(samples: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each metric that counts right answers: a 1 or a 0 for every item, in their order."""
    metrics = dict.fromkeys(name for sample in samples for name in sample["metrics"])
    values = {name: [sample.get(name) for sample in samples] for name in metrics}
    return {name: "".join("1" if x else "0" for x in found) for name, found in values.items() if set(found) <= {0, 1}}
