"""A chat template at work: in a process of its own, with an end to its time, its memory and its text.

A template is somebody's program in jinja. transformers renders it in jinja's immutable sandbox, which keeps it from
files and from Python's objects, and not from running for ever. So one forked process renders, for as long as there is
something to render: the system ends it when a conversation takes too much of a processor, its memory is limited, and
it answers in JSON. A conversation that is too much for it is one that the template does not take: the next gets a new
process. The day in it is always the same one: some templates write today's into every conversation.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_prune.data.workers import end_with_parent
from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import reason

MOST_SECONDS = 10
"""Of a processor, for one conversation."""
MOST_MEMORY = 2**30
"""Bytes beside what the process begins with."""
NO_ROOM = f"takes more than {MOST_MEMORY} bytes for a conversation"
MOST_TEXT = 50_000_000
"""Characters of a conversation."""
DAY = (2024, 7, 26)
"""What templates are told when they ask for today: the day that LLaMA-3.1's writes where nobody tells it one."""
NO_MEMORY = 3
"""Exit status of the process when a conversation did not fit into its memory."""
OWN_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
"""Signals by which a program ends over what it was given; by others somebody ends it."""
THREADS = "TOKENIZERS_PARALLELISM"

Messages = Sequence[dict[str, Any]]
"""Of a conversation: role, content and what else a template knows."""


class Refused(ValueError):
    """A conversation that the template does not take, in the template's words."""


class TooMuch(Refused):
    """A conversation that takes more than is allowed: what it takes, to be said of the template."""


@dataclass(frozen=True)
class Template:
    """A chat template, and how messages speak of it."""

    text: str
    name: str
    """Of whose it is."""
    advice: str = "leave --apply-chat-template out"
    """What to do when it is no good."""


class Renderer:
    """A chat template, ready to render; its process starts with the first conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        """`tokenizer` says which special tokens there are."""
        self._tokenizer = tokenizer
        self._template = template
        self._owner: int | None = None
        self._process: Any = None
        self._pipe: Any = None

    def render(self, messages: Messages, prompt: bool = False, unfinished: bool = False) -> str:
        """The text of a conversation; with `prompt` the start of an answer follows, `unfinished` leaves its end open.

        `Refused` where the template does not take it, `TooMuch` of these where it takes too much for it, UserError
        where the template itself is no good.
        """
        answer = self._ask([list(messages), prompt, unfinished])
        if "refused" in answer:
            raise Refused(answer["refused"])
        if "exceeded" in answer:
            raise TooMuch(answer["exceeded"])
        if "failed" in answer:
            raise self.broken(answer["failed"])
        return str(answer["text"])

    def broken(self, fault: object) -> UserError:
        """The error of a template that is no good."""
        return UserError(f"{self._template.name}: the chat template {fault}; {self._template.advice}")

    def _ask(self, request: list[Any]) -> dict[str, Any]:
        if self._owner != os.getpid():  # also in a process that was forked with a renderer of its parent's
            self._start()
        try:
            self._pipe.send_bytes(json.dumps(request).encode())
            answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            return self._end()
        return answer

    def _start(self) -> None:
        context = get_context("fork")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._pipe, self._tokenizer, self._template.text, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with _silent_fork():
            self._process.start()
        theirs.close()
        self._owner = os.getpid()

    def _end(self) -> dict[str, str]:
        """How the process came to its end; the next conversation gets a new one."""
        self._process.join()
        code, self._owner = self._process.exitcode, None
        if code == -signal.SIGPROF:
            return {"exceeded": f"takes more than {MOST_SECONDS} seconds for a conversation"}
        if code == NO_MEMORY:
            return {"exceeded": NO_ROOM}
        cause = signal.Signals(-code).name if code < 0 else f"status {code}"
        kind = "exceeded" if -code in OWN_FAULTS else "failed"
        return {kind: f"ended the process that renders it by {cause}"}


@contextlib.contextmanager
def _silent_fork() -> Iterator[None]:
    """tokenizers warns of a fork after it has used threads, unless somebody has said whether it shall use them."""
    unset = THREADS not in os.environ
    os.environ.setdefault(THREADS, "true")
    try:
        yield
    finally:
        if unset:
            del os.environ[THREADS]


# --- in the process ---


class _Day(datetime):
    """A calendar with one day."""

    @classmethod
    def now(cls, tz: Any = None) -> _Day:
        """That day."""
        return cls(*DAY, tzinfo=tz)


def _serve(pipe: Any, others: Any, tokenizer: PreTrainedTokenizerBase, template: str, parent: int) -> None:
    """Answer until the other end is closed."""
    from transformers.utils import chat_template_utils

    others.close()
    end_with_parent(parent)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGTERM):  # a program's own handlers would keep it from ending
        signal.signal(number, signal.SIG_DFL)
    chat_template_utils.datetime = _Day  # type: ignore[misc,assignment]
    _limit_memory()
    with contextlib.suppress(EOFError):
        while True:
            try:
                request = pipe.recv_bytes()
                signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
                answer = json.dumps(_answer(tokenizer, template, *json.loads(request))).encode()
                signal.setitimer(signal.ITIMER_PROF, 0)
                pipe.send_bytes(answer)
            except MemoryError:  # outside of the template, where half of a message may be in the pipe
                os._exit(NO_MEMORY)


def _limit_memory() -> None:
    """No more than `MOST_MEMORY` beside what there is."""
    found = re.search(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found:
        most, hard = int(found[1]) * 1024 + MOST_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _answer(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, prompt: bool, unfinished: bool
) -> dict[str, str]:
    from jinja2 import TemplateSyntaxError

    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
            continue_final_message=unfinished,
        )
    except TemplateSyntaxError as error:
        return {"failed": f"is no jinja ({reason(error)}, line {error.lineno})"}
    except MemoryError:
        return {"exceeded": NO_ROOM}
    except Exception as error:  # noqa: BLE001  (whatever a template does to what it is given)
        return {"refused": reason(error) or type(error).__name__}
    if not isinstance(text, str):
        return {"failed": f"makes no text but {brief(text)}"}
    if len(text) > MOST_TEXT:
        return {"exceeded": f"makes more than {MOST_TEXT} characters of a conversation"}
    return {"text": text}
