"""Values of meta-device tensors that depend on no input and no weight, such as an attention mask of ones.

Code asks such a tensor for its values ("is anything masked at all?"), which a tensor on the meta device cannot answer.
So what is computed from constants alone is computed on the CPU as well, by the same operations. Views share their
memory there as they do in the network: what is written to one is written to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from passdeploy.tracing.op_call import aten

MAX_ELEMENTS = 2**20  # of a constant: masks have fewer

_values = WeakTensorKeyDictionary()  # meta tensor -> its values, a tensor on the CPU


def run_with_constants(run: Callable[..., Any], func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run one operation on meta tensors by `run(func, args, kwargs)`, and compute its values if it is of constants.

    An operation whose result is no tensor or is not on the meta device, such as `item` and a copy to the CPU, is
    answered where the values are known.
    """
    known = _with_values(func, args, kwargs) if _follows(func) else None
    if known is None:
        if _values and _is_mutable(func):
            _forget_written(args, kwargs)
        return run(func, args, kwargs)
    device = kwargs.get("device")
    if torch.Tag.data_dependent_output in func.tags or (device is not None and device.type != "meta"):
        return func(*known[0], **known[1])
    result = run(func, args, kwargs)
    results = _tensors(result)
    if results and all(tensor.is_meta and tensor.numel() <= MAX_ELEMENTS for tensor in results):
        _values.update(zip(results, _tensors(func(*known[0], **known[1])), strict=True))
    elif _is_mutable(func):
        _forget_written(args, kwargs)
    return result


def _with_values(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]] | None:
    """Return the arguments with CPU tensors instead of constants; None if tensors without values have a part in it."""
    if func.overloadpacket in _FILLING and args[0].numel() <= MAX_ELEMENTS:  # values of the first argument do not count
        args = (torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:])
    elif args and isinstance(first := args[0], Tensor) and first.is_meta and first not in _values:
        return None  # as nearly always
    leaves, structure = tree_flatten((args, kwargs))
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            if (value := _values.get(leaf)) is None:
                return None
            leaves[number] = value
        elif isinstance(leaf, torch.device):
            leaves[number] = torch.device("cpu")
    known: tuple[Sequence[Any], Mapping[str, Any]] = structure.unflatten(leaves)
    return known


def _forget_written(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Forget the values of the tensors that an operation may write to, and of all that share their memory."""
    for tensor in _tensors((args, kwargs)):
        if tensor in _values:
            memory = _values[tensor].untyped_storage().data_ptr()
            for other in [other for other, value in _values.items() if value.untyped_storage().data_ptr() == memory]:
                del _values[other]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@cache
def _is_mutable(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable


@cache
def _follows(func: Any) -> bool:
    """True if equal arguments give equal values."""
    return (
        isinstance(func, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded not in func.tags
        and func.overloadpacket not in _UNDEFINED
    )


_FILLING = {aten.ones_like, aten.zeros_like, aten.full_like, aten.new_ones, aten.new_zeros, aten.new_full}
_UNDEFINED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
