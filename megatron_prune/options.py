"""What a configuration field is: a default, a sentence of help, a range and a flag, declared in one place.

Every verb's configuration is a frozen dataclass made of such fields and of groups of them. A field's *key* is
its YAML name (`calibration_samples`) and, with hyphens, its flag (`--calibration-samples`); keys are flat and
unique inside a verb, groups only order the help text and the code.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from megatron_prune.errors import UserError, brief
from megatron_prune.files import write_text
from megatron_prune.foreign import check_name

MayExist = Literal["never", "resumed", "always"]
REQUIRED = dataclasses.MISSING
"""Default of a field that the user must give."""
LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, 1e100
"""Of any number, whatever its own bounds."""


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    key: str | None = None,
) -> Any:
    """A dataclass field: `help` says what it is, with unit and scope; bounds are checked when it is set."""
    metadata = {"help": help, "at_least": at_least, "above": above, "at_most": at_most, "below": below, "key": key}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def same_as(config: type[Options], name: str, help: str | None = None) -> Any:
    """A dataclass field with the default, the bounds and, unless given, the help of another configuration's field."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    words = {"help": help or field.metadata["help"], "key": None}
    return dataclasses.field(default=field.default, metadata={**field.metadata, **words})


@dataclasses.dataclass(frozen=True)
class Share:
    """A default that is a share of another option's value, whatever that is; rounded down where both count."""

    of: str
    """The other option's key."""
    part: float

    def __str__(self) -> str:
        return f"{self.part} x {flag(self.of)}"

    def value(self, whole: float) -> float:
        """That share."""
        return int(whole * self.part) if isinstance(whole, int) else whole * self.part


def group(kind: type) -> Any:
    """A dataclass field that holds a group of options, all at their defaults unless given."""
    return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every configuration: checks the range of each field; a value outside is a `UserError`."""

    positional: ClassVar[tuple[str, ...]] = ("input", "output")
    """Keys of options whose values may stand right behind the verb without their names, in this order, one each (one
    that takes several takes all); of the usual two those that are required.
    """
    basic: ClassVar[tuple[str, ...]] = ()
    """Keys of the options that help shows beside those that are required, in this order; none named: all of them."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Of what may stand behind the verb."""
    output_may_exist: ClassVar[MayExist] = "never"
    """Whether there may be something at `output`: only where a run goes on; or the verb looks for itself."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "help" in field.metadata:
                check_value(field_key(field), getattr(self, field.name), field.metadata)

    def idle(self) -> Mapping[str, str]:
        """Keys that have no effect with the values of the others -> those, in words; groups say their own."""
        return {}


def check_value(key: str, value: Any, bounds: Any) -> None:
    """Raises a `UserError` for a number, in a list too, outside the bounds, and for text that no file can be named."""
    if isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            check_value(key, part, bounds)
    elif isinstance(value, str | Path):
        try:
            check_name(str(value))
        except ValueError as error:
            raise UserError(f"{flag(key)}: {error}; allowed: text that can name a file") from None
    else:
        check_range(key, value, bounds)


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
"""The types of single values, in words."""


def check_kind(what: str, value: Any, kind: Any) -> None:
    """Raises a `UserError` for a value, given in Python, that is not of `kind`: one of `WORDS`, or of several."""
    allowed = [part for part in get_args(kind) or (kind,) if part in WORDS]
    exact = bool in allowed if isinstance(value, bool) else isinstance(value, tuple(allowed))
    whole = float in allowed and type(value) is int
    if allowed and not (exact or whole or (value is None and type(None) in get_args(kind))):
        raise UserError(f"{what}: {brief(value)} given; allowed: {' or '.join(WORDS[part] for part in allowed)}")


def check_range(key: str, value: Any, bounds: Any) -> None:
    """Raises a `UserError` naming the flag when a number is outside the bounds declared with `option`, or beyond those
    of all numbers.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, above, high, below = (bounds.get(name) for name in ("at_least", "above", "at_most", "below"))
    fits = (low is None or value >= low) and (above is None or value > above)
    fits = fits and (high is None or value <= high) and (below is None or value < below)
    most = LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
    if not fits or not -most <= value <= most:
        high = most if high is None and below is None and value > most else high
        words = [("at least", low), ("above", above), ("at most", high), ("below", below)]
        allowed = " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)
        raise UserError(f"{flag(key)}: {brief(value)} given; allowed: {allowed or 'a number'}")


def field_key(field: dataclasses.Field[Any]) -> str:
    """YAML name of a field."""
    return field.metadata.get("key") or field.name


def flag(key: str) -> str:
    """Command-line spelling of a key: `train_iters` -> `--train-iters`."""
    return "--" + key.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One option of a verb: where it sits in the configuration and how it is called."""

    key: str
    kind: Any
    field: dataclasses.Field[Any]
    path: tuple[str, ...]
    group: type[Options]

    @property
    def required(self) -> bool:
        return self.field.default is REQUIRED and self.field.default_factory is REQUIRED

    @property
    def default(self) -> Any:
        """Its value when it is not given; `REQUIRED` when it must be."""
        made = self.field.default_factory
        return self.field.default if made is REQUIRED else made()  # type: ignore[misc]


def entries(config: type[Options], path: tuple[str, ...] = ()) -> Iterator[Entry]:
    """All options of a configuration class, groups flattened, in the order of declaration."""
    kinds = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = kinds[field.name]
        if isinstance(kind, type) and issubclass(kind, Options):
            yield from entries(kind, (*path, field.name))
        else:
            yield Entry(field_key(field), kind, field, (*path, field.name), config)


def flatten(config: Options) -> dict[str, Any]:
    """Key -> plain value (str, number, bool, None, list, dict) of every option: what `config.yaml` holds."""
    values = {}
    for entry in entries(type(config)):
        value: Any = config
        for name in entry.path:
            value = getattr(value, name)
        values[entry.key] = _plain(value)
    return values


def given(config: Options) -> dict[str, Any]:
    """Key -> plain value of the options that differ from their defaults."""
    pairs = zip(entries(type(config)), flatten(config).values(), strict=True)
    return {entry.key: value for entry, value in pairs if entry.required or value != _plain(entry.default)}


def check_idle(config: Options) -> None:
    """UserError for options that were given and have no effect beside the others: nothing is ignored in silence."""
    groups = [
        value for field in dataclasses.fields(config) if isinstance(value := getattr(config, field.name), Options)
    ]
    for key, beside in {key: why for part in (config, *groups) for key, why in part.idle().items()}.items():
        if key in given(config):
            raise UserError(f"{flag(key)} was given and has no effect {beside}: leave it out")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


def save_yaml(config: Options, path: Path) -> None:
    """Writes the merged configuration so that `--config PATH` repeats the run."""
    import yaml

    write_text(path, yaml.safe_dump(flatten(config), sort_keys=False, allow_unicode=True))


def parse_documents(key: str, text: str | None) -> slice:
    """`None` = all documents, `"K"` = the first K, `"START:STOP"` = a range; a side may be left out."""
    if text is None:
        return slice(None)
    match = re.fullmatch(r"([0-9]{0,18}):([0-9]{0,18})|([0-9]{1,18})", text.strip())
    if match is None:
        raise UserError(f"{flag(key)}: {brief(text)} given; allowed: K (the first K documents) or START:STOP")
    start, stop, first = (int(part) if part else None for part in match.groups())
    chosen = slice(start, first if first is not None else stop)
    if chosen.stop is not None and chosen.stop <= (chosen.start or 0):
        raise UserError(f"{flag(key)}: {brief(text)} given; that range holds no document")
    return chosen


_NUMBER = r"\s*[0-9]{1,18}(\.[0-9]{1,18})?\s*"


def parse_split(key: str, text: str | None) -> tuple[float, float, float]:
    """`"99,1"` or `"98,1,1"`: parts for training, held out and left out, of any sum; `None` = all for training."""
    if text is None:
        return (1.0, 0.0, 0.0)
    if re.fullmatch(_NUMBER + f"(,{_NUMBER}){{0,2}}", text) is None:
        raise UserError(f"{flag(key)}: {brief(text)} given; allowed: two or three numbers such as 99,1")
    train, held_out, unused = [*map(float, text.split(",")), 0.0, 0.0][:3]
    if not train:
        raise UserError(f"{flag(key)}: {brief(text)} given; the first part, for training, must be above 0")
    return (train, held_out, unused)
