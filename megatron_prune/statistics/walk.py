"""Whole decoder layers, run one after the other over calibration windows, the same in every parallel layout.

Every rank rebuilds the *whole* layer and runs it, unsharded, on its own share of the windows: weights travel between
ranks, activations never do. A window is therefore computed by the same arithmetic in every layout, and statistics are
sums over fixed units of windows. All ranks work, those of other pipeline stages too; a walk holds one layer's weights
and this rank's share of the hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.decision.units import Units
from megatron_prune.model.build import rotary, whole_layer, whole_norm
from megatron_prune.model.families import Block, ModelConfig, WeightMap, get_family
from megatron_prune.model.prunable import PrunableModel, expert_of

UNIT_TOKENS = 2048
"""Calibration windows are run and accumulated in units of about so many tokens, the same units in every layout."""
LOSS_TOKENS = 512
"""Logits are held for about so many tokens at a time."""
WORDS, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
OUTPUT, FINAL_NORM = "output_layer.weight", "decoder.final_layernorm"


def units_of(windows: int, length: int) -> list[slice]:
    """Fixed groups of consecutive windows: what is computed together never depends on who computes it."""
    width = max(1, UNIT_TOKENS // length)
    return [slice(start, start + width) for start in range(0, windows, width)]


class Weights(Protocol):
    """Unsharded weights of a model, a layer at a time. Every method is collective."""

    config: ModelConfig
    dtype: torch.dtype

    def layer(self, number: int) -> dict[str, Tensor]:
        """A decoder layer's tensors by their Megatron names inside the layer."""

    def outer(self, name: str) -> Tensor | None:
        """A tensor outside the decoder layers; None when the model has none of that name."""


class WholeWeights:
    """Those of a model as it is."""

    def __init__(self, model: PrunableModel) -> None:
        self.model = model
        self.config = model.config
        self.dtype = next(iter(model.parameters.values())).dtype

    def layer(self, number: int) -> dict[str, Tensor]:
        """See `Weights`."""
        return {inner(map.megatron): self._own(map) for map in self.model.maps if map.layer == number}

    def _own(self, map: WeightMap) -> Tensor:
        """A whole tensor that stays what it is when the model's changes: one that is not split is the model's own."""
        whole = self.model.whole(map)
        return whole.clone() if map.shard_dim is None else whole

    def outer(self, name: str) -> Tensor | None:
        """See `Weights`."""
        map = self.model.by_name.get(name)
        return None if map is None else self.model.whole(map)


Change = Callable[[int | None, dict[str, Tensor]], dict[str, Tensor]]
"""Corrects tensors of a layer of the whole model, or (None) tensors outside all layers, before they are cut."""


def unchanged(layer: int | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `Change` that leaves everything as it is."""
    del layer
    return tensors


class CutWeights:
    """Those of the smaller model that some units of a model are."""

    def __init__(self, model: PrunableModel, units: Units, change: Change = unchanged) -> None:
        self.whole = WholeWeights(model)
        self.units = units
        self.change = change
        self.config = units.config(model.config)
        self.dtype = self.whole.dtype
        self.maps = {map.megatron: map for map in get_family(self.config.family).weights(self.config)}

    def layer(self, number: int) -> dict[str, Tensor]:
        """See `Weights`."""
        source = self.units.layers[number]
        tensors = self.change(source, self.whole.layer(source))
        found = {}
        for name, map in self.maps.items():
            if map.layer == number:
                whole = self.units.source(map)
                found[inner(name)] = self._cut(whole, tensors[inner(whole)], name)
        return found

    def outer(self, name: str) -> Tensor | None:
        """See `Weights`."""
        tensor = self.whole.outer(name)
        return None if tensor is None else self._cut(name, self.change(None, {name: tensor})[name], name)

    def _cut(self, source: str, tensor: Tensor, target: str) -> Tensor:
        model = self.whole.model
        return self.units.cut(model.config, model.by_name[source], tensor, self.maps[target])


class _Stop(Exception):
    """Everything that was asked for has been seen; what follows would be thrown away."""


class LayerWalk:
    """Hidden states `[s, b, hidden]` of this rank's calibration windows, moved through a model layer by layer.

    tokens: `[windows, length]` int64, the same on every rank; `unit_windows` overrides how many are run together;
    without `shared` every rank has all of them.
    """

    def __init__(
        self, weights: Weights, tokens: Tensor | None, unit_windows: int | None = None, shared: bool = True
    ) -> None:
        if tokens is None:
            raise RuntimeError("this method needs calibration windows")
        self.weights = weights
        self.device = backend.device()
        self.modules: dict[tuple[Block, int | None], Any] = {}
        """An empty layer of each size and window."""
        self.module: Any = None
        slices = units_of(*tokens.shape)
        if unit_windows is not None:
            slices = [slice(i, i + unit_windows) for i in range(0, tokens.shape[0], unit_windows)]
        self.windows = len(tokens)
        self.units = slices[dist.get_rank() :: dist.get_world_size()] if shared else slices
        """Of windows that are run together, those of this rank."""
        self.tokens = [tokens[unit].t().to(self.device) for unit in self.units]
        self.hidden = self._embedded()
        self.rotary = rotary(weights.config, tokens.shape[1], backend.alone().cp)

    @torch.no_grad()
    def _embedded(self) -> list[Tensor]:
        """Hidden states before the first layer."""
        words = self.weights.outer(WORDS)
        assert words is not None
        words = words.to(self.weights.dtype)
        scale = torch.tensor(self.weights.config.embedding_scale, dtype=words.dtype)
        hidden = [F.embedding(unit, words) * scale for unit in self.tokens]
        learned = self.weights.outer(POSITIONS)
        if learned is None:
            return hidden
        return [x + learned[: x.shape[0], None].to(x.dtype) for x in hidden]

    def ready(self, number: int) -> None:
        """Make layer `number` the one that is run, without any weights: those of the last one are let go."""
        config = self.weights.config
        kind = config.block(number), config.window(number)
        if kind not in self.modules:
            self.modules[kind] = whole_layer(config, self.weights.dtype, number)
        for module in (self.module, self.modules[kind]):
            for parameter in module.parameters() if module is not None else ():
                parameter.data = parameter.data.new_empty(0)
        self.module = self.modules[kind]

    @torch.no_grad()
    def load(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Make layer `number` the one that is run, with these weights, by their names inside the layer.

        It runs on the tensors themselves where they are of its type: a layer of experts is not held twice. Nothing may
        change them in place before the next layer is loaded.
        """
        self.ready(number)
        places = dict(self.module.named_parameters())
        assert places.keys() <= tensors.keys()
        for name, parameter in places.items():
            parameter.data = tensors[name].to(device=self.device, dtype=self.weights.dtype)
        for name, buffer in self.module.named_buffers():
            if name in tensors:  # a router's bias is one
                buffer.copy_(tensors[name])

    def take(self, number: int) -> None:
        """`load` layer `number` of the model, the last one let go before it is brought together. Collective."""
        self.ready(number)
        self.load(number, self.weights.layer(number))

    def run(self, hidden: Tensor) -> Tensor:
        """The layer that was loaded last: `[s, b, hidden]` in and out."""
        try:
            return self.module(hidden_states=hidden, attention_mask=None, rotary_pos_emb=self.rotary)[0]
        finally:
            self.module.mlp_norm_manager = None  # since megatron-core 0.19 it keeps the activations of the last call

    @torch.no_grad()
    def watch(self, paths: Sequence[str], hidden: Tensor, whole: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs `[s, b, in]` of the layer's submodules at `paths`, and its output where `whole` asks for it."""
        seen: dict[str, Tensor] = {}

        def hook(path: str) -> Callable[..., None]:
            def remember(_module: Any, inputs: tuple[Tensor, ...]) -> None:
                seen[path] = inputs[0]
                if not whole and len(seen) == len(paths):
                    raise _Stop

            return remember

        handles = [self.module.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
        output = hidden
        try:
            with contextlib.suppress(_Stop):
                output = self.run(hidden)
        finally:
            for handle in handles:
                handle.remove()
        return seen, output

    @torch.no_grad()
    def watch_windows(self, paths: Sequence[str], hidden: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
        """Inputs of the layer's submodules at `paths`, in pieces `[tokens, windows, in]`, and the layer's output.

        Those of a linear of an expert window by window, `[tokens, 1, in]`: of the tokens that a window sends there;
        nothing of windows that send none.
        """
        routed: list[Tensor] = []
        handle = None
        if any(expert_of(path) is not None for path in paths):
            router = self.module.get_submodule("mlp.router")
            handle = router.register_forward_hook(lambda _module, _inputs, output: routed.append(output[1]))
        try:
            seen, output = self.watch(paths, hidden, whole=True)
        finally:
            if handle is not None:
                handle.remove()
        found = {}
        for path, x in seen.items():
            expert = expert_of(path)
            if expert is not None:
                window = routed[0][:, expert].nonzero()[:, 0] % hidden.shape[1]
                found[path] = [x[window == number][:, None] for number in window.unique().tolist()]
            else:
                found[path] = [x]
        return found, output

    @torch.no_grad()
    def watch_experts(self, hidden: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """What goes through the loaded layer's experts, and its output `[s, b, h]`.

        Counts `[experts]`, gates `[tokens]` and gated outputs `[tokens, h]`, sorted by expert.
        """
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def remember(_module: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            _tokens, counts, gates = inputs
            seen.append((counts, gates, output[0]))

        handle = self.module.mlp.experts.register_forward_hook(remember)
        try:
            output = self.run(hidden)
        finally:
            handle.remove()
        return seen[0], output

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states by the loaded layer's outputs, in place: never two layers' at once."""
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = self.run(hidden)

    @torch.no_grad()
    def finish(self) -> None:
        """Take the hidden states from before the first layer through all of them. Collective."""
        for number in range(self.weights.config.num_layers):
            self.take(number)
            self.advance()

    def losses(self, states: Sequence[Tensor]) -> Tensor:
        """Mean next-token loss of each window, float64 `[windows]`, after the last layer; 0 for windows of others."""
        found = torch.zeros(self.windows, dtype=torch.float64, device=self.device)
        head = Head(self.weights)
        for unit, tokens, hidden in zip(self.units, self.tokens, states, strict=True):
            each = torch.cat(list(head.pieces(hidden, tokens))).view(-1, tokens.shape[1])
            found[unit] = each.mean(0, dtype=torch.float64)
        return found


class Head:
    """The final norm and the output layer, whole."""

    def __init__(self, weights: Weights) -> None:
        self.norm = whole_norm(weights.config, weights.dtype)
        with torch.no_grad():
            for name, parameter in self.norm.named_parameters():
                found = weights.outer(f"{FINAL_NORM}.{name}")
                assert found is not None
                parameter.copy_(found)
        output = weights.outer(OUTPUT)
        if output is None:  # tied
            output = weights.outer(WORDS)
        assert output is not None
        self.output = output.to(weights.dtype)

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits `[tokens, vocab]` of hidden states `[s, b, h]`, some tokens at a time, in the model's own type."""
        for x in hidden.flatten(0, 1).split(LOSS_TOKENS):
            yield F.linear(self.norm(x), self.output)

    def pieces(self, hidden: Tensor, tokens: Tensor) -> Iterator[Tensor]:
        """Next-token losses (nats, float32) of windows `hidden [s, b, h]`, `tokens [s, b]`, some tokens at a time."""
        inputs, labels = hidden[:-1].flatten(0, 1), tokens[1:].flatten()
        for x, label in zip(inputs.split(LOSS_TOKENS), labels.split(LOSS_TOKENS), strict=True):
            yield F.cross_entropy(F.linear(self.norm(x), self.output).float(), label, reduction="none")


def inner(name: str) -> str:
    """`decoder.layers.3.mlp.linear_fc2.weight` -> `mlp.linear_fc2.weight`."""
    return name.split(".", 3)[3]


def shares(paths: Sequence[str], needed: Callable[[str], int], most: int) -> Iterator[list[str]]:
    """`paths` in their order, in groups that need at most so many bytes together, or one at a time."""
    share: list[str] = []
    held = 0
    for path in paths:
        size = needed(path)
        if share and held + size > most:
            yield share
            share, held = [], 0
        share.append(path)
        held += size
    if share:
        yield share


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Add up the accumulators of all ranks, in place. Collective."""
    for tensor in tensors:
        dist.all_reduce(tensor)
