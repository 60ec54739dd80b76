"""Builds the project's small C kernels on first use and loads them with ctypes, and finds those in Triton. No build
step at installation: the C file is compiled by whatever compiler the machine has, tuned to its processor, and kept in
a cache whose file name is a hash of everything the result depends on. Where no compiler works the caller gets
None after one loud warning, and takes its slower PyTorch path."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

logger = logging.getLogger(__name__)

DISABLE_VARIABLE = "MEGATRON_PRUNE_COMPILED"
"""Set to 0 to use the PyTorch paths on purpose (no warning)."""

BUILD_TIMEOUT = 120
"""Seconds one compiler run may take."""

# No -ffast-math: kernels ask for reordered sums with `omp simd reduction` and keep IEEE meaning elsewhere.
BASE_FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")

# From best to worst; the text says what is lost.
VARIANTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("-march=native", "-fopenmp"), ""),
    (("-march=native", "-fopenmp-simd"), "without OpenMP, so one thread"),
    (("-fopenmp-simd",), "without OpenMP and without this processor's vector instructions"),
)


class BuildError(Exception):
    """One attempt to compile or load a kernel did not work; the message is the reason."""


def enabled() -> bool:
    """False when the user set MEGATRON_PRUNE_COMPILED=0."""
    return os.environ.get(DISABLE_VARIABLE, "1").strip().lower() not in ("0", "false", "no", "off")


def load_library(source: Path) -> ctypes.CDLL | None:
    """The shared library built from the C file `source`, or None.

    None means: disabled by MEGATRON_PRUNE_COMPILED=0 (no warning), or no compiler worked (one RuntimeWarning
    in the process). Calls into the library release the GIL. The result is remembered for the life of the
    process. Raises FileNotFoundError when `source` is missing.
    """
    return _load(source) if enabled() else None


@functools.cache
def _load(source: Path) -> ctypes.CDLL | None:
    text = source.read_bytes()
    commands = compilers()
    reasons = [] if commands else ["no C compiler found (looked for $CC, cc, gcc, clang and the ziglang wheel)"]
    for flags, loss in VARIANTS:
        for command in commands:
            try:
                library = _build_and_open(source, text, command, BASE_FLAGS + flags)
            except BuildError as error:
                reasons.append(str(error))
                continue
            if loss:
                logger.warning(
                    "%s was compiled by %s %s; earlier attempt: %s", source.name, command[0], loss, reasons[0]
                )
            return library
    _warn_once(reasons[0])
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"megatron-prune: compiled CPU kernels are not available ({reason}). Every CPU kernel falls back to "
        f"plain PyTorch, about twenty times slower for mask learning. Install a C compiler (for example "
        f"`apt install gcc` or `pip install ziglang`) or set CC; set {DISABLE_VARIABLE}=0 to accept the slow "
        f"path without this warning.",
        RuntimeWarning,
        stacklevel=4,
    )


def load_triton(module: str, work: str) -> ModuleType | None:
    """The module of this package that launches Triton kernels, or None.

    None means: disabled by MEGATRON_PRUNE_COMPILED=0 (no warning), or there is no triton package (one RuntimeWarning,
    which says that `work` by plain PyTorch).
    """
    return _load_triton(module, work) if enabled() else None


@functools.cache
def _load_triton(module: str, work: str) -> ModuleType | None:
    if importlib.util.find_spec("triton") is not None:
        return importlib.import_module(f"megatron_prune.kernels.{module}")
    warnings.warn(
        f"megatron-prune: the triton package is not installed, so {work} by plain PyTorch, many times slower: pip "
        f"install the triton that your PyTorch names, or set {DISABLE_VARIABLE}=0 to accept the slow path without "
        "this warning.",
        RuntimeWarning,
        stacklevel=4,
    )
    return None


def compilers() -> list[list[str]]:
    """Compiler commands to try, best first: $CC, cc, gcc, clang, then the optional ziglang wheel."""
    named = [shlex.split(os.environ["CC"])] if os.environ.get("CC", "").strip() else []
    candidates = named + [["cc"], ["gcc"], ["clang"]]
    if importlib.util.find_spec("ziglang") is not None:
        candidates.append([sys.executable, "-m", "ziglang", "cc"])
    return [command for command in candidates if _version(tuple(command)) is not None]


@functools.cache
def _version(command: tuple[str, ...]) -> str | None:
    """First line the compiler says about itself; None when it does not run."""
    try:
        result = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=BUILD_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return (result.stdout.splitlines() or [""])[0]


@functools.cache
def processor() -> str:
    """What `-march=native` depends on: model name and instruction set flags where the system tells them."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return "\n".join([platform.machine(), *(first[key] for key in sorted(first))])


@functools.cache
def cache_directory() -> Path:
    """$XDG_CACHE_HOME/megatron_prune or ~/.cache/megatron_prune.

    When that cannot be written: a private temporary directory, with a log message.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "megatron_prune"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
        reason = "not writable"
    except OSError as error:
        reason = str(error)
    logger.warning("kernel cache %s cannot be used (%s): kernels are compiled again in every process", root, reason)
    return Path(tempfile.mkdtemp(prefix="megatron_prune_"))


def _build_and_open(source: Path, text: bytes, command: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load the cached library, or build it first. Raises BuildError with the reason."""
    identity = "\0".join([" ".join(command), _version(tuple(command)) or "", " ".join(flags), processor()])
    digest = hashlib.sha256(text + b"\0" + identity.encode()).hexdigest()[:32]
    library = cache_directory() / f"{digest}.so"
    if not library.exists():
        _build(source, command, flags, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        library.unlink(missing_ok=True)  # damaged, or its OpenMP runtime has gone: the next process builds anew
        raise BuildError(f"{library.name} from {command[0]} does not load: {error}") from error


def _build(source: Path, command: list[str], flags: tuple[str, ...], library: Path) -> None:
    """Compile `source` to `library`.

    Several processes may do so at once: each writes its own file and renames it into place.
    """
    handle, partial = tempfile.mkstemp(dir=library.parent, prefix=library.stem, suffix=".partial")
    os.close(handle)
    try:
        subprocess.run(
            [*command, *flags, "-o", partial, str(source), "-lm"],
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT,
            check=True,
        )
        os.replace(partial, library)
    except subprocess.CalledProcessError as error:
        told = (error.stderr or "").strip().splitlines()
        raise BuildError(
            f"{command[0]} failed on {source.name}: {told[0] if told else f'status {error.returncode}'}"
        ) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} failed on {source.name}: {error}") from error
    finally:
        Path(partial).unlink(missing_ok=True)
