"""Copies of networks with replaced parameters and buffers, faster than `copy.deepcopy`.

A network has hundreds of modules with two dozen attributes each, most of them empty dictionaries of hooks that
`copy.deepcopy` copies one by one. Here those are simply created anew, numbers and strings are shared, and
`copy.deepcopy` copies the rest. A network that contains a class with its own `__deepcopy__`, `__setstate__` or the like
is copied by `copy.deepcopy` as a whole.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.errors import ModelError, first_line
from passdeploy.models.bound_functions import attributes_to_rebind, copy_attribute
from passdeploy.models.wrappers import COMPILED_CALL

Network = TypeVar("Network", bound=nn.Module)
# (name, parameter or buffer) -> the tensor that the copy has under that name; it may be the same tensor
ReplaceTensor = Callable[[str, Tensor], Tensor]

_IMMUTABLE_TYPES = frozenset({bool, int, float, complex, str, bytes, type(None)})
_DICT_TYPES = frozenset({dict, OrderedDict})
_TABLES = ("_parameters", "_buffers", "_modules")
# What `copy.deepcopy` asks a class for. It calls `__new__`, too, but in the same way as a copy does here.
_COPY_METHODS = (
    "__deepcopy__",
    "__getnewargs__",
    "__getnewargs_ex__",
    "__getstate__",
    "__setstate__",
    "__reduce__",
    "__reduce_ex__",
)
# The `__setstate__` of these only converts pickles of old versions of torch; a copy does not need that.
_IGNORED_COPY_METHODS = tuple(
    cls.__setstate__
    for cls in (
        nn.modules.conv._ConvNd,
        nn.modules.batchnorm._NormBase,
        nn.AvgPool3d,
        nn.LogSoftmax,
        nn.MultiheadAttention,
        nn.Softmax,
        nn.Softmin,
        nn.TransformerDecoderLayer,
        nn.TransformerEncoderLayer,
        nn.Upsample,
    )
)


class ModelCloner(Generic[Network]):
    """Maker of any number of copies of one network, which is inspected once.

    A copy runs its own modules: functions and hooks of instances are rebound, calls that `nn.Module.compile` made are
    dropped.

    Args:
        model: the network; it must not change between copies. Modules and tensors that it uses in several places are
            shared in the same places of a copy.

    Raises:
        ModelError: a copy would go on using the original, see `attributes_to_rebind`; copies raise it for an attribute
            that refuses to be copied.
    """

    def __init__(self, model: Network) -> None:
        self.model = model
        self.state = dict(named_state(model))  # the arguments of `replace_tensor`
        self._ids = {name: id(tensor) for name, tensor in self.state.items()}
        modules = [module for _, module in modules_by_name(model)]
        empty = Counter(id(value) for module in modules for value in vars(module).values() if _is_empty_dict(value))
        unshared = {key for key, count in empty.items() if count == 1}
        classes: set[Any] = {type(module) for module in modules}
        is_plain = all(_has_default_copy(cls) for cls in classes)
        self._parts = [_ModuleCopier(module, unshared) for module in modules] if is_plain else None
        attributes = [
            (module, name, value)
            for module in modules
            for name, value in vars(module).items()
            if name not in _TABLES and not _is_immutable(value) and not _is_empty_dict(value)
        ]
        self._compiled = [module for module, name, _ in attributes if name == COMPILED_CALL]
        # Copies of tensors in the middle of a graph, such as a weight that a hook computes anew in every call.
        leaves = (leaf for _, _, value in attributes for leaf in tree_leaves(value))
        self._computed = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_leaf]
        self._bound = attributes_to_rebind(model, (item for item in attributes if item[1] != COMPILED_CALL))

    def with_state(self, state: Mapping[str, Tensor]) -> ModelCloner[Network]:
        """Return a cloner of the same network that passes these tensors, by name, to `replace_tensor`."""
        other = copy.copy(self)
        other.state = dict(state)
        return other

    @cached_property
    def plain_tensors(self) -> dict[str, Tensor]:
        """The tensors that are plain attributes of modules, see `named_plain_tensors`."""
        return dict(named_plain_tensors(self.model))

    def copy(self, replace_tensor: ReplaceTensor, plain_tensors: Mapping[str, Tensor] | None = None) -> Network:
        """Copy the network; its parameters and buffers are those that `replace_tensor` returns.

        Args:
            replace_tensor: called with the name of each parameter and buffer, and the tensor.
            plain_tensors: what the copy has in place of some of `plain_tensors`, by name; the others are copied.
        """
        memo: dict[int, Any] = {self._ids[name]: replace_tensor(name, old) for name, old in self.state.items()}
        memo |= {id(self.plain_tensors[name]): new for name, new in (plain_tensors or {}).items()}
        if self._parts is None:
            return self.deep_copy(memo)
        memo |= {id(tensor): tensor.detach().clone() for tensor in self._computed}
        for part in self._parts:
            memo[part.key] = part.cls.__new__(part.cls)
        for part in self._parts:
            part.fill(memo[part.key].__dict__, memo)
        self._rebind(memo)
        return cast(Network, memo[id(self.model)])

    def deep_copy(self, memo: dict[int, Any] | None = None) -> Network:
        """Copy the network with `copy.deepcopy`; `memo` maps the ids of tensors to others that take their place."""
        memo = {**(memo or {}), **{id(tensor): tensor.detach().clone() for tensor in self._computed}}
        try:
            network = copy.deepcopy(self.model, memo)
        except Exception as error:  # an attribute may refuse to be copied in any way
            raise _not_copied(type(self.model).__name__, error) from error
        memo[id(self.model)] = network
        copies = dict(modules_by_name(network))
        for name, module in modules_by_name(self.model):  # torchvision's feature extractors are copied in training mode
            object.__setattr__(copies[name], "training", module.training)
        self._rebind(memo)
        return network

    def _rebind(self, memo: dict[int, Any]) -> None:
        """Let the functions of the copy use the copy; `memo` maps the id of an original object to its copy."""
        for module, attribute in self._bound:
            vars(memo[id(module)])[attribute] = copy_attribute(vars(module)[attribute], memo)
        for module in self._compiled:
            vars(memo[id(module)]).pop(COMPILED_CALL, None)  # it would go on running the original


class _ModuleCopier:
    """Copier of the attributes of one module.

    Args:
        module: of a class that keeps all its state in attributes.
        unshared: ids of empty dictionaries that no other module holds.
    """

    def __init__(self, module: nn.Module, unshared: set[int]) -> None:
        self.key, self.cls = id(module), type(module)
        self._template = dict(vars(module))  # in order; immutable values are taken from here
        self._empty: list[tuple[str, type]] = []
        self._tables: list[tuple[str, type, list[tuple[str, int | None]]]] = []
        self._others: list[tuple[str, Any]] = []
        for name, value in vars(module).items():
            if _is_empty_dict(value) and id(value) in unshared:
                self._empty.append((name, type(value)))
            elif name in _TABLES:
                ids = [(key, None if entry is None else id(entry)) for key, entry in value.items()]
                self._tables.append((name, type(value), ids))
            elif not _is_immutable(value):
                self._others.append((name, value))

    def fill(self, attributes: dict[str, Any], memo: dict[int, Any]) -> None:
        """Set the attributes of the new module; `memo` maps the id of an original object to its copy."""
        attributes.update(self._template)
        for name, dict_type in self._empty:
            attributes[name] = dict_type()
        for name, dict_type, ids in self._tables:
            attributes[name] = dict_type((key, None if old_id is None else memo[old_id]) for key, old_id in ids)
        for name, value in self._others:
            try:
                attributes[name] = copy.deepcopy(value, memo)
            except Exception as error:  # it may refuse in any way
                raise _not_copied(f"attribute {name!r} of a {self.cls.__name__}", error) from error


def _not_copied(what: str, error: Exception) -> ModelError:
    return ModelError(
        f"{what} cannot be copied: {type(error).__name__}: {first_line(error)}.\n"
        "Make it where it is used, or give its class a __deepcopy__."
    )


def clone(model: Network, replace_tensor: ReplaceTensor) -> Network:
    """Copy `model`; the parameters and buffers of the copy are those that `replace_tensor` returns."""
    return ModelCloner(model).copy(replace_tensor)


def deep_copy(model: Network, memo: dict[int, Any] | None = None) -> Network:
    """Copy `model` with `copy.deepcopy`, and let its hooks and replaced functions run the copy, see `ModelCloner`.

    Args:
        model: the network.
        memo: ids of tensors -> others that take their place in the copy.
    """
    return ModelCloner(model).deep_copy(memo)


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List all parameters and then all buffers, each tensor once, under the first of its names."""
    modules = modules_by_name(model)
    for table in ("_parameters", "_buffers"):
        seen: set[int] = set()
        for prefix, module in modules:
            for name, tensor in module.__dict__[table].items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield (f"{prefix}.{name}" if prefix else name), tensor


def named_plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List the tables of numbers that modules hold as plain attributes, each tensor once, under its first name.

    Such as a sinusoidal position embedding that is neither a parameter nor a buffer: a tensor of floats of two or more
    dimensions that is not computed from others.
    """
    modules = modules_by_name(model)
    seen = {
        id(tensor)
        for _, module in modules
        for table in (module._parameters, module._buffers)
        for tensor in table.values()
    }
    for prefix, module in modules:
        for name, value in vars(module).items():
            if (
                type(value) is Tensor
                and id(value) not in seen
                and value.is_leaf
                and value.ndim > 1
                and value.is_floating_point()
                and value.layout == torch.strided
            ):
                seen.add(id(value))
                yield (f"{prefix}.{name}" if prefix else name), value


def modules_by_name(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List what `model.named_modules()` does, in a fraction of its time: its nested generators are slow."""
    found = list[tuple[str, nn.Module]]()
    _visit("", model, found, set())
    return found


def _visit(name: str, module: nn.Module, found: list[tuple[str, nn.Module]], seen: set[int]) -> None:
    # Not nested in `modules_by_name`: a nested function that calls itself is a reference cycle, which would keep the
    # network in memory until the next garbage collection.
    if id(module) not in seen:
        seen.add(id(module))
        found.append((name, module))
        for child_name, child in module._modules.items():
            if child is not None:
                _visit(f"{name}.{child_name}" if name else child_name, child, found, seen)


def _is_empty_dict(value: Any) -> bool:
    return type(value) in _DICT_TYPES and not value


def _is_immutable(value: Any) -> bool:
    is_tuple = type(value) is tuple
    return type(value) in _IMMUTABLE_TYPES or (is_tuple and all(type(item) in _IMMUTABLE_TYPES for item in value))


@cache
def _has_default_copy(cls: type[nn.Module]) -> bool:
    """Test whether a class is copied as `nn.Module` is: attribute by attribute."""
    return all(
        getattr(cls, method, None) in (getattr(nn.Module, method, None), *_IGNORED_COPY_METHODS)
        for method in _COPY_METHODS
    )
