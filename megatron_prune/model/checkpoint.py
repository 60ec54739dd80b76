"""Megatron checkpoints: any layout saved, any layout loaded, atomic, checked for completeness on load.

A model checkpoint is a folder

    megatron_prune.json   what it is: model shape (and the Hugging Face config it came from), dtype, where from
    tokenizer/            the tokenizer's files
    weights/              megatron-core's distributed checkpoint (torch_dist), and checksums.json, CRC-32 of its files
    checksums.json        CRC-32 of megatron_prune.json and of the tokenizer's files
    manifest.json         size of every file above: a truncated copy is found before it is read

Whoever loads a model compares all checksums first; a file that has changed since it was written is the user's error.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_prune.data.tokenizer_files import copy_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.files import checksum, new_folder, write_json, writing
from megatron_prune.foreign import quiet, read_json, reason
from megatron_prune.model.build import DTYPES, build_model
from megatron_prune.model.cost import parameters
from megatron_prune.model.description import ZEROS, Description, read_description
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.model.sizes import ModelConfig
from megatron_prune.model.summary import Zeros
from megatron_prune.model.untrusted import causes, check_format, load, read_table
from megatron_prune.ranks import ROOM, by_leader
from megatron_prune.schema import Bytes, Crc32, RelativeName

MOST_PADDING = 4096
"""Rows that two layouts may differ by where rows are the vocabulary: each pads it to a multiple of its own size."""
MANIFEST = "manifest.json"
CHECKSUMS = "checksums.json"
READERS = 4
"""Files whose checksums a process computes at once."""
GATED = "megatron.core.transformer.mlp"
"""Where megatron-core splits the rows of a gated MLP into two halves, and puts them together again."""
_WHAT = "a megatron_prune checkpoint"


def metadata() -> dict[str, Any]:
    """What megatron-core's sharded_state_dict must be told about the process groups."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


class ShardedSave:
    """A sharded state dict on its way into an existing empty folder. Made and finished by all ranks.

    Each rank's tensors are written by a thread of its own: in the background from a copy of them, if asked for, so that
    training can go on. Nothing runs in other processes, so a killed run leaves no writer behind.
    """

    def __init__(self, folder: Path, state: dict[str, Any], in_background: bool = False) -> None:
        self.folder = folder
        with writing(folder):
            work, self._finalize = self._prepare(state, in_background)
        writer = ThreadPoolExecutor(1)
        self._written = writer.submit(work)
        writer.shutdown(wait=False)

    def _prepare(
        self, state: dict[str, Any], in_background: bool
    ) -> tuple[Callable[[], dict[str, str]], Callable[[], None]]:
        """What the thread does, which gives the checksums of this rank's files, and what all ranks do after it."""
        # Through this queue megatron-core learns what was written; its own is a process that starts python again.
        filesystem_async._results_queue = queue.Queue()
        request = dist_checkpointing.save(
            state, str(self.folder), sharded_strategy=_strategy(state), async_sharded_save=True, **backend.OWN_WRITER
        )
        copy = in_background and not backend.has_cuda()  # tensors of a GPU become copies, others are made for this
        buckets = _on_host(_buckets(request), copy)

        def finalize() -> None:
            for each in request.finalize_fns:
                each()

        return partial(_write, request, buckets), finalize

    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return not self._written.done()

    def finish(self) -> None:
        """Wait for the files, then add checksums and sizes. Collective.

        When one rank could not write, every rank raises: UserError for what the file system refused.
        """
        error = self._written.exception()
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, str(error) if error else self._written.result())
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)}
        if error is not None and not isinstance(error, OSError):
            raise error
        if failed:
            told = "; ".join(f"process {rank}: {text}" for rank, text in failed.items())
            raise UserError(
                f"checkpoint {self.folder} could not be written ({told}); earlier checkpoints are untouched: "
                f"make room or {ROOM}, then start again, a training run with --resume"
            )
        self._finalize()
        by_leader(lambda: self._write_checksums({name: value for found in outcomes for name, value in found.items()}))

    def _write_checksums(self, checksums: dict[str, str]) -> None:
        """Beside those of the data files, which their writers have read back, those of what megatron-core added."""
        rest = [path for path in self.folder.iterdir() if path.name not in checksums]
        write_json(self.folder / CHECKSUMS, checksums | {path.name: checksum(path) for path in rest})


def stand_in(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """What this rank puts into a sharded state for a tensor of `shape` that another rank has and writes: no memory."""
    return tensor.new_empty(1).expand(shape)


def _is_stand_in(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() > 1 and not any(tensor.stride())


def _strategy(state: dict[str, Any]) -> Any:
    """megatron-core's way to write: every replica of the model writes its share of what all of them have.

    Where some tensor is on one of them alone (`stand_in`), each is written from where it is. Collective.
    """
    kinds = (ShardedTensor, ShardedTensorFactory)
    elsewhere = any(_is_stand_in(value.data) for value in nested_values(state) if isinstance(value, kinds))
    found = torch.tensor(int(elsewhere), device=backend.device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    group = metadata()["dp_cp_group"]
    if found or dist.get_world_size(group) == 1:
        return ("torch_dist", 1)
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), group)


def _buckets(request: Any) -> list[Any]:
    """What this rank has to write: (path, key, (bytes, tensors)) for each file."""
    return request.async_fn_args[1] if request.async_fn is not None else []


def _on_host(buckets: list[Any], copy: bool) -> list[Any]:
    """The same in the memory of the host; copied, it stays what it is while training changes the tensors."""
    return [
        (path, key, (data, [(item, tensor.detach().to("cpu", copy=copy)) for item, tensor in tensors]))
        for path, key, (data, tensors) in buckets
    ]


def refusal(error: BaseException) -> OSError | None:
    """What the file system refused, where PyTorch's zip writer fails on its own end after that."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found


def _write(request: Any, buckets: list[Any]) -> dict[str, str]:
    """Write this rank's files durably and read them back for their checksums, by name."""
    if not buckets:
        return {}
    outcomes: queue.Queue[Any] = queue.Queue()
    unfinished: queue.Queue[int] = queue.Queue()
    for number, bucket in enumerate(buckets):
        unfinished.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            request.async_fn.args[0], number, bucket, outcomes, unfinished, use_fsync=True
        )
    results = dict(outcomes.get_nowait() for _ in buckets)
    for result in results.values():
        if isinstance(result, Exception):
            raise refusal(result) or result
    request.async_fn_args[2].put(results)
    return {Path(path).name: checksum(Path(path)) for path, _key, _data in buckets}


def load_sharded(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Read a sharded state dict in the present layout; UserError when the folder is damaged or does not fit.

    Nothing in the folder is executed.
    """
    return load_model_state(folder, state, vocab_size=0)


def load_model_state(folder: Path, state: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """As `load_sharded`, of a model: what is padded has at least `vocab_size` rows.

    Nothing in the folder is executed.
    """

    for item in nested_values(state):
        if isinstance(item, ShardedTensorFactory) and item.merge_fn.__module__ == GATED:
            item.merge_fn = partial(_merged, item.merge_fn)

    def read(table: Metadata) -> dict[str, Any]:
        check_format(folder)
        _check_vocabulary_rows(folder, table, state, vocab_size)
        return load(state, folder, table)

    return read_safely(folder, read)


def _check_vocabulary_rows(folder: Path, table: Metadata, state: dict[str, Any], vocab_size: int) -> None:
    """UserError when a tensor whose rows are the vocabulary is stored in a shape that no padding explains.

    megatron-core reads such a tensor whatever its shape, since padding differs from layout to layout, and leaves the
    rows that are not there as they were. All other shapes it compares itself.
    """
    for item in nested_values(state):
        if not isinstance(item, ShardedTensor) or not item.allow_shape_mismatch:
            continue
        stored = table.state_dict_metadata.get(item.key)
        size = tuple(getattr(stored, "size", ()))
        rows, *rest = item.global_shape
        fits = bool(size) and size[1:] == tuple(rest) and vocab_size <= size[0] and abs(size[0] - rows) <= MOST_PADDING
        if not fits:
            raise UserError(
                f"checkpoint {folder}: {item.key} is stored as {list(size)} and the model needs {[rows, *rest]}, "
                "padding apart; it is damaged or belongs to another model: use another checkpoint"
            )


def _merged(merge: Callable[[list[Tensor]], Tensor], halves: list[Tensor]) -> Tensor:
    """Gate and up halves as one tensor: that which they were read into when they still lie side by side there."""
    first, second = halves
    whole = (len(first) + len(second), *first.shape[1:])
    beside = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() and (
        second.storage_offset() == first.storage_offset() + first.numel()
    )
    if beside and first.is_contiguous() and second.is_contiguous() and first.shape[1:] == second.shape[1:]:
        return first.as_strided(whole, first.stride())
    return merge(halves)


def read_safely(folder: Path, read: Callable[[Metadata], dict[str, Any]]) -> dict[str, Any]:
    """What `read` makes of a distributed checkpoint by its table; UserError when it cannot. Logs are quiet."""
    try:
        with quiet():
            return read(read_table(folder))
    except (Exception, CheckpointException) as error:  # the second is a BaseException, and wraps those of all processes
        first = next(causes(error))
        if isinstance(first, UserError):
            raise UserError(str(first)) from None
        raise UserError(
            f"checkpoint {folder} cannot be read ({type(first).__name__}: {reason(first)}); it is damaged or belongs "
            "to another model: use another checkpoint"
        ) from error


def write_manifest(folder: Path) -> None:
    """Record the size of every file below `folder`."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / MANIFEST, sizes)


def check_manifest(folder: Path) -> None:
    """UserError when a file of a checkpoint is missing or has another size than when it was written."""
    damage = _damaged_sizes(folder)
    if damage:
        raise UserError(f"checkpoint {folder} is damaged: {damage[0]}; copy it again or use another checkpoint")


def _damaged_sizes(folder: Path) -> list[str]:
    told = []
    for name, size in read_json(folder / MANIFEST, _WHAT, dict[RelativeName, Bytes]).items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            told.append(f"{name} " + ("is missing" if found is None else f"has {found} bytes instead of {size}"))
    return told


def damage_of(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: file by file, sizes and checksums. Collective: ranks share the reading.

    Every rank gets the same answer; no answer means that the checkpoint is whole.
    """
    mine: list[str] = []
    try:
        sizes = read_json(folder / MANIFEST, _WHAT, dict[RelativeName, Bytes])
        checksums = read_json(folder / CHECKSUMS, _WHAT, dict[RelativeName, Crc32])
        if set(sizes) != {*checksums, CHECKSUMS}:
            mine.append(f"{MANIFEST} and {CHECKSUMS} name other files")
        mine += _damaged_sizes(folder)
        if not mine:
            names = sorted(checksums)[backend.rank() :: backend.world_size()]
            mine += _changed(folder, {name: checksums[name] for name in names})
    except (UserError, OSError) as error:
        mine.append(str(error))
    return _everybodys(mine)


def _changed(folder: Path, checksums: dict[str, str]) -> list[str]:
    """Which of these files are not what they were; several are read at once."""
    odd = [name for name in checksums if not (folder / name).is_file()]
    if odd:
        return [f"{name} is no file of it" for name in odd]
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(lambda name: checksum(folder / name), checksums))
    same = zip(checksums, found, checksums.values(), strict=True)
    return [f"{name} has changed since it was written" for name, now, then in same if now != then]


def _everybodys(mine: list[str]) -> list[str]:
    """What any rank has found, each thing once. Collective."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return list(dict.fromkeys(text for told in everybody for text in told))


def check_model(path: Path) -> None:
    """UserError when a file of a model checkpoint is missing or has changed. Collective: ranks share the reading."""
    check_manifest(path)
    mine: list[str] = []
    for folder in (path, path / "weights"):
        if (folder / CHECKSUMS).is_file():  # of the folder above weights earlier versions wrote none
            checksums = read_json(folder / CHECKSUMS, _WHAT, dict[RelativeName, Crc32])
            names = sorted(checksums)[backend.rank() :: backend.world_size()]
            mine += _changed(folder, {name: checksums[name] for name in names})
    damage = _everybodys(mine)
    if damage:
        raise UserError(f"checkpoint {path} is damaged: {damage[0]}; copy it again or use another checkpoint")


def save_model(path: Path, model: PrunableModel, source: dict[str, Any], tokenizer: Path) -> Zeros:
    """Write a model checkpoint from any layout, with the tokenizer's files in the folder `tokenizer`; its zeros.

    Collective; `path` must not exist.
    """
    zeros = model.zeros()
    with new_folder(path) as folder:
        if backend.rank() == 0:
            Description(model.config, {**source, ZEROS: list(zeros)}).write(folder)
            (folder / "tokenizer").mkdir()
            copy_tokenizer(tokenizer, folder / "tokenizer")
            (folder / "weights").mkdir()
        dist.barrier()
        ShardedSave(folder / "weights", _weights_only(model)).finish()
        if backend.rank() == 0:
            places = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
            others = [place for place in places if place.parts[0] != "weights"]
            write_json(folder / CHECKSUMS, {str(place): checksum(folder / place) for place in others})
            write_manifest(folder)
    return zeros


def _weights_only(model: PrunableModel) -> dict[str, Any]:
    return {f"chunk{number}": _weights_of(chunk) for number, chunk in enumerate(model.chunks)}


def _weights_of(chunk: Any) -> dict[str, Any]:
    """Without `_extra_state`, which some versions of Transformer Engine have and other machines do not."""
    state = chunk.sharded_state_dict(metadata=metadata())
    return {key: value for key, value in state.items() if "mask_logits" not in key and "_extra_state" not in key}


def compute_dtype(name: str) -> torch.dtype:
    """The torch type of a dtype name; UserError for one that models cannot have here."""
    if name not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise UserError(
            f"weights of type {name} are not supported; allowed are {allowed}: give --dtype bfloat16 to import"
        )
    return DTYPES[name]


def _check_size(path: Path, config: ModelConfig) -> None:
    """UserError when the files cannot hold so many weights: before memory is asked for them."""
    held, wanted = sum(file.stat().st_size for file in (path / "weights").glob("*.distcp")), parameters(config)
    if wanted > held:
        raise UserError(
            f"checkpoint {path} does not fit its own description: a model of {wanted} parameters, and {held} bytes of "
            "weights; restore its megatron_prune.json"
        )


def load_model(path: Path, layout: backend.Layout, dtype: str | None = None, **extra: Any) -> PrunableModel:
    """The model of a checkpoint in `layout`; `dtype` overrides the stored type. Collective."""
    description = read_description(path)
    check_model(path)
    config = description.config
    _check_size(path, config)
    prunable = PrunableModel(config, layout, build_model(config, layout, compute_dtype(dtype or config.dtype), **extra))
    state = load_model_state(path / "weights", _weights_only(prunable), config.vocab_size)
    for number, chunk in enumerate(prunable.chunks):
        missing = chunk.load_state_dict(state[f"chunk{number}"], strict=False)
        absent = [key for key in missing.missing_keys if "_extra_state" not in key and "mask_logits" not in key]
        if absent or missing.unexpected_keys:
            raise UserError(f"checkpoint {path} does not fit its own description: {absent + missing.unexpected_keys}")
    return prunable
