"""What scores of structured methods are compared with: transformers' own model, seen by hooks and by autograd.

Nothing of the package's statistics, walks or tables is used here. Formulas are written out in the tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNEVEN: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
"""A tiny LLaMA whose numbers of heads, groups and heads in a group are all different: three heads share a group."""
HEADS, GROUPS, WIDTH = 6, 2, 8


class Reference:
    """A model of transformers in float32, and windows `[n, tokens]` that it is run on."""

    def __init__(self, path: Path, tokens: Tensor) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.tokens = tokens

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return self.model.model.layers

    def seen(self, module: Any, output: bool = False) -> Tensor:
        """The inputs, or outputs, `[n, tokens, channels]` of a module, float64."""
        found: list[Tensor] = []

        def before(_module: Any, inputs: Any) -> None:
            found.append(inputs[0].detach().double())

        def after(_module: Any, _inputs: Any, outputs: Any) -> None:
            found.append((outputs[0] if isinstance(outputs, tuple) else outputs).detach().double())

        add: Callable[..., Any] = module.register_forward_hook if output else module.register_forward_pre_hook
        handle = add(after if output else before)
        try:
            with torch.no_grad():
                for window in self.tokens:
                    self.model(window[None])
        finally:
            handle.remove()
        return torch.cat([x if x.dim() == 3 else x[None] for x in found])

    def gradients(self) -> dict[str, Tensor]:
        """Gradient of every window's mean next-token loss by each parameter's name, `[n, *shape]`, float64."""
        found: dict[str, list[Tensor]] = {}
        for window in self.tokens:
            self.model.zero_grad()
            self.model(window[None], labels=window[None]).loss.backward()
            for name, parameter in self.model.named_parameters():
                assert parameter.grad is not None, name
                found.setdefault(name, []).append(parameter.grad.double())
        return {name: torch.stack(each) for name, each in found.items()}

    @contextlib.contextmanager
    def only(self, layers: Sequence[Any]) -> Iterator[Any]:
        """The model with these layers alone, without gradients."""
        whole = self.model.model.layers
        self.model.model.layers = torch.nn.ModuleList(layers)
        self.model.config.num_hidden_layers = len(layers)
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.model.layers = whole
            self.model.config.num_hidden_layers = len(whole)

    def weight(self, name: str) -> Tensor:
        """A parameter, float64."""
        return self.model.get_parameter(name).detach().double()


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """Numbers, rising, of the `count` highest scores, which must not be close to those that go."""
    order = scores.double().sort(descending=True)
    assert count == len(scores) or order.values[count - 1] > order.values[count] * (1 + 1e-5), "too close to say"
    return tuple(sorted(order.indices[:count].tolist()))
