"""Text -> Megatron's `PREFIX.bin` and `PREFIX.idx`, by several processes.

The input is cut into parts that do not depend on the number of processes. A worker turns one part into a small indexed
data set with megatron-core's own builder; a finished part appears in the work folder `PREFIX.partial` whole or not at
all, so that a run that was killed does only the unfinished parts again. Finished parts are joined in the order of the
input: the result is that of one builder fed serially. Until then they need the size of the output twice. A run that is
refused removes the work folder; one that a full disk ends, only while no part is finished.
`PREFIX.json` beside the output says what it was made from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import megatron_prune.backend  # noqa: F401  # isort: skip  (before megatron.core)
import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder, _IndexWriter

from megatron_prune.claims import PARTIAL, Claim, claimed, refuse_existing
from megatron_prune.config import PreprocessConfig
from megatron_prune.data.about import Report, read_report
from megatron_prune.data.encoder import Encoder, load_encoder
from megatron_prune.data.indexed import CHECKED
from megatron_prune.data.pieces import HUB, Piece, cut, gather, lines_before, read
from megatron_prune.data.text import BadDocument, OverLimit
from megatron_prune.data.workers import Count, run_forked
from megatron_prune.errors import Interrupted, UserError
from megatron_prune.files import checksum, give_name, new_folder, write_json
from megatron_prune.foreign import read_json, strict
from megatron_prune.log import progress, say

PART_BYTES = 8 * 2**20
"""Bytes of plain text in a part: what a kill can cost each worker. A gzip file is one part."""
BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 512
LISTED = 100
"""Bad lines of one piece that are listed; all are counted."""
MOST_OVER = 20
"""Documents at the beginning of a piece that are over a limit, before the template is blamed and not they."""
ALL_OVER = "leave such rows out, give another model, or leave --apply-chat-template out"


SUFFIXES = (".bin", ".json", ".idx")
"""Files of the output in the order in which they appear: readers need the last."""
JOINED = "joined"
"""In the work folder: the complete output."""
MEGABYTE = 10**6


@dataclass
class Tally:
    """What one piece held."""

    __pydantic_config__ = strict()

    lines: int = 0
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    """Documents without a token, left out."""
    largest: int | None = None
    """Largest id, where there is a token and it was noted."""
    bad: int = 0
    listed: list[tuple[int, str]] = field(default_factory=list)
    """The first bad lines: number in the piece from 1, and what is wrong."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to make a part."""

    config: PreprocessConfig
    encoder: Encoder
    dtype: type
    parts: list[list[Piece]]

    def output(self, suffix: str) -> Path:
        """A file of the output, or its work folder."""
        return self.config.output.with_name(self.config.output.name + suffix)

    @property
    def work(self) -> Path:
        """Folder of the unfinished run."""
        return self.output(PARTIAL)

    def part(self, number: int) -> Path:
        """Folder of a finished part."""
        return self.work / "parts" / f"{number:06d}"

    @property
    def joined(self) -> Path:
        """Folder of the complete output, until its files get their names."""
        return self.work / JOINED


def preprocess(config: PreprocessConfig) -> Report:
    """Tokenise `config.input` into `config.output`, going on where a killed run stopped; what was made."""
    with claimed(config.output, may_exist=True) as claim:
        _refuse_finished(claim)
        encoder = load_encoder(config.tokenizer, config.json_key, config.apply_chat_template)
        if config.append_eod and encoder.end is None:
            raise UserError(f"--append-eod: {config.tokenizer} has no end-of-text token; set it, or leave this out")
        pieces = [piece for source in config.input for piece in cut(source, PART_BYTES, encoder.form)]
        job = Job(config, encoder, DType.optimal_dtype(encoder.vocab_size), gather(pieces, PART_BYTES))
        _open_work(job, claim)
        try:
            if not job.joined.exists():
                _make_parts(job)
                _join(job)
            _publish(job)
        except (UserError, OSError) as error:
            if not isinstance(error, Interrupted) or not _finished_parts(job):
                shutil.rmtree(job.work, ignore_errors=True)
                raise
            raise Interrupted(f"{error}; finished parts stay in {job.work}: go on with the same command") from error
    return read_report(job.output(".json"))


def _finished_parts(job: Job) -> bool:
    return any(job.part(number).exists() for number in range(len(job.parts)))


def _refuse_finished(claim: Claim) -> None:
    """An output is never overwritten; a file that this run itself named before it was killed is its own."""
    joined = claim.partial / JOINED
    for suffix in SUFFIXES:
        if not joined.exists() or (joined / f"tokens{suffix}").exists():
            refuse_existing(claim.path.with_name(claim.path.name + suffix))


def _open_work(job: Job, claim: Claim) -> None:
    """The work folder, new or a killed run's, which must be a run of the same."""
    if job.work.exists():
        return _check_plan(job)
    job.work.mkdir(parents=True)
    try:
        claim.note_partial()
        _check_plan(job)
    except BaseException:
        shutil.rmtree(job.work)
        raise
    return None


def _check_plan(job: Job) -> None:
    """What is in the work folder must come from the same input, tokenizer and options; a new folder records them."""
    files = [Path(source) for source in job.config.input if not source.startswith(HUB)]
    plan = {
        "input": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "parts": [[[piece.source, piece.start, piece.stop] for piece in part] for part in job.parts],
        "tokenizer": job.encoder.sha256,
        "append_eod": job.config.append_eod,
        "json_key": job.config.json_key,
        **_template(job),
    }
    file = job.work / "plan.json"
    if not file.exists():
        write_json(file, plan)
        return
    found = read_json(file, "an unfinished preprocess run")
    changed = [key for key in plan if plan[key] != found.get(key)]
    if changed:
        raise UserError(
            f"{job.work} holds an unfinished run with other {' and '.join(changed)}; give what that run was given to"
            " finish it, or remove that folder"
        )


# --- parts ---


def _make_parts(job: Job) -> None:
    """Make the parts that are missing, `workers` at a time, with a progress bar over the bytes of the input."""
    sizes = {number: sum(piece.size for piece in part) for number, part in enumerate(job.parts)}
    missing = [number for number in sizes if not job.part(number).exists()]
    done = sum(sizes.values()) - sum(sizes[number] for number in missing)
    if len(missing) < len(sizes):
        say(f"going on: {len(sizes) - len(missing)} of {len(sizes)} parts are done")
    limit = job.config.workers or len(os.sched_getaffinity(0))
    threads = max(1, limit // max(len(missing), 1))

    def work(number: int, count: Count) -> None:
        job.encoder.use_threads(threads)
        _make_part(job, number, count)

    shown = 0
    with progress("preprocess", -(-sum(sizes.values()) // MEGABYTE), "MB") as advance:
        for read_bytes in run_forked(work, missing, limit):
            now = -(-(done + read_bytes) // MEGABYTE)
            if now > shown:
                advance(now - shown)
            shown = now


def _make_part(job: Job, number: int, count: Count) -> None:
    with new_folder(job.part(number)) as folder:
        builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=job.dtype)
        tallies = [_encode(job, piece, builder, count) for piece in job.parts[number]]
        builder.finalize(str(folder / "tokens.idx"))
        write_json(folder / "tallies.json", [asdict(tally) for tally in tallies])


def _encode(job: Job, piece: Piece, builder: Any, count: Count) -> Tally:
    """Tokenise one piece into `builder`."""
    tally = Tally()
    end = job.encoder.end if job.config.append_eod else None
    for texts in _batches(job, piece, tally, count):
        for ids in job.encoder.encode(texts):
            if end is not None and ids and ids[-1] != end:
                ids.append(end)
            if ids:
                tally.largest = max(tally.largest or 0, max(ids))
                builder.add_document(ids, [len(ids)])
            tally.documents += bool(ids)
            tally.empty += not ids
            tally.tokens += len(ids)
    return tally


def _batches(job: Job, piece: Piece, tally: Tally, count: Count) -> Iterator[list[str]]:
    """Texts of a piece, some at a time; bad lines are counted into `tally`."""
    texts: list[str] = []
    characters = told = good = over = 0
    consumed = _Sum()
    for number, text in read(piece, job.encoder.form, consumed.add):
        tally.lines = number
        if isinstance(text, BadDocument):
            _count_bad(job, piece, tally, str(text))
            over += isinstance(text, OverLimit)
            if over == MOST_OVER and not good:
                raise UserError(
                    f"{_place(piece, tally)}: {text}, as for {over} in a row without a good one; {ALL_OVER}"
                )
        elif text is not None:
            good += 1
            texts.append(text)
            characters += len(text)
        if characters >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield texts
            count(consumed.total - told)
            texts, characters, told = [], 0, consumed.total
    yield texts
    count(consumed.total - told)


class _Sum:
    """Bytes read so far."""

    total = 0

    def add(self, number: int) -> None:
        self.total += number


def _count_bad(job: Job, piece: Piece, tally: Tally, reason: str) -> None:
    if job.config.strict:
        raise UserError(f"{_place(piece, tally)}: {reason}")
    tally.bad += 1
    if len(tally.listed) < LISTED:
        tally.listed.append((tally.lines, reason))


def _place(piece: Piece, tally: Tally) -> str:
    """Where the last line that was read stands."""
    return f"{piece.source}:{lines_before(piece) + tally.lines}"


# --- the whole ---


class _Index(_IndexWriter):
    """Megatron's index file, its pointers computed at once: one number at a time is slow for 10^8 documents."""

    def _sequence_pointers(self, sequence_lengths: np.ndarray) -> np.ndarray:
        """Byte offset of each document, int64 [documents]."""
        ends = np.cumsum(sequence_lengths, dtype=np.int64)
        return (ends - sequence_lengths) * DType.size(self.dtype)


def _join(job: Job) -> None:
    """All parts in order -> `joined/tokens.bin`, `.idx` and `.json`."""
    report = _report(job)
    if job.config.strict and report["listed_bad_lines"]:
        raise UserError(report["listed_bad_lines"][0])
    if not report["documents"]:
        first = (report["listed_bad_lines"] or ["all lines are empty"])[0]
        raise UserError(f"--input: no document found ({first}); check the files and --json-key")
    filled = [number for number in range(len(job.parts)) if (job.part(number) / "tokens.bin").stat().st_size]
    with new_folder(job.joined) as folder:
        with (folder / "tokens.bin").open("wb") as whole:
            for number in filled:
                with (job.part(number) / "tokens.bin").open("rb") as part:
                    shutil.copyfileobj(part, whole, 16 * 2**20)
        lengths = np.concatenate([_lengths(job.part(number)) for number in filled])
        with _Index(str(folder / "tokens.idx"), job.dtype) as index:
            index.write(lengths, None, np.arange(len(lengths) + 1))
        checksums = {suffix: checksum(folder / f"tokens{suffix}") for suffix in CHECKED}
        write_json(folder / "tokens.json", {**report, "crc32": checksums})


def _lengths(part: Path) -> np.ndarray:
    """Tokens in each document of a part, int32. The array is a view of a file that closes with the data set."""
    dataset = IndexedDataset(str(part / "tokens"))
    return dataset.sequence_lengths.copy()


def _report(job: Job) -> dict[str, Any]:
    """What the output holds and was made from; bad lines with file and line."""
    tallies = [pair for number in range(len(job.parts)) for pair in _tallies(job, number)]
    return {
        "documents": sum(tally.documents for _, tally in tallies),
        "tokens": sum(tally.tokens for _, tally in tallies),
        "empty_documents": sum(tally.empty for _, tally in tallies),
        "bad_lines": sum(tally.bad for _, tally in tallies),
        "listed_bad_lines": list(_places(tallies)),
        "input": list(job.config.input),
        "vocab_size": job.encoder.vocab_size,
        "largest_id": _largest([tally for _, tally in tallies]),
        "end_of_text": job.encoder.end,
        "tokenizer_sha256": job.encoder.sha256,
        "append_eod": job.config.append_eod,
        "dtype": job.dtype.__name__,
        **_template(job),
    }


def _template(job: Job) -> dict[str, str]:
    """What has made conversations text, where something has."""
    return {} if job.encoder.chat_template is None else {"chat_template_sha256": job.encoder.chat_template}


def _largest(tallies: list[Tally]) -> int | None:
    """The largest id of the whole; None when a part, from before ids were noted, does not say its own."""
    found = [tally.largest for tally in tallies if tally.tokens]
    known = [largest for largest in found if largest is not None]
    return max(known) if known and len(known) == len(found) else None


def _tallies(job: Job, number: int) -> list[tuple[Piece, Tally]]:
    """What each piece of a part held."""
    part, file = job.parts[number], job.part(number) / "tallies.json"
    found: list[Tally] = read_json(file, "a finished part", list[Tally])
    if len(found) != len(part):
        raise UserError(f"{file} is damaged ({len(found)} pieces instead of {len(part)}); remove {job.part(number)}")
    return list(zip(part, found, strict=True))


def _places(tallies: list[tuple[Piece, Tally]]) -> Iterator[str]:
    """`file:line: reason` of the listed bad lines; a file's pieces follow each other."""
    before, last = 0, None
    for piece, tally in tallies:
        if piece.name != last or piece.start == 0:
            before = 0
        yield from (f"{piece.name}:{before + line}: {reason}" for line, reason in tally.listed)
        before, last = before + tally.lines, piece.name


def _publish(job: Job) -> None:
    """Give the joined files their names, and remove the work folder."""
    named: list[str] = []
    try:
        for suffix in SUFFIXES:
            if (job.joined / f"tokens{suffix}").exists():
                give_name(job.joined / f"tokens{suffix}", job.output(suffix))
                named.append(suffix)
    except (UserError, OSError):
        for suffix in named:
            os.rename(job.output(suffix), job.joined / f"tokens{suffix}")
        raise
    shutil.rmtree(job.work / "parts", ignore_errors=True)
    shutil.rmtree(job.work)
