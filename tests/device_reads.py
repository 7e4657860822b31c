"""A stand-in for a GPU: counts the reads that would make the host wait for the device, in code that runs on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# values, and results whose size depends on values
_READS = {_aten._local_scalar_dense, _aten.equal, _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_dim}
_COPIES = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class DeviceReads(TorchDispatchMode):
    """Count the reads of values that would be on the device.

    On the device are the tensors that are handed in, and all that is computed from one of them. A read is `item`, a
    conversion to a number or boolean, `tolist`, `numpy`, `cpu`, `equal`, or a result whose size depends on values.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._storages: dict[int, StorageWeakRef] = {}
        for tensor in tensors:
            self.put_on_device(tensor)
        self._copies = _Copies(self)

    @property
    def count(self) -> int:
        """Number of reads so far."""
        return len(self.reads)

    def put_on_device(self, tensor: Tensor) -> Tensor:
        """Treat a tensor, and all that is computed from it, as one of the device."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_on_device(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was put on the device or computed from one that was."""
        reference = self._storages.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def __enter__(self) -> DeviceReads:
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        is_on_device = any(self.is_on_device(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if is_on_device and (func.overloadpacket in _READS or _has_mask(func, args)):
            self.reads.append(str(func))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((result, _written(func, args))) if is_on_device else ():
            if isinstance(leaf, Tensor):
                self.put_on_device(leaf)
        return result


class _Copies(TorchFunctionMode):
    """Count the copies to the host that the dispatcher does not see where everything is on the CPU."""

    def __init__(self, reads: DeviceReads) -> None:
        super().__init__()
        self.counter = reads

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _COPIES and self.counter.is_on_device(args[0]):
            self.counter.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _has_mask(func: Any, args: Sequence[Any]) -> bool:
    """Tell whether a call indexes with a mask; to set what a mask picks to one number reads nothing (`masked_fill`)."""
    if func.overloadpacket in (_aten.index_put, _aten.index_put_) and args[2].numel() == 1:
        return False
    indices = args[1] if func.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _written(func: Any, args: Sequence[Any]) -> list[Any]:
    """Return the arguments that a call changes."""
    declared = zip(func._schema.arguments, args, strict=False)
    return [value for argument, value in declared if argument.alias_info and argument.alias_info.is_write]
