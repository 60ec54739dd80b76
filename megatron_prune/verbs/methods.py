"""The `methods` verb: every registered method with its paper, targets and hyper-parameters."""

from __future__ import annotations

from rich.markup import escape

from megatron_prune.config import MethodsConfig
from megatron_prune.console import PipedConsole
from megatron_prune.methods.base import MethodInfo, methods


def run(config: MethodsConfig) -> None:
    """Prints the list on standard output."""
    console = PipedConsole(highlight=False, soft_wrap=True)
    for info in methods():
        for line in describe(info):
            console.print(line)


def describe(info: MethodInfo) -> list[str]:
    """Lines for one method, with rich markup."""
    lines = [
        f"[bold]{escape(info.name)}[/bold]  {escape(info.paper)}",
        f"  targets: {escape('; '.join(info.targets))}",
    ]
    for knob in info.hyperparameters:
        flag = "--" + knob.name.replace("_", "-")
        lines.append(escape(f"  {flag} {knob.type} (default {knob.default}): {knob.help}"))
    return lines
