"""Networks without values: sizes alone tell where channels go, and cost next to nothing.

A sketch is a copy of a network whose numbers lie on torch's meta device, where tensors have shapes and nothing else.
Whole numbers keep their values: they are places, which rules ask for. A network that decides by values, as detectors
do, or a rule that needs them, stops with an error, and the network itself must run.

torch tells the shapes of the most frequent operations by decomposing them into others, which takes longer than to
compute a small one; these are told here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from passdeploy.models.cloning import ModelCloner

aten = torch.ops.aten


@dataclass(frozen=True)
class MetaModel:
    """A network without values, and its inputs likewise.

    Args:
        whole: the mould of the network itself.
        model: its copy without values.
        inputs: an example of what it is called with, without values.
    """

    original_cloner: ModelCloner[nn.Module]
    model: nn.Module
    inputs: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, inputs: Sequence[Any]) -> MetaModel:
        """The sketch of `model`, which is left as it is."""
        original_cloner = ModelCloner(model)
        bare_inputs = tree_map(lambda leaf: to_meta(leaf) if isinstance(leaf, Tensor) else leaf, list(inputs))
        return cls(original_cloner, original_cloner.copy(lambda _, tensor: to_meta(tensor)), tuple(bare_inputs))

    @cached_property
    def meta_cloner(self) -> ModelCloner[nn.Module]:
        """Of the copy without values."""
        return ModelCloner(self.model)


def to_meta(tensor: Tensor) -> Tensor:
    """`tensor` without its values; whole numbers keep them."""
    empty = (
        torch.empty_like(tensor, device="meta")
        if _is_float_or_complex(tensor)
        else tensor.detach().to("cpu", copy=True)
    )
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _is_float_or_complex(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def run_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `func` returns for tensors without values; quickly where that is plain, else as torch says."""
    first = args[0] if args else None
    if isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, Tensor) and first.is_meta and (not kwargs or func in _WITH_KEYWORDS):
        if func in _POINTWISE_IN_PLACE:
            return first
        if func in _POINTWISE and first.is_floating_point():
            return _clone(first)
        if (shape := _SHAPE_FUNCTIONS.get(func)) is not None and (found := shape(*args, **kwargs)) is not None:
            return found
    return func(*args, **kwargs)


def _clone(tensor: Tensor) -> Tensor:
    copied: Tensor = aten.clone.default(tensor)
    return copied


def _binary_pointwise(first: Tensor, second: Any, *_: Any, **__: Any) -> Tensor | None:
    """Element by element, where one is spread over the other."""
    if isinstance(second, float | int):
        return _clone(first) if _is_float_or_complex(first) else None
    if not isinstance(second, Tensor) or not second.is_meta or second.dtype != first.dtype:
        return None
    if first.shape == second.shape:
        return _clone(first) if first.stride() == second.stride() else None
    if _broadcasts_to(second.shape, first.shape):
        return _clone(first)
    return _clone(second) if _broadcasts_to(first.shape, second.shape) else None


def _broadcasts_to(shape: Sequence[int], over: Sequence[int]) -> bool:
    missing = len(over) - len(shape)
    return missing >= 0 and all(size in (1, wanted) for size, wanted in zip(shape, over[missing:], strict=True))


def _batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """With tables of the right size."""
    if not all(table.shape == x.shape[1:2] for table in rest[:4] if isinstance(table, Tensor)):
        return None
    statistic = x.new_empty(x.size(1))
    return _clone(x), statistic, statistic


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, _: float) -> tuple[Tensor, ...] | None:
    wanted = tuple(shape)
    if x.shape[x.ndim - len(wanted) :] != wanted or any(t is not None and t.shape != wanted for t in (weight, bias)):
        return None
    statistic = x.new_empty((*x.shape[: x.ndim - len(wanted)], *[1] * len(wanted)))
    return x.new_empty(x.shape), statistic, statistic


def _group_norm(
    x: Tensor, weight: Any, bias: Any, images: int, channels: int, places: int, groups: int, _: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    tables = [table for table in (weight, bias) if table is not None]
    if x.numel() != images * channels * places or channels % groups or any(len(t) != channels for t in tables):
        return None
    statistic = x.new_empty(images, groups)
    return _clone(x), statistic, statistic


def _reduce_dims(x: Tensor, dims: Any, keepdim: bool = False) -> Tensor | None:
    """A statistic over some dimensions."""
    if not dims or not x.is_floating_point():
        return None
    reduced = {dim % x.ndim for dim in dims}
    kept = [1 if dim in reduced else size for dim, size in enumerate(x.shape) if keepdim or dim not in reduced]
    return x.new_empty(kept)


def _vector_norm(x: Tensor, _: float = 2, dims: Any = None, keepdim: bool = False) -> Tensor | None:
    return _reduce_dims(x, dims, keepdim)


def _cumsum(x: Tensor, _: int, *, dtype: torch.dtype | None = None) -> Tensor | None:
    return x.new_empty(x.shape, dtype=dtype) if (dtype or x.is_floating_point()) and x.is_contiguous() else None


def _roll(x: Tensor, *_: Any) -> Tensor | None:
    return x.new_empty(x.shape) if x.is_contiguous() else None


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if not all(t.is_meta and t.dtype == first.dtype and t.ndim == first.ndim and t.is_contiguous() for t in tensors):
        return None
    dim %= first.ndim
    across = {(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}
    sizes = sum(tensor.size(dim) for tensor in tensors)
    return first.new_empty((*first.shape[:dim], sizes, *first.shape[dim + 1 :])) if len(across) == 1 else None


def _addmm(added: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    if left.ndim != 2 or right.ndim != 2 or left.size(1) != right.size(0) or added.shape != right.shape[1:]:
        return None
    return left.new_empty(left.size(0), right.size(1))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor | None:
    """Every query's mixture of values, of plain attention with as many heads everywhere."""
    heads = query.shape[:-2]
    if not (query.ndim >= 3 and heads == key.shape[:-2] == value.shape[:-2] and query.size(-1) == key.size(-1)):
        return None
    return query.new_empty((*query.shape[:-1], value.size(-1))) if key.size(-2) == value.size(-2) else None


_SHAPE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.addmm.default: _addmm,
    aten.cat.default: _cat,
    aten.roll.default: _roll,
    aten.cumsum.default: _cumsum,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.div.Tensor_mode: _binary_pointwise,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), _reduce_dims),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor), _binary_pointwise),
}
_WITH_KEYWORDS = {F.scaled_dot_product_attention, aten.cumsum.default, aten.div.Tensor_mode}
_POINTWISE = {
    *(
        getattr(aten, name).default
        for name in (
            *("relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "tanh", "leaky_relu", "elu"),
            *("exp", "log", "sqrt", "rsqrt", "abs", "neg", "reciprocal", "sin", "cos", "softplus", "mish"),
            *("clamp", "clamp_min", "clamp_max", "_softmax"),
        )
    ),
    aten.pow.Tensor_Scalar,
}
_POINTWISE_IN_PLACE = {
    getattr(aten, name).default
    for name in ("relu_", "hardtanh_", "hardswish_", "hardsigmoid_", "silu_", "sigmoid_", "leaky_relu_", "elu_")
}
