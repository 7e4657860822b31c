"""Copies of networks: as `copy.deepcopy` makes them, with other tensors where wanted, and quicker.

A network is hundreds of modules, each with two dozen attributes, most of them empty dictionaries of hooks that
`copy.deepcopy` takes apart one by one. What is plain is copied here; what a class copies in a way of its own, it does.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
ReplaceTensor = Callable[[str, Tensor], Tensor]  # name and tensor -> what takes its place, which may be the same tensor

_AS_THEY_ARE = frozenset({bool, int, float, complex, str, bytes, type(None)})
_DICTIONARIES = frozenset({dict, OrderedDict})
_TABLES = ("_parameters", "_buffers", "_modules")
_OWN_WAYS = ("__new__", "__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
_HARMLESS = (nn.modules.conv._ConvNd.__setstate__, nn.modules.batchnorm._NormBase.__setstate__)  # of old files


class ModelCloner(Generic[Network]):
    """What copies of a network are cast from; of a network that stays as it is as many as are wanted.

    Args:
        model: left as it is. Modules and tensors that it shares are shared in its copies.
    """

    def __init__(self, model: Network) -> None:
        self.model = model
        self.state = dict(named_state(model))  # what `replace_tensor` is asked about
        self._ids = {name: id(tensor) for name, tensor in self.state.items()}
        modules = [module for _, module in modules_by_name(model)]
        empty = Counter(
            id(held) for module in modules for held in vars(module).values() if type(held) in _DICTIONARIES and not held
        )
        alone = {key for key, count in empty.items() if count == 1}
        kinds: set[Any] = {type(module) for module in modules}
        is_plain = all(_is_plain(kind) for kind in kinds)
        self._parts = [_Part(module, alone) for module in modules] if is_plain else None

    def with_state(self, state: Mapping[str, Tensor]) -> ModelCloner[Network]:
        """The same with other tensors of these names and shapes."""
        other = copy.copy(self)
        other.state = dict(state)
        return other

    def copy(self, replace_tensor: ReplaceTensor) -> Network:
        """A copy whose parameters and buffers are what `replace_tensor` makes of them."""
        memo: dict[int, Any] = {self._ids[name]: replace_tensor(name, old) for name, old in self.state.items()}
        if self._parts is None:
            return copy.deepcopy(self.model, memo)
        for part in self._parts:
            memo[part.key] = part.kind.__new__(part.kind)
        for part in self._parts:
            part.fill(memo[part.key].__dict__, memo)
        return cast(Network, memo[id(self.model)])


class _Part:
    """One module: how its attributes are copied.

    Args:
        module: of a class that is its attributes and nothing else.
        alone: ids of empty dictionaries that no other module holds.
    """

    def __init__(self, module: nn.Module, alone: set[int]) -> None:
        self.key, self.kind = id(module), type(module)
        self._template = dict(vars(module))  # in order; what is plain stays as it is
        self._empty: list[tuple[str, type]] = []
        self._tables: list[tuple[str, type, list[tuple[str, int | None]]]] = []
        self._others: list[tuple[str, Any]] = []
        for name, held in vars(module).items():
            if type(held) in _DICTIONARIES and not held and id(held) in alone:
                self._empty.append((name, type(held)))
            elif name in _TABLES:
                ids = [(key, None if value is None else id(value)) for key, value in held.items()]
                self._tables.append((name, type(held), ids))
            elif not _is_immutable(held):
                self._others.append((name, held))

    def fill(self, attributes: dict[str, Any], memo: dict[int, Any]) -> None:
        """Give a new module its attributes; `memo` has for the id of an object what stands in its place."""
        attributes.update(self._template)
        for name, kind in self._empty:
            attributes[name] = kind()
        for name, kind, ids in self._tables:
            attributes[name] = kind((key, None if place is None else memo[place]) for key, place in ids)
        for name, held in self._others:
            attributes[name] = copy.deepcopy(held, memo)


def clone(model: Network, replace_tensor: ReplaceTensor) -> Network:
    """A copy of `model` whose parameters and buffers are what `replace_tensor` makes of them."""
    return ModelCloner(model).copy(replace_tensor)


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and then buffers, each once, with their first names."""
    modules = modules_by_name(model)
    for table in ("_parameters", "_buffers"):
        seen: set[int] = set()
        for prefix, module in modules:
            for name, tensor in module.__dict__[table].items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield (f"{prefix}.{name}" if prefix else name), tensor


def modules_by_name(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As `named_modules` gives them, in a fraction of the time, which it spends handing each up to the root."""
    found = list[tuple[str, nn.Module]]()
    _visit("", model, found, set())
    return found


def _visit(name: str, module: nn.Module, found: list[tuple[str, nn.Module]], seen: set[int]) -> None:
    # No function inside of `modules_by_name`: one that calls itself is a cycle, which keeps the network until the
    # garbage collector comes by.
    if id(module) not in seen:
        seen.add(id(module))
        found.append((name, module))
        for child_name, child in module._modules.items():
            if child is not None:
                _visit(f"{name}.{child_name}" if name else child_name, child, found, seen)


def _is_immutable(value: Any) -> bool:
    return type(value) in _AS_THEY_ARE or (type(value) is tuple and all(type(held) in _AS_THEY_ARE for held in value))


@cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether modules of this class are their attributes and nothing else."""
    return all(getattr(kind, way, None) in (getattr(nn.Module, way, None), *_HARMLESS) for way in _OWN_WAYS)
