"""Small faults in Python source, made one at a time: what `tools/mutants.py` plants to see whether a test notices.

    comparisons   <  <=   >  >=   ==  !=   in  not in   is  is not
    arithmetic    +  -    *  /    //  *    **  *    and their assignments;  x += y  ->  x = y;  -x  ->  x;  &  |
    logic         and  or   not x  ->  x   if c  ->  if not c   a if c else b  ->  b if c else a
    constants     n  ->  n + 1   2.5  ->  5.0   0.0  ->  1.0   True  False
    reductions    sum  mean   amax  amin   max  min   square  abs   std  var   argmax  argmin   x.sqrt()  ->  x   ...
    arguments     f(x, key=y)  ->  f(x)

Left alone are annotations, docstrings and what is only said: texts of errors and messages, help.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
PAIRS = ("sum mean", "amax amin", "max min", "square abs", "std var", "argmax argmin")
RENAMED = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
"""Names of reductions and elementwise functions that take each other's arguments."""
DROPPED = ("sqrt", "abs", "clamp", "neg", "exp", "log", "t", "double", "flip", "clamp_", "sort")
"""Methods whose result is replaced by what they are called on."""
MODULES = ("torch", "math")
"""Whose functions of such names are no methods."""
SAYING = (
    *("UserError", "RuntimeError", "ValueError", "say", "warn", "warning", "brief", "progress"),
    *("hyperparameter", "TypeVar"),
)
"""Calls whose arguments are words."""


SKIPPED = ("annotation", "returns", "decorator_list")
"""Fields of nodes that are left alone."""

Edit = Callable[[Any], None]
"""Changes a node of a syntax tree in place."""


@dataclass(frozen=True)
class Mutant:
    """One fault in one module."""

    path: str
    """Of the module, from the repository's root."""
    place: str
    """Function or class that it is in, with those around it."""
    before: str
    after: str
    """The statement, or the head of one that has others in it, before and after."""
    number: int
    """Of mutants that read alike in one place, in the order of the source."""
    node: int
    edit: int
    """Which node of the tree, and which of its faults."""

    @property
    def key(self) -> str:
        """What names it as long as its place and statement stay as they are, wherever the lines go."""
        more = f" #{self.number}" if self.number else ""
        return f"{self.path} {self.place}: {self.before} -> {self.after}{more}"

    def apply(self, source: str) -> str:
        """The module's source with the fault."""
        tree = ast.parse(source)
        node = list(ast.walk(tree))[self.node]
        edits(node)[self.edit](node)
        return ast.unparse(tree)


def mutants(path: str, source: str) -> list[Mutant]:
    """All faults of a module."""
    tree = ast.parse(source)
    numbers = {node: number for number, node in enumerate(ast.walk(tree))}
    found: list[Mutant] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for node, statement, place in visited(tree, tree, ""):
        for number, edit in enumerate(edits(node)):
            before, undo = text(statement), saved(node)
            edit(node)
            after = text(statement)
            undo()
            alike = (place, before, after)
            found.append(Mutant(path, *alike, seen[alike], numbers[node], number))
            seen[alike] += 1
    return found


def saved(node: Any) -> Callable[[], None]:
    """What undoes an edit, which touches nothing of the nodes below."""
    kind, values = type(node), {k: list(v) if isinstance(v, list) else v for k, v in vars(node).items()}

    def undo() -> None:
        node.__class__, node.__dict__ = kind, values

    return undo


def become(node: Any, other: Any) -> None:
    """Put another node in a node's place, whoever holds it."""
    node.__class__, node.__dict__ = other.__class__, other.__dict__


def text(statement: ast.AST) -> str:
    """A statement's source; of one that has others in it the head."""
    lines = [line for line in ast.unparse(statement).splitlines() if not line.startswith("@")]
    return lines[0] if hasattr(statement, "body") else "\n".join(lines)


def visited(node: ast.AST, statement: ast.AST, place: str) -> Iterator[tuple[ast.AST, ast.AST, str]]:
    """Every node that may have a fault, the statement that it is in, and where that is."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        place = f"{place}.{node.name}".lstrip(".")
    statement = node if isinstance(node, ast.stmt) else statement
    yield node, statement, place or "module"
    for child in _children(node):
        yield from visited(child, statement, place)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Parts of a node, without those that are left alone."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in SKIPPED and not _left_alone(child):
                yield child


def _left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.Call) and _name(node.func) in SAYING


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def edits(node: ast.AST) -> list[Edit]:
    """The faults that a node can have."""
    for kind, give in EDITS.items():
        if isinstance(node, kind):
            return give(node)
    return []


def _comparison(node: ast.Compare) -> list[Edit]:
    def swap(at: int) -> Edit:
        return lambda n: n.ops.__setitem__(at, COMPARISONS[type(n.ops[at])]())

    return [swap(at) for at in range(len(node.ops))]


def _operator(node: ast.BinOp | ast.AugAssign) -> list[Edit]:
    def other(n: Any) -> None:
        n.op = ARITHMETIC[type(n.op)]()

    def assign(n: Any) -> None:
        become(n, ast.copy_location(ast.Assign([n.target], n.value), n))

    texts = isinstance(node, ast.BinOp) and any(_is_text(side) for side in (node.left, node.right))
    found = [other] if type(node.op) in ARITHMETIC and not texts else []
    return [*found, assign] if isinstance(node, ast.AugAssign) else found


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _logic(node: ast.BoolOp) -> list[Edit]:
    def other(n: Any) -> None:
        n.op = ast.Or() if isinstance(n.op, ast.And) else ast.And()

    return [other]


def _condition(node: ast.If) -> list[Edit]:
    def negate(n: Any) -> None:
        n.test = ast.UnaryOp(ast.Not(), n.test)

    said_elsewhere = (ast.Compare, ast.BoolOp, ast.UnaryOp)
    return [] if isinstance(node.test, said_elsewhere) else [negate]


def _choice(node: ast.IfExp) -> list[Edit]:
    def swap(n: Any) -> None:
        n.body, n.orelse = n.orelse, n.body

    return [swap]


def _sign(node: ast.UnaryOp) -> list[Edit]:
    return [lambda n: become(n, n.operand)] if isinstance(node.op, ast.USub | ast.Not) else []


def _constant(node: ast.Constant) -> list[Edit]:
    def other(n: Any) -> None:
        x = n.value
        n.value = not x if isinstance(x, bool) else x + 1 if isinstance(x, int) else 2 * x or 1.0

    return [other] if isinstance(node.value, bool | int | float) else []


def _call(node: ast.Call) -> list[Edit]:
    found: list[Edit] = []
    name = _name(node.func)
    if name in RENAMED:
        found.append(lambda n: setattr(n, "func", _renamed(n.func)))
    if name in DROPPED and isinstance(node.func, ast.Attribute) and _name(node.func.value) not in MODULES:
        found.append(lambda n: become(n, n.func.value))
    named = [at for at, keyword in enumerate(node.keywords) if keyword.arg]
    return [*found, *(_without(at) for at in named)]


def _renamed(function: Any) -> Any:
    other = copy.copy(function)
    setattr(other, "attr" if isinstance(other, ast.Attribute) else "id", RENAMED[_name(function)])
    return other


def _without(at: int) -> Edit:
    return lambda n: n.keywords.pop(at)


EDITS: dict[Any, Callable[[Any], list[Edit]]] = {
    ast.Compare: _comparison,
    ast.BinOp: _operator,
    ast.AugAssign: _operator,
    ast.BoolOp: _logic,
    ast.If: _condition,
    ast.IfExp: _choice,
    ast.UnaryOp: _sign,
    ast.Constant: _constant,
    ast.Call: _call,
}
