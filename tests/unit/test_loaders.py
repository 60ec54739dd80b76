"""Every place of the package that could run code, or open what could, is listed in loaders.yaml with why it is safe."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LISTED = Path(__file__).with_name("loaders.yaml")
NAMES = frozenset("eval exec compile __import__ CDLL Environment Sandbox Popen".split())
"""Called by their bare name."""
METHODS = frozenset(
    "from_pretrained from_config for_model from_dict import_module find_spec exec_module load_module "
    "spec_from_file_location Environment load_dataset snapshot_download hf_hub_download CDLL LoadLibrary dlopen "
    "Unpickler run_path run_module system popen Popen "
    "check_call check_output startfile load_yaml from_string all_gather_object broadcast_object_list gather_object "
    "scatter_object_list register_module hub add_safe_globals compose construct_document".split()
)
"""Called as a method or function of a module, whatever stands before the dot."""
LOADS = frozenset("pickle marshal shelve dill torch np numpy yaml evaluate joblib cloudpickle jit hub".split())
"""Modules whose `load`, `loads` and `full_load` are meant."""
STARTS = ("subprocess", "runpy", "os")
"""Modules whose `run`, `call`, `exec*` and `spawn*` are meant."""
MODULES = frozenset("pickle marshal shelve dill cloudpickle joblib runpy code imp codeop cffi pty".split())
"""Not imported."""


def uses(source: str) -> Iterator[tuple[str, str]]:
    """(function that it stands in, what is called) for each call or import that could run code."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    yield from _walk(tree, "module", modules)


def _walk(node: ast.AST, where: str, modules: set[str]) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        inner = where
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = child.name if where == "module" else f"{where}.{child.name}"
        found = _imported(child) or (_called(child, modules) if isinstance(child, ast.Call) else None)
        if found:
            yield where, found
        yield from _walk(child, inner, modules)


def _imported(node: ast.AST) -> str | None:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
    return next((f"import {name}" for name in names if name.split(".")[0] in MODULES), None)


def _called(call: ast.Call, modules: set[str]) -> str | None:
    function = call.func
    if isinstance(function, ast.Call) and _looks_up(function):
        return "getattr"
    if isinstance(function, ast.Name):
        owner = ast.unparse(call.args[0]).split(".")[0] if call.args else ""
        looked_up = _looks_up(call) and (owner in modules or isinstance(call.args[0], ast.Call))
        return function.id if function.id in NAMES | METHODS or looked_up else None
    if not isinstance(function, ast.Attribute):
        return None
    owner = ast.unparse(function.value).rpartition(".")[2]
    loads = function.attr in ("load", "loads", "full_load", "unsafe_load", "load_all") and owner in LOADS
    starts = owner in STARTS and function.attr.startswith(("run", "call", "exec", "spawn", "fork", "posix_spawn"))
    return f"{owner}.{function.attr}" if loads or starts or function.attr in METHODS else None


def _looks_up(call: ast.Call) -> bool:
    """Whether this is getattr by a name that is not written there: it counts on a module, or where it is called."""
    named = isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) > 1
    return named and not isinstance(call.args[1], ast.Constant)


def _found() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "megatron_prune").rglob("*.py")):
        for where, what in uses(path.read_text()):
            found.setdefault(f"{path.relative_to(ROOT / 'megatron_prune')}:{where}", set()).add(what)
    return found


def test_every_place_that_could_run_code_is_listed_with_its_reason() -> None:
    listed = yaml.safe_load(LISTED.read_text())
    found = _found()
    assert not set(found) - set(listed), "list these in loaders.yaml with why they are safe, or do without them"
    assert not set(listed) - set(found), "these are gone: take them out of loaders.yaml"
    for place, entry in listed.items():
        assert set(entry["calls"]) == found[place], place
        assert len(entry["why"]) > 20, place


@pytest.mark.parametrize(
    "line",
    [
        *("pickle.load(f)", "torch.load(f)", "np.load(f)", "yaml.load(f, Loader=x)", "eval('1')", "exec(code)"),
        *("AutoModel.from_pretrained(x)", "AutoConfig.for_model(x)", "importlib.import_module(x)", "__import__(x)"),
        *("subprocess.run(x)", "os.system(x)", "os.execv(x, y)", "ctypes.CDLL(x)", "getattr(a, name)(1)"),
        *("import torch; getattr(torch, name)", "getattr(importlib.reload(x), name)"),
        *("evaluate.load(x)", "datasets.load_dataset(x)", "load_dataset(x)", "jinja2.Environment()", "Environment()"),
        *("import pickle", "from pickle import loads", "import dill as d", "torch.jit.load(x)", "torch.hub.load(x)"),
        *("pickle.Unpickler(f).load()", "dist.all_gather_object(a, b)", "huggingface_hub.snapshot_download(x)"),
    ],
)
def test_what_could_run_code_is_seen(line: str) -> None:
    assert list(uses(f"def outer():\n    def inner():\n        {line}\n")) != []
    assert {where for where, _ in uses(f"def outer():\n    def inner():\n        {line}\n")} == {"outer.inner"}


def test_what_is_harmless_is_not() -> None:
    assert (
        list(uses("json.loads(x)\ngetattr(a, 'b')\ngetattr(a, name)\nself.load(x)\nre.compile(x)\nmodel.eval()\n"))
        == []
    )
