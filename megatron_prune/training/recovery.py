"""What recovery training lowers and keeps: language-model loss, distillation from a teacher, zeros, adapters.

The teacher has the student's layout: each pipeline stage holds its part of both. The teacher's forward passes come
first, and what the losses need of them waits in queues until the student's micro-batch arrives:

    one stage         teacher(0) student(0) teacher(1) student(1) ...     one micro-batch waits
    several stages    teacher(0) teacher(1) ...  student(0) student(1) ... through the pipeline; all of a step wait, on
                      the last stage as hidden states, from which the logits are made when they are needed

Where only masks are learned, the teacher may be the student without them: no second model then, one forward pass more.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_prune.model import context
from megatron_prune.model.cost import forward_flops
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import LocalLinear, PrunableModel
from megatron_prune.training.loop import LossFunction, NextToken, Trainer, mean_part, micro_batch
from megatron_prune.training.lora import Adapters, add_adapters, merge_adapters
from megatron_prune.training.losses import AddLoss, divergence, hidden_distance
from megatron_prune.training.session import TrainingSession
from megatron_prune.training.weighting import Weighting, teacher_layer
from megatron_prune.training.zeros import Zeros, counted


class Teacher:
    """A frozen model and what it has said about the micro-batches that the student has yet to see."""

    def __init__(self, model: PrunableModel, layers: Sequence[int], keep_final: bool) -> None:
        """`layers`: those of this rank, by global number, whose outputs are kept; `keep_final`: for the logits."""
        assert len(model.chunks) == 1, "an interleaved pipeline is refused"
        self.model = model
        self.chunk = model.chunks[0]
        self.keep_final = keep_final
        self.reading = False
        self.final: deque[Tensor] = deque()
        self.outputs: dict[int, deque[Tensor]] = {layer: deque() for layer in layers}
        self.embedding = None
        if self.chunk.post_process and self.chunk.share_embeddings_and_output_weights:
            self.embedding = self.chunk.shared_embedding_or_output_weight()
        self.prepare()
        for layer, kept in self.outputs.items():
            module = self.chunk.decoder.layers[layer - model.first_layer(0)]
            module.register_forward_hook(partial(self._note, kept))

    def prepare(self) -> None:
        """Make the model one that only reads."""
        self.chunk.requires_grad_(False)
        self.chunk.eval()
        self.chunk.post_process = False  # of the GPTModel only: its output is then the final norm's

    @contextlib.contextmanager
    def as_reader(self) -> Iterator[None]:
        """The model as it reads, in the block."""
        self.reading = True
        yield
        self.reading = False

    def _note(self, kept: deque[Tensor], _module: Any, _inputs: Any, output: tuple[Tensor, Any]) -> None:
        if self.reading:
            kept.append(output[0].detach())  # megatron-core's layers add to the residual stream with gradients enabled

    @torch.no_grad()
    def read(self, batches: Iterator[Tensor], count: int, windows_shape: tuple[int, int]) -> None:
        """Forward passes over `count` micro-batches of windows `[b, s + 1]`, given as `windows_shape` (b, s)."""

        def forward_step(batches: Iterator[Tensor], chunk: Any) -> tuple[Tensor, LossFunction]:
            tokens, positions, _labels = micro_batch(next(batches))
            return chunk(tokens, positions, None), _keep

        with self.as_reader():
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=batches,
                model=[self.chunk],
                num_microbatches=count,
                seq_length=windows_shape[1],
                micro_batch_size=windows_shape[0],
                forward_only=True,
            )
        if self.keep_final:
            self.final.extend(result["hidden"] for result in results)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """`[b, s / cp, vocab / tp]` of the next micro-batch; on the last stage."""
        logits, _bias = self.chunk.output_layer(self.final.popleft(), weight=self.embedding)
        return logits.transpose(0, 1)


class OwnTeacher(Teacher):
    """The student itself, with all its weights: masks are left out while it reads."""

    def __init__(self, model: PrunableModel, draw: MaskDraw, layers: Sequence[int], keep_final: bool) -> None:
        """`draw`: that of the student's masks."""
        self.draw = draw
        super().__init__(model, layers, keep_final)

    def prepare(self) -> None:
        """Nothing: it learns, too."""

    @contextlib.contextmanager
    def as_reader(self) -> Iterator[None]:
        """As the base class; what a step has set up for the student is put back."""
        chunk, config = self.chunk, self.chunk.config
        training, post_process, no_sync = chunk.training, chunk.post_process, config.no_sync_func
        chunk.eval()
        # Leaving no_sync's block says that the student's last micro-batch has come, and its gradients would be reduced.
        chunk.post_process, config.no_sync_func, self.draw.off = False, None, True
        with super().as_reader():
            yield
        chunk.train(training)
        chunk.post_process, config.no_sync_func, self.draw.off = post_process, no_sync, False


def _keep(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return output.new_zeros(()), {"hidden": output.detach()}


def _straight_gradient(_module: Any, _inputs: Any, output: tuple[Tensor, Any]) -> None:
    """Lay the logits' gradient out as the logits are, which are turned to `[b, s, vocab]` for the losses.

    With a turned one the backward pass of a frozen output layer multiplies token by token, each with a copy of the
    weight: 29 GB for 512 tokens of SmolLM2-135M. A gradient of one window passes for contiguous whatever the stride of
    its only window is, and the product looks at that stride: only a copy is sure to be laid out anew.
    """
    if output[0].requires_grad:
        output[0].register_hook(partial(torch.clone, memory_format=torch.contiguous_format))


class RecoveryLoss(NextToken):
    """The weighted sum of language-model loss, distillation and the distance of hidden states; 0 leaves one out."""

    def __init__(
        self,
        student: PrunableModel,
        weighting: Weighting,
        teacher: PrunableModel | None,
        count: int,
        draw: MaskDraw | None = None,
    ) -> None:
        """`count`: micro-batches of a replica in a step. Hidden states need a teacher as wide and at least as deep.

        The student can be its own teacher where it only learns masks, those of `draw`.
        """
        self.weighting = weighting
        self.weights = weighting.parts
        self.names = tuple(self.weights)
        self.count = count
        self.pipeline = student.layout.pipeline > 1
        self.hidden: Tensor | float = 0.0
        self.teacher: Teacher | None = None
        if teacher is not None:
            pairs = self._pairs(student, teacher) if weighting.hidden else {}
            kept = (list(pairs.values()), weighting.distillation > 0)
            if teacher is student:
                assert draw is not None
                self.teacher = OwnTeacher(student, draw, *kept)
            else:
                self.teacher = Teacher(teacher, *kept)
            self._watch(student, pairs)
            if student.chunks[-1].post_process:
                student.chunks[-1].output_layer.register_forward_hook(_straight_gradient)

    @staticmethod
    def _pairs(student: PrunableModel, teacher: PrunableModel) -> dict[int, int]:
        """Of this rank's layers, the student's -> the teacher's."""
        first, layers = student.first_layer(0), student.config.num_layers
        own = range(first, first + len(student.chunks[0].decoder.layers))
        return {layer: teacher_layer(layer, layers, teacher.config.num_layers) for layer in own}

    def _watch(self, student: PrunableModel, pairs: dict[int, int]) -> None:
        """Give the student's layers the distance to the teacher's as a loss of their own."""
        chunk = student.chunks[0]
        for layer, other in pairs.items():
            module = chunk.decoder.layers[layer - student.first_layer(0)]
            module.register_forward_hook(partial(self._add_distance, 1 / student.config.num_layers, other))

    def _add_distance(self, share: float, other: int, module: Any, _inputs: Any, output: Any) -> Any:
        assert self.teacher is not None
        if not module.training:
            return None
        x, *rest = output
        tp = parallel_state.get_tensor_model_parallel_world_size()
        shared = tp if module.config.sequence_parallel else 1
        distance = (
            hidden_distance(x, self.teacher.outputs[other].popleft(), self.weighting.hidden_kind) * share / shared
        )
        if shared > 1 or parallel_state.get_tensor_model_parallel_rank() == 0:
            self.hidden = self.hidden + distance.detach()
        return AddLoss.apply(x, distance, self.weighting.hidden / self.count), *rest

    def begin(self, batches: Iterator[Tensor], count: int) -> None:
        """In a pipeline the teacher reads the whole step first."""
        if self.teacher is not None and self.pipeline:
            self._read(batches, count)

    def _read(self, batches: Iterator[Tensor], count: int) -> None:
        assert self.teacher is not None
        first = next(batches)
        shape = (first.shape[0], first.shape[1] - 1)
        self.teacher.read((each for part in ([first], batches) for each in part), count, shape)

    def forward(self, model: Any, windows: Tensor) -> tuple[Tensor, LossFunction]:
        """As the base class."""
        if self.teacher is not None and not self.pipeline:
            self._read(iter([windows]), 1)
        tokens, positions, labels = micro_batch(windows)
        if self.weighting.distillation:
            return model(tokens, positions, None), partial(self._from_logits, labels)
        return model(tokens, positions, None, labels=labels), lambda losses: self._summed({"lm_loss": losses})

    def _from_logits(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The last stage's losses, from logits `[b, s / cp, vocab / tp]`."""
        assert self.teacher is not None
        group = parallel_state.get_tensor_model_parallel_group()
        losses = {"distillation_loss": divergence(logits, self.teacher.logits(), self.weighting.temperature, group)}
        if self.weighting.lm:  # megatron-core's loss overwrites float32 logits
            losses["lm_loss"] = vocab_parallel_cross_entropy(logits.to(torch.float32, copy=True), labels)
        return self._summed(losses)

    def _summed(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """From losses of each token `[b, s / cp]`."""
        means = {name: mean_part(loss) for name, loss in losses.items()}
        total = torch.stack([self.weights.get(name, 0.0) * mean for name, mean in means.items()]).sum()
        return total, {name: mean.detach() * context.size() for name, mean in means.items()}

    def elsewhere(self) -> dict[str, float]:
        """Distances of hidden states are added up on all stages."""
        if not self.weighting.hidden:
            return {}
        found, self.hidden = self.hidden, 0.0
        return {"hidden_loss": float(found)}

    def total(self, losses: dict[str, float]) -> float:
        """The weighted sum."""
        return self.weighting.total(losses)


class RecoveryRunner(TrainingSession):
    """Trains all weights, or adapters, of a model whose zeros stay."""

    model: PrunableModel

    def recover(
        self,
        weighting: Weighting,
        teacher: PrunableModel | None,
        adapters: Adapters | None,
        targets: Sequence[str],
        keep_zeros: bool,
    ) -> int | None:
        """Train; the model then has its final weights. The number of kept zeros, None when they are not kept."""
        zeros = self.zeros = Zeros(self.model) if keep_zeros else None
        adapted: list[LocalLinear] = add_adapters(self.model, adapters, targets) if adapters else []
        t = self.training
        trainer = Trainer(
            self.model,
            t,
            self.data,
            objective=RecoveryLoss(self.model, weighting, teacher, t.num_microbatches(self.model.layout.data)),
            before_update=zeros.clear_gradients if zeros and not adapters else lambda: None,
        )
        if not adapters:
            self.flops = 3 * forward_flops(self.model.config, t.seq_length)
        if teacher:
            self.flops += forward_flops(teacher.config, t.seq_length)

        def on_step(step: int, steps: int) -> dict[str, float]:
            if adapters:
                adapters.step = step
            return {}

        self.take_steps(trainer, on_step)
        merge_adapters(adapted)
        return zeros.check("in the final weights") if zeros else None

    def check_state(self, when: str) -> dict[str, float]:
        """The zeros, counted, where there are any."""
        return counted(self.zeros, when)
