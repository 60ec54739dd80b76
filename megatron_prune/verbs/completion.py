"""The `completion` verb: a script with which a shell completes verbs, flags, their words and files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin

from megatron_prune.helping import ALL, METHOD_OPTIONS, choices, method_names
from megatron_prune.options import REQUIRED, Options, entries, flag, option
from megatron_prune.verbs import Verb

PROGRAM = "megatron-prune"


@dataclass(frozen=True, kw_only=True)
class CompletionConfig(Options):
    """A shell's completion of this command, on standard output: for ~/.bashrc or ~/.zshrc"""

    positional: ClassVar[tuple[str, ...]] = ("shell",)
    examples: ClassVar[tuple[str, ...]] = ("bash", "zsh")

    shell: Literal["bash", "zsh"] = option(REQUIRED, "which reads it")


VERB = Verb("completion", CompletionConfig, "a script that completes verbs and flags, for bash or zsh", 150, True, True)


def run(config: CompletionConfig) -> str:
    """Print the script."""
    text = script(config.shell)
    print(text, end="")
    return text


def script(shell: str) -> str:
    """The script: tables of this version's verbs, flags and words, and the function that looks them up."""
    from megatron_prune.verbs import VERBS

    flags = "\n".join(f"        {name}) flags='{' '.join(_flags(verb.config))}' ;;" for name, verb in VERBS.items())
    words = "\n".join(f"        {key}) words='{' '.join(found)}' ;;" for key, found in _words(VERBS).items())
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    tables = {"VERBS": " ".join(VERBS), "METHODS": " ".join(method_names()), "FLAGS": flags, "WORDS": words}
    return start + re.sub("@([A-Z]+)@", lambda place: tables[place[1]], _BASH)


def _flags(config: type[Options]) -> list[str]:
    from megatron_prune.methods.base import methods

    found = ["--config", "--help", ALL]
    for entry in entries(config):
        if entry.key != METHOD_OPTIONS:
            found += [flag(entry.key), *(["--no" + flag(entry.key)[1:]] if entry.kind is bool else [])]
        else:
            found += sorted({flag(knob.name) for info in methods() for knob in info.hyperparameters})
    return found


def _words(verbs: Mapping[str, Verb]) -> dict[str, list[str]]:
    """Verb and flag -> what may stand behind it, where that is one of a few words."""
    found = {}
    for name, verb in verbs.items():
        for entry in entries(verb.config):
            allowed = method_names() if entry.key == "method" else _choices(entry.kind)
            if allowed and entry.key != METHOD_OPTIONS:
                found[f"{name}{flag(entry.key)}"] = allowed
    return found


def _choices(kind: Any) -> list[str]:
    if kind is bool:
        return []
    return choices(get_args(kind)[0] if get_origin(kind) is tuple else kind)


_BASH = f"""\
_megatron_prune() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}}
    local flags='' words=''
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=( $(compgen -W '@VERBS@ --help --version' -- "$word") )
        return
    fi
    case $verb in
@FLAGS@
    esac
    case $verb$before in
@WORDS@
    esac
    case $verb in
        methods) [ "$COMP_CWORD" -ne 2 ] || words='@METHODS@' ;;
        completion) [ "$COMP_CWORD" -ne 2 ] || words='bash zsh' ;;
    esac
    if [ -n "$words" ]; then
        COMPREPLY=( $(compgen -W "$words" -- "$word") )
    elif [ "${{word#-}}" != "$word" ]; then
        COMPREPLY=( $(compgen -W "$flags" -- "$word") )
    else
        COMPREPLY=( $(compgen -f -- "$word") )
    fi
}}
complete -o filenames -F _megatron_prune {PROGRAM}
"""
