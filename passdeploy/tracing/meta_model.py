"""Meta-device copies of networks: channels are traced by shapes alone, which costs almost no time and memory.

Floating-point tensors of the copy are on torch's meta device, where tensors have shapes but no values. Integer tensors
keep their values, because they are indices, which rules read; so do constants (see meta_constants.py). Where a network
branches on other values (detectors do), or a rule needs them, the run ends with an error, and the caller runs the
original network instead.

For the most frequent operations torch finds the result's shape by decomposing them, which takes longer than computing
a small one; their shapes are computed here.
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
from passdeploy.models.parameters import parameter_like
from passdeploy.tracing.dispatch_mode import UncompiledMode
from passdeploy.tracing.meta_constants import run_with_constants
from passdeploy.tracing.op_call import aten


@dataclass(frozen=True)
class MetaModel:
    """A meta-device copy of a network and of its example inputs.

    Args:
        original_cloner: makes copies of the original network.
        model: the copy on the meta device.
        inputs: the network's positional arguments, on the meta device.
    """

    original_cloner: ModelCloner[nn.Module]
    model: nn.Module
    inputs: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, inputs: Sequence[Any]) -> MetaModel:
        """Copy `model` and `inputs` to the meta device; both are left as they are."""
        original_cloner = ModelCloner(model)
        meta_inputs = tree_map(lambda leaf: to_meta(leaf) if isinstance(leaf, Tensor) else leaf, list(inputs))
        return cls(original_cloner, original_cloner.copy(lambda _, tensor: to_meta(tensor)), tuple(meta_inputs))

    @cached_property
    def meta_cloner(self) -> ModelCloner[nn.Module]:
        """The cloner of the meta-device copy."""
        return ModelCloner(self.model)


def to_meta(tensor: Tensor) -> Tensor:
    """Copy a tensor to the meta device; an integer one is copied to the CPU with its values."""
    if _is_float_or_complex(tensor):
        copied = torch.empty_like(tensor, device="meta")
    else:
        copied = tensor.detach().to("cpu", copy=True)
    return parameter_like(tensor, copied) if isinstance(tensor, nn.Parameter) else copied


def _is_float_or_complex(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def run_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call `func` on meta tensors, and follow the values of constants through it (see `meta_constants`)."""
    return run_with_constants(_run_on_shapes, func, args, kwargs)


def _run_on_shapes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call `func` on meta tensors, with the shape functions below where they apply and torch's own elsewhere."""
    first = args[0] if args else None
    if isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, Tensor) and first.is_meta and (not kwargs or func in _WITH_KEYWORDS):
        if func in _POINTWISE_IN_PLACE:
            return first
        if func in _POINTWISE and first.is_floating_point():
            return _clone(first)
        shape_function = _SHAPE_FUNCTIONS.get(func)
        if shape_function is not None and (result := shape_function(*args, **kwargs)) is not None:
            return result
    return func(*args, **kwargs)


class MetaMode(UncompiledMode):
    """A dispatch mode that runs every operation by `run_on_meta`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation; called by torch for each of them."""
        return run_on_meta(func, args, kwargs or {})


def _clone(tensor: Tensor) -> Tensor:
    copied: Tensor = aten.clone.default(tensor)
    return copied


def _binary_pointwise(first: Tensor, second: Any, *_: Any, **__: Any) -> Tensor | None:
    """Return the result of an element-wise operation of equal shapes, or where one broadcasts to the other."""
    if isinstance(second, float | int):
        return _clone(first) if _is_float_or_complex(first) else None
    if not isinstance(second, Tensor) or not second.is_meta or second.dtype != first.dtype:
        return None
    if first.shape == second.shape:
        return _clone(first) if first.stride() == second.stride() else None
    if _broadcasts_to(second.shape, first.shape):
        return _clone(first)
    return _clone(second) if _broadcasts_to(first.shape, second.shape) else None


def _broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    missing = len(target) - len(shape)
    return missing >= 0 and all(size in (1, wanted) for size, wanted in zip(shape, target[missing:], strict=True))


def _batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return a batch norm's result if weight, bias and running statistics have one entry per channel."""
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
    x: Tensor, weight: Any, bias: Any, images: int, channels: int, pixels: int, groups: int, _: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    tables = [table for table in (weight, bias) if table is not None]
    if x.numel() != images * channels * pixels or channels % groups or any(len(t) != channels for t in tables):
        return None
    statistic = x.new_empty(images, groups)
    return _clone(x), statistic, statistic


def _reduce_dims(x: Tensor, dims: Any, keepdim: bool = False) -> Tensor | None:
    """Return a reduction over some dimensions of a floating-point tensor."""
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
    """Return attention's result where queries, keys and values have the same batch and heads."""
    heads = query.shape[:-2]
    if not (query.ndim >= 3 and heads == key.shape[:-2] == value.shape[:-2] and query.size(-1) == key.size(-1)):
        return None
    return query.new_empty((*query.shape[:-1], value.size(-1))) if key.size(-2) == value.size(-2) else None


def _upsample(x: Tensor, size: Any, *rest: Any) -> Tensor | None:
    """Return a resized image; None where its size is computed from factors."""
    if not size or any(isinstance(item, Tensor) for item in rest) or not x.is_contiguous():
        return None
    return x.new_empty((*x.shape[: x.ndim - len(size)], *size))


def _grid_sampler(x: Tensor, grid: Tensor, *_: Any) -> Tensor | None:
    return x.new_empty((*x.shape[:2], *grid.shape[1:3])) if x.size(0) == grid.size(0) and grid.size(-1) == 2 else None


# Each returns None for a case that it leaves to torch.
_SHAPE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.addmm.default: _addmm,
    aten.cat.default: _cat,
    aten.roll.default: _roll,
    aten.cumsum.default: _cumsum,
    aten.grid_sampler_2d.default: _grid_sampler,
    **dict.fromkeys((aten.upsample_bilinear2d.default, aten.upsample_nearest2d.default), _upsample),
    aten.upsample_bicubic2d.default: _upsample,
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
