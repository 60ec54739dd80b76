"""What `PREFIX.json` says of preprocessed text; read without megatron-core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from megatron_prune.foreign import read_json
from megatron_prune.schema import Count, Crc32

_Id = Annotated[int, Field(ge=0, lt=2**31)]


class _Ids(TypedDict):
    """What is said of the ids."""

    vocab_size: NotRequired[_Id]
    largest_id: NotRequired[_Id | None]
    """Of the ids written; older files do not say."""
    end_of_text: NotRequired[_Id | None]
    crc32: NotRequired[dict[str, Crc32]]
    """Of the files beside it, by suffix; older files do not say."""


class About(_Ids):
    """What training reads of it; the rest is for people."""

    documents: NotRequired[Count]
    tokens: NotRequired[Count]
    dtype: NotRequired[str]
    """numpy's name of the type of the ids."""


class Report(_Ids):
    """What `preprocess` tells of it when it ends."""

    documents: Count
    tokens: Count
    bad_lines: Count
    listed_bad_lines: list[str]
    dtype: str


def read_about(file: Path) -> About:
    """What the text was made from; UserError for a file that `preprocess` has not written."""
    found: About = read_json(file, "preprocessed text", About)
    return found


def read_report(file: Path) -> Report:
    """The same with all that `preprocess` tells."""
    found: Report = read_json(file, "preprocessed text", Report)
    return found
