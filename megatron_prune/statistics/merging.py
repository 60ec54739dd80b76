"""Experts joined to fewer, layer by layer, as REAM does (Jha et al. 2026, arXiv:2604.04356).

centres    the experts of highest score stay, each the centre of a group. From the highest on, a centre takes the
           experts most like it that have no group yet, as many as a group has room for: most centres stay alone, and
           what is taken adds little to what takes it, so little is lost to averages
likeness   of two experts, the mean of two cosines: of what they give on average, weighted by their gates, were every
           token sent to every expert; and of the router's logits for them over all tokens
alignment  neurons have no order. Those of an expert are put into the centre's, each to the one that it is nearest to:
           the distance of their unit vectors of activations over all tokens, plus that of their weights. The sum is
           smallest over all orders (the Hungarian method, SciPy's)
average    of the aligned weights and biases of a group, weighted by score

The router keeps the centres' rows. Windows reach the next layer through the joined one. Sums over tokens are float64
and those of fixed units of windows, so the same experts and weights come out in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.decision.units import Units
from megatron_prune.model import convert
from megatron_prune.model.families import WeightMap
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.ranks import from_leader
from megatron_prune.statistics.experts import ExpertActivity, ExpertLikeness, cosines
from megatron_prune.statistics.walk import CutWeights, LayerWalk, WholeWeights, inner, sum_over_ranks

ROUTER = "mlp.router"


def grouped(scores: Tensor, likeness: Tensor, centres: Sequence[int], size: int) -> dict[int, list[int]]:
    """The experts that each centre takes, most alike first; `scores [experts]`, `likeness [experts, experts]`.

    ValueError when groups of at most `size`, centre included, have no room for all.
    """
    if len(centres) * size < len(scores):
        raise ValueError(f"{len(centres)} groups of {size} have no room for {len(scores)} experts")
    free = set(range(len(scores))) - set(centres)
    found: dict[int, list[int]] = {}
    for centre in sorted(centres, key=lambda expert: (-float(scores[expert]), expert)):
        nearest = sorted(free, key=lambda expert: (-float(likeness[centre, expert]), expert))
        found[centre] = nearest[: size - 1]
        free -= set(found[centre])
    return found


def alignment(distance: Tensor) -> list[int]:
    """Of a distance `[neurons, others]`, the other that goes to each neuron's place: their sum is the smallest."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(distance.cpu().numpy())[1].tolist()


def unit_distance(products: Tensor, squares: Tensor, other_squares: Tensor) -> Tensor:
    """Euclidean distances `[n, m]` of unit vectors: `products [n, m]` of the vectors, and their squared lengths.

    A vector of length 0 is as far from any other as vectors at right angles are.
    """
    return torch.sqrt((2 - 2 * cosines(products, squares, other_squares)).clamp(min=0))


class Merging:
    """One pass that joins the experts of every layer to `count`, in the weights of the centres, in place.

    tokens: `[windows, length]` int64, the same on every rank. `score` gives float64 `[experts]`.
    """

    def __init__(
        self,
        model: PrunableModel,
        tokens: Tensor | None,
        count: int,
        size: int,
        score: Callable[[ExpertActivity], Tensor],
        keep: Callable[[Tensor, int], tuple[int, ...]],
    ) -> None:
        self.model = model
        self.count = count
        self.size = size
        self.score = score
        self.keep = keep
        self.maps: dict[tuple[int | None, int | None], list[WeightMap]] = {}
        for map in model.maps:
            self.maps.setdefault((map.layer, map.expert), []).append(map)
        self.whole = WholeWeights(model)
        whole = Units.all(model.config)
        any_of = keep(torch.zeros(model.config.num_moe_experts or 0), count)  # until a layer's are known
        blocks = tuple(replace(block, experts=any_of) if block.experts else block for block in whole.blocks)
        self.units = replace(whole, blocks=blocks)
        self.cut = CutWeights(model, self.units)
        self.dense = LayerWalk(self.whole, tokens)
        self.joined = LayerWalk(self.cut, tokens)
        self.joined.hidden = self.dense.hidden  # one stream, through the joined layers

    @torch.no_grad()
    def run(self, progress: Callable[[int], None]) -> Units:
        """Join the experts of every layer; the units that stay. Collective."""
        for number in range(self.model.config.num_layers):
            if self.model.config.has_experts(number):
                tensors = self.whole.layer(number)
                self.dense.load(number, tensors)
                self._join(number, tensors)
            self.joined.load(number, self.cut.layer(number))
            self.joined.advance()
            progress(1)
        return self.units

    def _join(self, number: int, tensors: dict[str, Tensor]) -> None:
        scores, likeness = self._observed(number)
        groups = from_leader(grouped(scores, likeness, self.keep(scores, self.count), self.size))
        orders = self._orders(number, groups, tensors)
        for centre, others in groups.items():
            if others:
                shares = scores[[centre, *others]]
                self._average(number, centre, {other: orders[centre, other] for other in others}, shares, tensors)
        blocks = list(self.units.blocks)
        blocks[number] = replace(blocks[number], experts=tuple(sorted(groups)))
        self.units = self.cut.units = replace(self.units, blocks=tuple(blocks))

    def _observed(self, number: int) -> tuple[Tensor, Tensor]:
        """Scores `[experts]` and likeness `[experts, experts]` of a loaded layer's experts, float64."""
        config, walk = self.model.config, self.dense
        experts = config.block(number).num_moe_experts
        activity = ExpertActivity(experts, walk.device)
        likeness = ExpertLikeness(experts, config.hidden_size, walk.device)
        for hidden in walk.hidden:
            seen, _ = walk.watch_experts(hidden)
            activity.update(*seen)
            x = walk.watch([ROUTER], hidden)[0][ROUTER].flatten(0, 1)
            logits = walk.module.mlp.router.gating(x)
            gates = logits.float().sigmoid() if self._sigmoid else logits.float().softmax(-1)
            likeness.update(logits, (self._outputs(expert, x) * gates[:, expert, None] for expert in range(experts)))
        sum_over_ranks([*activity.tensors(), *likeness.tensors()])
        return self.score(activity).cpu(), likeness.value().cpu()

    @property
    def _sigmoid(self) -> bool:
        return self.model.config.moe_router_score_function == "sigmoid"

    def _outputs(self, expert: int, x: Tensor) -> Tensor:
        output, bias = self.dense.module.mlp.experts.local_experts[expert](x)
        return output if bias is None else output + bias

    def _orders(
        self, number: int, groups: dict[int, list[int]], tensors: dict[str, Tensor]
    ) -> dict[tuple[int, int], list[int]]:
        """Of every centre and expert that it takes, the neuron of the other that goes to each of the centre's."""
        sums: dict[tuple[int, ...], Tensor] = {}
        for hidden in self.dense.hidden:
            x = self.dense.watch([ROUTER], hidden)[0][ROUTER].flatten(0, 1)
            for centre, others in groups.items():
                if others:
                    own = self._activations(centre, x)
                    _add(sums, (centre,), own.square().sum(0, dtype=torch.float64))
                for other in others:
                    taken = self._activations(other, x)
                    _add(sums, (other,), taken.square().sum(0, dtype=torch.float64))
                    _add(sums, (centre, other), (own.t() @ taken).double())
        pairs = [(centre, other) for centre, others in groups.items() for other in others]
        width = self.model.config.block(number).ffn_hidden_size
        for key in [*((e,) for e in sorted({e for pair in pairs for e in pair})), *pairs]:
            sums.setdefault(key, torch.zeros(*[width] * len(key), dtype=torch.float64, device=self.dense.device))
            sum_over_ranks([sums[key]])
        found = {}
        for centre, other in pairs:
            a, b = (self._neurons(number, expert, tensors) for expert in (centre, other))
            distance = unit_distance(sums[centre, other], sums[centre,], sums[other,])
            distance += unit_distance(a @ b.t(), a.square().sum(1), b.square().sum(1))
            found[centre, other] = alignment(distance)
        return from_leader(found)

    def _activations(self, expert: int, x: Tensor) -> Tensor:
        """What enters the second linear of an expert, float32 `[tokens, neurons]`."""
        seen: list[Tensor] = []
        module = self.dense.module.mlp.experts.local_experts[expert]
        handle = module.linear_fc2.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            module(x)
        finally:
            handle.remove()
        return seen[0].float()

    def _neurons(self, number: int, expert: int, tensors: dict[str, Tensor]) -> Tensor:
        """All weights of each neuron of an expert, float64 `[neurons, weights of one]`."""
        found = []
        for map in self.maps[number, expert]:
            for part, symbols in self._parts(map, tensors[inner(map.megatron)]):
                if "ffn" in symbols:
                    found.append(part.movedim(symbols.index("ffn"), 0).flatten(1) if part.dim() > 1 else part[:, None])
        return torch.cat(found, dim=1).double()

    def _parts(self, map: WeightMap, tensor: Tensor) -> list[tuple[Tensor, tuple[str, ...]]]:
        """The tensors that a Megatron one is made of, with what each of their dimensions counts."""
        parts = convert.split(map, tensor, self.model.config)
        turned = [part.t() if map.transposed else part for part in parts]
        return list(zip(turned, map.symbols, strict=True))

    def _average(
        self, number: int, centre: int, orders: dict[int, list[int]], scores: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        """Put the average of a group, weighted by `scores [group]`, the centre's first, in the centre's place."""
        if not float(scores.sum()) > 0:
            return  # no token reaches any of them
        shares = (scores / scores.sum()).tolist()
        for place, map in enumerate(self.maps[number, centre]):
            kept = self._parts(map, tensors[inner(map.megatron)])
            sums = [part.double() * shares[0] for part, _ in kept]
            for (other, order), share in zip(orders.items(), shares[1:], strict=True):
                index = torch.tensor(order, device=self.dense.device)
                theirs = self.maps[number, other][place]
                for total, (part, symbols) in zip(
                    sums, self._parts(theirs, tensors[inner(theirs.megatron)]), strict=True
                ):
                    aligned = part.index_select(symbols.index("ffn"), index) if "ffn" in symbols else part
                    total += share * aligned.double()
            turned = [total.t() if map.transposed else total for total in sums]
            dtype = tensors[inner(map.megatron)].dtype
            self.model.assign(map, convert.merge(map, turned, self.model.config).to(dtype))


def _add(sums: dict[tuple[int, ...], Tensor], key: tuple[int, ...], value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value
