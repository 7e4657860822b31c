"""See every tensor operation of a network that runs, and which line of its code it comes from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from passdeploy.models.modes import unfused_attention, unfused_rnns
from passdeploy.models.reduction_calls import REDUCTION_FUNCTIONS
from passdeploy.tracing.meta_model import run_on_meta
from passdeploy.tracing.op_call import OpCall


class CompositeFunctionMode(TorchFunctionMode):
    """Shows functions that torch would take apart as one operation: their parts hide what they are.

    An RMS norm, say, becomes a mean of squares over channels, which nobody could cut, and attention becomes another
    kernel on every device. A recurrent network is the other way round: one kernel hides its steps, which are shown
    after the states that they start from.

    Args:
        tell: hears of each call, and what it returned.
        taking: is entered around each statistic that can be restricted to a part of the channels.
        deriving: is entered around each function that reads sizes off its tensors and states none.
        is_sketch: whether tensors have no values.
    """

    def __init__(
        self,
        on_op: Callable[[OpCall], None],
        around_reduction: Callable[[], AbstractContextManager[None]],
        around_size_derivation: Callable[[], AbstractContextManager[None]],
        *,
        is_meta: bool,
    ) -> None:
        super().__init__()
        self._on_op, self._around_reduction, self._around_size_derivation, self._is_meta = (
            on_op,
            around_reduction,
            around_size_derivation,
            is_meta,
        )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any function of torch, on its way."""
        if func is F.multi_head_attention_forward:  # what a function calls in turn, torch does not show to a mode
            attend = partial(self._run_as_one_op, F.scaled_dot_product_attention)
            with patch.object(F, "scaled_dot_product_attention", lambda *args, **kwargs: attend(args, kwargs)):
                return func(*args, **(kwargs or {}))
        if func in _COMPOSITES:
            return self._run_as_one_op(func, args, kwargs or {})
        if func in _RECURRENT and len(args) > 3 and isinstance(args[3], bool):  # else it is a packed sequence
            self._on_op(OpCall(_RECURRENT[func], args, {}, args[1]))
            with unfused_rnns():
                return func(*args)
        if func in _SIZE_DERIVING:
            with self._around_size_derivation():
                return func(*args, **(kwargs or {}))
        if func in REDUCTION_FUNCTIONS:
            with self._around_reduction():
                return (_normalize_by_broadcast if func is F.normalize else func)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _run_as_one_op(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with _disable_current_modes():
            result = run_on_meta(func, args, kwargs) if self._is_meta else func(*args, **kwargs)
            self._on_op(OpCall(_COMPOSITES[func], args, kwargs, result))
        return result


_RMS_NORM = torch.ops.aten.rms_norm.default
_COMPOSITES: dict[Callable[..., Any], torch._ops.OpOverload] = {
    torch.rms_norm: _RMS_NORM,
    F.rms_norm: _RMS_NORM,
    F.scaled_dot_product_attention: torch.ops.aten.scaled_dot_product_attention.default,
}


def _normalize_by_broadcast(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """`F.normalize`, by broadcasting: the norm that it expands to every channel would seem to have channels itself."""
    return torch.div(input, input.norm(p, dim, keepdim=True).clamp_min(eps), out=out)


_SIZE_DERIVING = {
    *(torch.flatten, Tensor.flatten, torch.chunk, Tensor.chunk, torch.unbind, Tensor.unbind),
    *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, F.adaptive_avg_pool2d),
}


_RECURRENT: dict[Callable[..., Any], torch._ops.OpOverload] = {
    torch.lstm: torch.ops.aten.lstm.input,
    torch.gru: torch.ops.aten.gru.input,
    torch.rnn_tanh: torch.ops.aten.rnn_tanh.input,
    torch.rnn_relu: torch.ops.aten.rnn_relu.input,
}


class OpObserver(TorchDispatchMode):
    """Hears of every tensor operation after it ran; a subclass says what to make of it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while a network is watched; torch's guard against it would cost more than the rules."""
        return False

    def __init__(self, *, is_meta: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_meta = is_meta

    def on_op(self, call: OpCall) -> None:
        """One operation, with what came out."""
        raise AssertionError("a subclass says what to make of an operation")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any operation, on its way."""
        given = kwargs or {}
        result = run_on_meta(func, args, given) if self.is_meta else func(*args, **given)
        self.on_op(OpCall(func, args, given, result))
        return result

    def run_model(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run `model` and return its outputs; attention and other composites show as what they are."""
        whole = CompositeFunctionMode(
            self.on_op, self.around_reduction, self.around_size_derivation, is_meta=self.is_meta
        )
        with unfused_attention(), whole, self:
            return model(*inputs)

    def around_reduction(self) -> AbstractContextManager[None]:
        """What to do around a statistic that the network takes."""
        return nullcontext()

    is_deriving_sizes = False  # whether the sizes of what happens now are read off its tensors

    @contextmanager
    def around_size_derivation(self) -> Iterator[None]:
        """Know that they are."""
        self.is_deriving_sizes = True
        try:
            yield
        finally:
            self.is_deriving_sizes = False


def source_line() -> str:
    """File and line of the innermost running frame of the model's own code, or else of a torch module."""
    frame, torch_module = sys._getframe(1), ""
    while frame is not None and frame.f_code is not _RUN_MODEL_CODE:
        owner, name = _owner_of(frame.f_code.co_filename)
        if owner == "model":
            return f"{name}:{frame.f_lineno}"
        if owner == "torch module" and not torch_module:
            torch_module = f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return torch_module


_RUN_MODEL_CODE = OpObserver.run_model.__code__  # who ran the model


_PASSDEPLOY_FOLDER = Path(__file__).parents[1]
_NETWORK_FILES = {
    _PASSDEPLOY_FOLDER / "models" / name for name in ("cifar_resnet.py", "prompt.py")
}  # models like any other


@cache
def _owner_of(filename: str) -> tuple[str, str]:
    """Whose code a file is (model, torch module, torch, ours), and its name."""
    file = Path(filename)
    if "torch" in file.parts:
        is_module = file.parent.name == "modules" and file.name != "module.py"
        return ("torch module" if is_module else "torch"), file.name
    is_ours = _PASSDEPLOY_FOLDER in file.parents and file not in _NETWORK_FILES
    return ("ours" if is_ours else "model"), file.name
