"""The `methods` verb: every registered method with its paper, targets and hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_prune.options import Options, flag
from megatron_prune.verbs import Verb

if TYPE_CHECKING:
    from megatron_prune.methods.base import MethodInfo


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(Options):
    """The pruning methods, each with its paper, targets and hyper-parameters"""


VERB = Verb("methods", MethodsConfig, "list the pruning methods and their options", 140, alone=True, light=True)


def run(config: MethodsConfig) -> list[MethodInfo]:
    """Prints the list on standard output."""
    from megatron_prune.console import PipedConsole
    from megatron_prune.methods.base import methods

    console, found = PipedConsole(highlight=False, soft_wrap=True), methods()
    for info in found:
        for line in describe(info):
            console.print(line)
    return found


def describe(info: MethodInfo) -> list[str]:
    """Lines for one method, with rich markup."""
    from rich.markup import escape

    lines = [
        f"[bold]{escape(info.name)}[/bold]  {escape(info.paper)}",
        f"  targets: {escape('; '.join(info.targets))}",
    ]
    for knob in info.hyperparameters:
        lines.append(escape(f"  {flag(knob.name)} {knob.type} (default {knob.default}): {knob.help}"))
    if info.defaults:
        own = ", ".join(f"{flag(key)} {value}" for key, value in info.defaults.items())
        lines.append(escape(f"  defaults of its own: {own}"))
    return lines
