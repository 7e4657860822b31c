"""Strict YAML parser for recipes: safe, unambiguous, with the file and line of every key.

Differences to a plain `yaml.safe_load`:

- a key given twice is an error, never a silent "last one wins";
- scalars follow YAML 1.2: `1e-3` is a number, `no` and `on` are words, `010` is ten, dates are text;
- keys are text, tags other than the plain ones are refused, and there are no merge keys (`<<`);
- size, nesting and the number of values (aliases counted as often as they are used) are bounded,
  so that a hostile file is refused in milliseconds and cannot fill the memory;
- the file and line of every key are kept, so that a later check can report `mobilenetv2.yaml:12`.

The meaning of the keys is defined in `schema.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from passdeploy.errors import RecipeError, clipped

MAX_BYTES = 256 * 1024
MAX_NESTING = 20
MAX_VALUES = 10_000

KeyPath = tuple[str | int, ...]  # ("prune", "exclude", 0)


@dataclass(frozen=True)
class Mark:
    """Position of a key: `mobilenetv2.yaml:12`, or `--set a.b=c` without a line."""

    source: str
    line: int | None = None  # 1-based

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Document:
    """One YAML document in plain Python values."""

    value: Any  # dict, list, str, int, float, bool or None
    marks: Mapping[KeyPath, Mark]  # positions of all keys and list items; the empty path is the top


def parse(text: str, source: str, *, has_lines: bool = True) -> Document:
    """Read one YAML document.

    Args:
        text: the document.
        source: name of the text in errors and marks.
        has_lines: give marks line numbers; False for text that is not from a file.

    Raises:
        RecipeError: not YAML, a key given twice, or a document beyond the limits of this module.

    >>> parse("steps: 300\\nlr: 1e-3", "mine.yaml").value
    {'steps': 300, 'lr': 0.001}
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise RecipeError(f"{source} is larger than {MAX_BYTES // 1024} KiB; a recipe is a page of text.")

    def mark(line: int) -> Mark:  # counted from 0, as PyYAML does
        return Mark(source, line + 1 if has_lines else None)

    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_message(error, text, mark)) from error
    marks: dict[KeyPath, Mark] = {(): mark(0)}
    value = None if root is None else _Builder(mark, marks).build(root, ())
    return Document(value, marks)


def dump(value: Any) -> str:
    """Write plain values as block YAML that `parse` reads back to equal ones (keys keep their order)."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def dotted(path: KeyPath) -> str:
    """Write a key path as text of one line.

    >>> dotted(("prune", "exclude", 0))
    'prune.exclude[0]'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return clipped(text)


class _TooDeep(yaml.MarkedYAMLError):
    """Nesting deeper than `MAX_NESTING`, which is far below Python's recursion limit."""


class _Loader(yaml.SafeLoader):
    """Loader from text to nodes, with the scalars of YAML 1.2 and limited nesting."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - yaml's own class-level table
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_NESTING:
            problem = f"nested deeper than {MAX_NESTING} levels"
            raise _TooDeep(problem=problem, problem_mark=self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writer of YAML text, which quotes all text that this parser or a YAML 1.1 parser would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # YAML 1.1 takes these characters for line breaks; only double quotes keep them.
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar(_STR, data, style=style)


_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
_SCALARS = (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_Dumper.add_representer(str, _Dumper.represent_str)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
    if _tag != _NULL:  # SafeDumper already knows every form of null; a second empty pattern would hide it
        _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


class _Builder:
    """Converter from nodes to values and marks, which expands aliases and counts every expanded value."""

    def __init__(self, mark_line: Callable[[int], Mark], marks: dict[KeyPath, Mark]) -> None:
        self.mark_line, self.marks, self.values = mark_line, marks, 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or len(path) > MAX_NESTING:
            raise RecipeError(
                f"{self.mark(node)}: more than {MAX_VALUES} values or {MAX_NESTING} levels, aliases expanded.\n"
                "A recipe is a page of text: write the values out."
            )
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return {key: self.build(value, (*path, key)) for key, value in self.entries(node, path)}
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            self.marks.update({(*path, i): self.mark(item) for i, item in enumerate(node.value)})
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        return self.scalar(node)

    def entries(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        seen: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            here = self.mark(key_node)
            if not (isinstance(key_node, yaml.ScalarNode) and key_node.tag == _STR):
                shown = clipped(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise RecipeError(f"{here}: {shown} is not a key; keys are plain words such as 'steps'.")
            key, here_path = key_node.value, (*path, key_node.value)
            if key in seen:
                raise RecipeError(
                    f"{here}: the key '{dotted(here_path)}' is here a second time; "
                    f"the first is at {seen[key]}.\nKeep one of the two."
                )
            seen[key] = self.marks[here_path] = here
            yield key, value_node

    def scalar(self, node: yaml.Node) -> str | int | float | bool | None:
        text = node.value
        try:
            if node.tag == _STR:
                return str(text)
            if node.tag == _NULL:
                return None
            if node.tag == _BOOL:
                return {"true": True, "false": False}[text.lower()]
            if node.tag == _INT:
                return _integer(text)
            if node.tag == _FLOAT:
                return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError) as error:
            raise RecipeError(f"{self.mark(node)}: cannot read {clipped(text, 40)!r} as a value.") from error
        raise RecipeError(f"{self.mark(node)}: the tag {clipped(node.tag, 60)!r} is not allowed; write a plain value.")

    def mark(self, node: yaml.Node) -> Mark:
        return self.mark_line(node.start_mark.line)


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
    return int(digits, base)


def _syntax_message(error: yaml.YAMLError, text: str, mark_line: Callable[[int], Mark]) -> str:
    """Explain a syntax error in at most three lines: file and line, the line itself, and a hint for common mistakes."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character that YAML forbids; PyYAML gives its position, not its line
        position = getattr(error, "position", 0)
        here = mark_line(text.count("\n", 0, position))
        return f"{here}: not YAML: it holds a control character that text files do not have."
    problem = clipped(getattr(error, "problem", None) or "syntax error", 120)
    line_text = (text.splitlines()[mark.line : mark.line + 1] or [""])[0]
    message = f"{mark_line(mark.line)}: not YAML: {problem}."
    if line_text.strip():
        message += f"\n    {clipped(line_text.strip(), 90)}"
    if "\t" in line_text:
        return f"{message}\nIndent with spaces; YAML does not allow tabs."
    if "mapping values are not allowed" in problem:
        return f"{message}\nA line holds one 'key: value'; is a line break or an indent missing?"
    return message
