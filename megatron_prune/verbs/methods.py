"""The `methods` verb: every registered method with its paper, targets and hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_prune.options import Options, flag, option
from megatron_prune.verbs import Verb

if TYPE_CHECKING:
    from megatron_prune.methods.base import MethodInfo


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(Options):
    """The pruning methods, each with its paper, targets and hyper-parameters"""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    examples: ClassVar[tuple[str, ...]] = ("", "sparsegpt")

    name: str | None = option(None, "show this method alone")


VERB = Verb("methods", MethodsConfig, "list the pruning methods and their options", 140, alone=True, light=True)


def run(config: MethodsConfig) -> list[MethodInfo]:
    """Prints the list on standard output."""
    from megatron_prune.console import PipedConsole
    from megatron_prune.methods.base import get_method, methods

    console, found = PipedConsole(highlight=False, soft_wrap=True, emoji=False), methods()
    if config.name is not None:
        chosen = get_method(config.name).name
        found = [info for info in found if info.name == chosen]
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
