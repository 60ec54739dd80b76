"""Parts of schemas of files: what names, sizes and sums in them may be. See `foreign.read_json`."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from megatron_prune.foreign import check_name

MOST_BYTES = 2**60
"""Of a file; beyond any disk."""


def relative_name(text: str) -> str:
    """`text`, when it names something below the folder that it stands in; otherwise ValueError."""
    path = PurePosixPath(check_name(text))
    if not text or path.is_absolute() or ".." in path.parts or str(path) != text or len(text) > 1000:
        raise ValueError("a name below this folder is allowed, such as weights/a.bin")
    return text


RelativeName = Annotated[str, AfterValidator(relative_name)]
"""Of a file below the folder that the naming file stands in."""
Word = Annotated[str, Field(min_length=1, max_length=1000)]
"""A name of something that is no file."""
PathText = Annotated[str, Field(min_length=1, max_length=4096)]
"""A path, as long as Linux has them."""
TargetText = Annotated[str, Field(min_length=1, max_length=5_000_000)]
"""A target in words, which may name every weight of a mixture of experts."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Crc32 = Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
Bytes = Annotated[int, Field(ge=0, le=MOST_BYTES)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Above0 = Annotated[int, Field(ge=1, le=2**63 - 1)]
Layer = Annotated[int, Field(ge=0, lt=10_000)]
"""Number of a decoder layer."""
Number = Annotated[float, Field(allow_inf_nan=False)]
Measured = Annotated[float, Field(allow_inf_nan=True)]
"""A figure that a run may have found to be infinite or no number."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Plain = dict[str, Any]
"""An object that is kept or shown, whatever is in it."""
