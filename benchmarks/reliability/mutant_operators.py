"""Mutants of a file: every small change that the standard operators of mutation testing make of it, one at a time.

Operators: a comparison, an arithmetic or a boolean operator replaced; a condition negated; `not`, `-` and `~` removed;
an integer one more and one less; True and False, `break` and `continue`, `min` and `max`, `any` and `all` swapped; an
end of a slice left out; `None` returned; a call, or an assignment to an attribute or an item, deleted; another text as
the default of an argument. Left alone is what computes nothing: annotations, docstrings, formatted texts, and what is
raised or asserted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

_MOST_SHOWN = 100  # characters of a change

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_NEGATIONS = {ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn}  # to replace one of these negates the comparison
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_UNARY: dict[type[ast.unaryop], str] = {ast.Not: "not", ast.USub: "minus", ast.UAdd: "plus", ast.Invert: "~"}
_SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}
_SKIPPED_FIELDS = {"annotation", "returns", "type_params"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    line: int
    operator: str
    old: str
    new: str
    place: int  # which node of the file changes, and
    choice: int  # which of its changes it is: see `mutated`
    lines: range  # that run with what changes: of its statement, or of a function's body; empty: it runs at import

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.operator}: {self.old} -> {self.new}"


def mutants_of(source: str, file: str) -> list[Mutant]:
    """List all mutants of a source text, in its order."""
    return [
        Mutant(
            file,
            place.node.lineno,  # type: ignore[attr-defined]
            operator,
            _text(place.node),
            _text(new),
            number,
            choice,
            place.lines,
        )
        for number, place in enumerate(_places(ast.parse(source)))
        for choice, (operator, new) in enumerate(_changes(place))
    ]


def mutated(source: str, place: int, choice: int) -> ast.Module:
    """Return the module with the change of a mutant, to be compiled."""
    tree = ast.parse(source)
    there = list(_places(tree))[place]
    _, new = list(_changes(there))[choice]
    new = ast.copy_location(new, there.node)
    if isinstance(siblings := getattr(there.parent, there.field), list):
        siblings[there.index] = new
    else:
        setattr(there.parent, there.field, new)
    return ast.fix_missing_locations(tree)


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


# Places


@dataclass(frozen=True)
class _Place:
    """A node and where it hangs."""

    node: ast.AST
    parent: ast.AST
    field: str  # of the parent
    index: int  # in that field, where it is a list
    lines: range


def _places(parent: ast.AST, lines: range = range(0), *, at_import: bool = True) -> Iterator[_Place]:
    """Walk through all nodes below one that may change."""
    for field, value in ast.iter_fields(parent):
        if field in _SKIPPED_FIELDS:
            continue
        nodes = value if isinstance(value, list) else [value]
        for index, node in enumerate(nodes):
            if not isinstance(node, ast.AST) or _computes_nothing(node):
                continue
            outside = at_import and not (isinstance(parent, _FUNCTIONS) and field == "body")
            own = _own_lines(node, outside) if isinstance(node, ast.stmt) else lines
            yield _Place(node, parent, field, index, own)
            yield from _places(node, own, at_import=outside)


def _computes_nothing(node: ast.AST) -> bool:
    """True for what is left alone: texts, errors, and the types of types."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    return isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom))


def _own_lines(node: ast.stmt, at_import: bool) -> range:
    """Return the lines of a statement without those of statements inside of it; of a function, its body."""
    end = node.end_lineno or node.lineno
    body = getattr(node, "body", None)
    if isinstance(node, _FUNCTIONS) and body:
        return range(body[0].lineno, end + 1)
    if at_import:
        return range(0)
    return range(node.lineno, max(body[0].lineno, node.lineno + 1) if body else end + 1)


# Changes


def _changes(place: _Place) -> Iterator[tuple[str, ast.AST]]:
    """Yield what operators make of a node, with their names."""
    node = place.node
    if isinstance(node, ast.Slice):
        yield from _slices(node)
    elif isinstance(node, ast.expr):
        if _is_condition(place) and not _is_negated_elsewhere(node):
            yield "condition negated", ast.UnaryOp(ast.Not(), node)
        if isinstance(node, ast.Constant):
            yield from _constants(node, is_default=place.field in ("defaults", "kw_defaults"))
        else:
            yield from _expressions(node)
    elif isinstance(node, ast.stmt):
        yield from _statements(node)


def _is_condition(place: _Place) -> bool:
    is_test = place.field == "test" and isinstance(place.parent, (ast.If, ast.While, ast.IfExp))
    return is_test or (place.field == "ifs" and isinstance(place.parent, ast.comprehension))


def _is_negated_elsewhere(node: ast.expr) -> bool:
    """True if another operator makes the same of a condition."""
    if isinstance(node, ast.Compare):
        return len(node.ops) == 1 and type(node.ops[0]) in _NEGATIONS
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _constants(node: ast.Constant, *, is_default: bool) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.value, bool):
        yield "True and False swapped", ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield "one more", ast.Constant(node.value + 1)
        yield "one less", ast.Constant(node.value - 1)
    elif isinstance(node.value, str) and is_default:
        yield "another default", ast.Constant(node.value + "x")


def _expressions(node: ast.expr) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            yield "comparison replaced", _with(node, ops=_replaced(node.ops, number, _COMPARISONS[type(operator)]()))
    elif isinstance(node, ast.BinOp):
        yield "arithmetic replaced", _with(node, op=_ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield "and and or swapped", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp):
        yield f"{_UNARY[type(node.op)]} removed", node.operand
    elif isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name) and function.id in _SWAPPED:
            yield "function swapped", _with(node, func=ast.Name(_SWAPPED[function.id], ast.Load()))
        if isinstance(function, ast.Attribute) and function.attr in _SWAPPED:
            yield "function swapped", _with(node, func=_with(function, attr=_SWAPPED[function.attr]))


def _slices(node: ast.Slice) -> Iterator[tuple[str, ast.AST]]:
    for end in ("lower", "upper"):
        if getattr(node, end) is not None:
            yield "end of a slice left out", _with(node, **{end: None})


def _statements(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "None returned", ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Break):
        yield "break and continue swapped", ast.Continue()
    elif isinstance(node, ast.Continue):
        yield "break and continue swapped", ast.Break()
    elif isinstance(node, ast.AugAssign):
        yield "arithmetic replaced", _with(node, op=_ARITHMETIC[type(node.op)]())
        yield "statement deleted", ast.Pass()
    elif _can_go(node):
        yield "statement deleted", ast.Pass()


def _can_go(node: ast.stmt) -> bool:
    """True for calls, and for assignments without which all names still have a value."""
    if isinstance(node, ast.Assign):
        return all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
    return isinstance(node, ast.Delete) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))


def _with(node: Any, **fields: Any) -> Any:
    """Copy a node with other values of some fields."""
    copy = deepcopy(node)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def _replaced(values: list[Any], number: int, value: Any) -> list[Any]:
    return [*values[:number], value, *values[number + 1 :]]
