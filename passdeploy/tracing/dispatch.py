"""An observer of every tensor operation of a running network, and of the line of code that each comes from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from passdeploy.models.modes import unfused_attention, unfused_rnns
from passdeploy.models.reduction_calls import REDUCTION_FUNCTIONS
from passdeploy.models.selected_channels import indices_in
from passdeploy.tracing.dispatch_mode import UncompiledMode
from passdeploy.tracing.meta_model import run_on_meta
from passdeploy.tracing.op_call import OpCall, aten


class CompositeFunctionMode(TorchFunctionMode):
    """A function mode that reports a composite function as one operation instead of the parts torch decomposes it into.

    An RMS norm, for example, decomposes into a mean of squares over channels, whose channels would have to stay, and
    attention becomes a different kernel on every device. Recurrent networks are the opposite case: one kernel hides
    the steps. The call is reported first with the initial states as its results, then every step.

    Args:
        on_op: called with each composite call and its result.
        around_reduction: makes a context that is entered around each reduction that `masked` can restrict to channels.
        around_size_derivation: makes a context that is entered around each function that takes its sizes from tensors,
            with no size stated by the model.
        on_leaving: called with each tensor whose values leave torch, as an array, a list, a number or a text.
        on_attention_weights: called with the weights that `nn.MultiheadAttention` returns, and the queries.
        is_meta: True if tensors are on the meta device.
    """

    def __init__(
        self,
        on_op: Callable[[OpCall], None],
        around_reduction: Callable[[], AbstractContextManager[None]],
        around_size_derivation: Callable[[], AbstractContextManager[None]],
        on_leaving: Callable[[Tensor], None],
        on_attention_weights: Callable[[Tensor, Tensor], None],
        *,
        is_meta: bool,
    ) -> None:
        super().__init__()
        self._on_op, self._on_leaving, self._is_meta = on_op, on_leaving, is_meta
        self._on_attention_weights = on_attention_weights
        self._around_reduction, self._around_size_derivation = around_reduction, around_size_derivation

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one torch function; called by torch for each of them."""
        if func is F.multi_head_attention_forward:  # torch does not show a mode the calls inside a function
            return self._run_multi_head_attention(func, args, kwargs or {})
        if func in _COMPOSITES:
            return self._run_as_one_op(func, args, kwargs or {})
        if func in _RECURRENT and len(args) > 3 and isinstance(args[3], bool):  # else the input is a packed sequence
            self._on_op(OpCall(_RECURRENT[func], args, {}, args[1]))
            with unfused_rnns():
                return func(*args)
        if func in _LEAVING:
            self._on_leaving(args[0])
        if func in _SIZE_DERIVING:
            with self._around_size_derivation():
                return func(*args, **(kwargs or {}))
        if func in REDUCTION_FUNCTIONS:
            with self._around_reduction():
                return (_normalize_by_broadcast if func is F.normalize else func)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _run_multi_head_attention(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Run attention as one operation, whether or not it also returns its weights, which few callers use."""
        queries, attention = list[Tensor](), F.scaled_dot_product_attention

        def attend(*args: Any, **kwargs: Any) -> Any:
            queries.append(args[0])
            return self._run_as_one_op(attention, args, kwargs)

        given = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | dict(kwargs)
        with _replaced(F, "scaled_dot_product_attention", attend):
            output, _ = func(**{**given, "need_weights": False})
        if not given.get("need_weights", True):
            return output, None
        with _disable_current_modes():
            weights = func(**given)[1]
        self._on_attention_weights(weights, queries[0])
        return output, weights

    def _run_as_one_op(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with _disable_current_modes():
            result = run_on_meta(func, args, kwargs) if self._is_meta else func(*args, **kwargs)
            self._on_op(OpCall(_COMPOSITES[func], args, kwargs, result))
        return result


_ATTENTION_ARGUMENTS = tuple(signature(F.multi_head_attention_forward).parameters)

_RMS_NORM = torch.ops.aten.rms_norm.default
_COMPOSITES: dict[Callable[..., Any], torch._ops.OpOverload] = {
    torch.rms_norm: _RMS_NORM,
    F.rms_norm: _RMS_NORM,
    F.scaled_dot_product_attention: torch.ops.aten.scaled_dot_product_attention.default,
    torch._weight_norm: torch.ops.aten._weight_norm.default,
}


def _normalize_by_broadcast(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """Compute `F.normalize` by broadcasting; torch expands the norm, which then seems to have channels of its own."""
    return torch.div(input, input.norm(p, dim, keepdim=True).clamp_min(eps), out=out)


_SIZE_DERIVING = {
    *(torch.flatten, Tensor.flatten, torch.chunk, Tensor.chunk, torch.unbind, Tensor.unbind),
    *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, F.adaptive_avg_pool2d),
}


# Whoever gets these values may use them in any way, and what comes back into torch has no labels.
_LEAVING = {
    *(Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.item, Tensor.__dlpack__, Tensor.data_ptr),
    *(Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__complex__, Tensor.__bool__),
    *(Tensor.__repr__, Tensor.__format__, Tensor.__reduce_ex__, Tensor.untyped_storage),
}


_RECURRENT: dict[Callable[..., Any], torch._ops.OpOverload] = {
    torch.lstm: torch.ops.aten.lstm.input,
    torch.gru: torch.ops.aten.gru.input,
    torch.rnn_tanh: torch.ops.aten.rnn_tanh.input,
    torch.rnn_relu: torch.ops.aten.rnn_relu.input,
}


# torch has a tag for these, `inplace_view`, but `squeeze_` lacks it.
_RESHAPING_IN_PLACE = {aten.squeeze_, aten.unsqueeze_, aten.transpose_, aten.t_, aten.as_strided_}


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """Give a name of a module another value inside the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class OpObserver(UncompiledMode):
    """A dispatch mode that calls `on_op` after every tensor operation; subclasses implement it."""

    def __init__(self, *, is_meta: bool) -> None:
        super().__init__()
        self.is_meta = is_meta
        self._selecting: frozenset[int] = frozenset()  # of channels of a fixed output: no operation of the model's code

    def on_op(self, call: OpCall) -> None:
        """Handle one operation that has run, with its results."""
        raise AssertionError("a subclass implements on_op")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and report it; called by torch for each of them."""
        given, reported = kwargs or {}, args
        if func.overloadpacket in _RESHAPING_IN_PLACE:
            before = args[0].detach()  # keeps the shape from before the operation
            self.on_alias(args[0], before)
            reported = (before, *args[1:])
        result = run_on_meta(func, args, given) if self.is_meta else func(*args, **given)
        if not (func is aten.index_select.default and id(args[2]) in self._selecting):
            self.on_op(OpCall(func, reported, given, result))
        return result

    def on_alias(self, tensor: Tensor, alias: Tensor) -> None:
        """Handle a tensor that stands for another in the next call; nothing to do here, subclasses may label it."""

    def run_model(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run `model` under this mode and return its outputs; attention and other composites are one operation each."""
        composites = CompositeFunctionMode(
            self.on_op,
            self.around_reduction,
            self.around_size_derivation,
            self.on_leaving,
            self.on_attention_weights,
            is_meta=self.is_meta,
        )
        self._selecting = indices_in(model)
        with unfused_attention(), composites, self:
            return model(*inputs)

    def around_reduction(self) -> AbstractContextManager[None]:
        """Make the context that is entered around a reduction over channels; none here, subclasses may have one."""
        return nullcontext()

    def on_leaving(self, tensor: Tensor) -> None:
        """Handle a tensor whose values leave torch; nothing to do here, subclasses may protect it."""

    def on_attention_weights(self, weights: Tensor, queries: Tensor) -> None:
        """Handle the weights that attention returns beside its output; nothing to do here."""

    is_deriving_sizes = False  # torch takes the sizes of the running operation from its tensors

    @contextmanager
    def around_size_derivation(self) -> Iterator[None]:
        """Set `is_deriving_sizes` inside this context."""
        self.is_deriving_sizes = True
        try:
            yield
        finally:
            self.is_deriving_sizes = False


def source_line() -> str:
    """Return file and line of the innermost running frame of the model's code, or else of a torch module."""
    frame, torch_module = sys._getframe(1), ""
    while frame is not None and frame.f_code is not _RUN_MODEL_CODE:
        owner, name = owner_of(frame.f_code.co_filename)
        if owner == "model":
            return f"{name}:{frame.f_lineno}"
        if owner == "torch module" and not torch_module:
            torch_module = f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return torch_module


_RUN_MODEL_CODE = OpObserver.run_model.__code__  # the frames of the model are inside this one


_PASSDEPLOY_FOLDER = Path(__file__).parents[1]
# Networks of this package count as the model's code, like those of anybody else.
_NETWORK_FILES = {_PASSDEPLOY_FOLDER / "models" / name for name in ("cifar_resnet.py", "prompt.py")}


@cache
def owner_of(filename: str) -> tuple[str, str]:
    """Return the owner of a source file ("model", "torch module", "torch", "passdeploy"), and the file's name."""
    file = Path(filename)
    if "torch" in file.parts:
        is_module = file.parent.name == "modules" and file.name != "module.py"
        return ("torch module" if is_module else "torch"), file.name
    is_ours = _PASSDEPLOY_FOLDER in file.parents and file not in _NETWORK_FILES
    return ("passdeploy" if is_ours else "model"), file.name
