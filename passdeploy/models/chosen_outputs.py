"""Choose which outputs of a network count: by name, by index, or by a function.

Detectors return raw feature maps beside their boxes, and transformers hidden states beside their logits. Where nobody
reads them after training, they need not keep their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from passdeploy.errors import UsageError, clipped

OutputChoice: TypeAlias = int | str | Sequence[int | str] | Callable[[Any], Any]
_LONGEST_PART_LIST = 200  # characters


def choose_outputs(outputs: Any, choice: OutputChoice | None) -> Any:
    """Return those of a network's outputs that count.

    Args:
        outputs: what the network returned.
        choice: an index into a tuple, list or dictionary; a name in a dictionary or of an attribute, where `a.b` is `b`
            inside of `a`, and a list of dictionaries (one for each image) is searched in each of them; several of
            these; or a function of the outputs. None: all outputs count.

    Raises:
        UsageError: the network returns nothing of that name or at that index, or `choice` is something else.
    """
    if choice is None:
        return outputs
    if callable(choice):
        return choice(outputs)
    if isinstance(choice, int | str):
        return _find(outputs, choice)
    if not isinstance(choice, Sequence) or not choice or not all(isinstance(one, int | str) for one in choice):
        raise UsageError(
            f"outputs={clipped(choice)} chooses no outputs.\n"
            "Give a name, an index, several of these in a list, or a function of the network's outputs."
        )
    return [_find(outputs, one) for one in choice]


def _find(outputs: Any, key: int | str) -> Any:
    """Find one output; a name with dots leads through containers, unless something has that very name."""
    path = [key] if isinstance(key, int) or _has(outputs, key) else key.split(".")
    found = outputs
    for part in path:
        if not _has(found, part):
            raise UsageError(
                f"outputs asks for {key!r}, but the network returns {_describe(found)}.\n"
                "Name what is there, or give a function of the network's outputs."
            )
        found = _part(found, part)
    return found


def _has(value: Any, key: int | str) -> bool:
    if isinstance(value, Tensor):
        return False  # its rows are images, not outputs
    if isinstance(value, Mapping) and key in value:
        return True
    if isinstance(value, Mapping | list | tuple) and (index := _index(key)) is not None:
        return -len(value) <= index < len(value)
    if isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
        return all(key in one for one in value)
    return isinstance(key, str) and not isinstance(value, Mapping) and key in _attributes(value)


def _part(value: Any, key: int | str) -> Any:
    if isinstance(value, Mapping) and key in value:
        return value[key]
    if isinstance(value, Mapping | list | tuple) and (index := _index(key)) is not None:
        return list(value.values() if isinstance(value, Mapping) else value)[index]
    if isinstance(value, list | tuple) and isinstance(key, str) and key not in _attributes(value):
        return [one[key] for one in value]
    return getattr(value, str(key))


def _index(key: int | str) -> int | None:
    """Return the index that a part of a path is; None for a name."""
    if isinstance(key, int):
        return key
    return int(key) if key.isdecimal() else None


def _attributes(value: Any) -> list[str]:
    """List the fields of a named tuple, dataclass or result object."""
    names = [*getattr(value, "_fields", ()), *getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
    return [name for name in names if not name.startswith("_")]


def _describe(value: Any) -> str:
    """Say what there is to choose from."""
    if isinstance(value, Tensor):
        return "a single tensor there"
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return clipped(f"a {kind} with {', '.join(map(repr, value))}", _LONGEST_PART_LIST)
    if isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
        return clipped(f"a {kind} of dictionaries with {', '.join(map(repr, value[0]))}", _LONGEST_PART_LIST)
    if names := _attributes(value):
        return clipped(f"a {kind} with {', '.join(map(repr, names))}", _LONGEST_PART_LIST)
    if isinstance(value, list | tuple):
        return f"a {kind} of {len(value)}, with indices 0 to {len(value) - 1}" if value else f"an empty {kind}"
    return f"a {kind}"
