"""Deterministic training: the same bits on the same device with the same versions, on a GPU too.

Some kernels of a GPU add numbers in an order that differs from call to call (atomic additions), and cuDNN and cuBLAS
may choose another kernel each time. Inside `deterministic_algorithms` PyTorch takes reproducible kernels only, and an
operation that has none is an error. Measurements belong outside: a deployed network runs without this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from passdeploy.errors import NondeterministicError, UsageError
from passdeploy.runtime.events import Listener, Warned, silent

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # the two with which cuBLAS is deterministic; the first is the faster one
_MEMORY: Any = torch.utils.deterministic  # torch's annotations lack some of the names
_CUDNN: Any = torch.backends.cudnn
_NO_KERNEL = re.compile(r"^(\S+) does not have a deterministic implementation")


@contextmanager
def deterministic_algorithms(
    is_on: bool, device: torch.device, *, network: nn.Module | None = None, listener: Listener = silent
) -> Iterator[None]:
    """Let PyTorch use deterministic algorithms only inside the block, and restore all its settings afterwards.

    Args:
        is_on: False changes nothing.
        device: of the work; cuBLAS and cuDNN are for a GPU.
        network: the network that is trained, to name the layer of an operation without a deterministic kernel.
        listener: is warned if CUDA has started too early.

    Raises:
        NondeterministicError: an operation has no deterministic kernel on this device.
        UsageError: the environment asks for a cuBLAS workspace that is not deterministic.
    """
    if not is_on:
        yield
        return
    if device.type == "cuda":
        require_cublas_workspace_(listener)
    with _restored_settings(), ExitStack() as stack:
        torch.use_deterministic_algorithms(True)
        _MEMORY.fill_uninitialized_memory = False  # costs time, and no code here reads such memory
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        if device.type == "cuda" and network is not None and _pools_adaptively(network):
            stack.enter_context(_DeterministicPooling())
        try:
            yield
        except RuntimeError as error:
            if (found := _NO_KERNEL.match(str(error))) is None:
                raise
            operation = found[1]
            where = _failing_layer(error.__traceback__, network) or _layers_like(operation, network)
            raise NondeterministicError(
                f"{operation}{where} has no deterministic kernel on this device ({device}).\n"
                "Set deterministic: false, which is faster and gives up that two runs agree bit by bit, "
                "or replace the operation."
            ) from error


def require_cublas_workspace_(listener: Listener = silent) -> None:
    """Set the environment variable that makes cuBLAS deterministic; warn where CUDA has started without it.

    Raises:
        UsageError: the user has set it to a workspace that is not deterministic.
    """
    given = os.environ.get(WORKSPACE_VARIABLE)
    if given is None and torch.cuda.is_initialized():
        listener(
            Warned(
                f"CUDA started in this process before {WORKSPACE_VARIABLE} was set: products of matrices may differ "
                f"from run to run.\nSet {WORKSPACE_VARIABLE}={_WORKSPACES[0]} before Python starts, or recipes to "
                "deterministic: false."
            )
        )
    if given is not None and given not in _WORKSPACES:
        raise UsageError(
            f"{WORKSPACE_VARIABLE}={given}, with which cuBLAS is not deterministic.\n"
            f"Set it to {_WORKSPACES[0]} or leave it out, or set deterministic: false."
        )
    os.environ[WORKSPACE_VARIABLE] = given or _WORKSPACES[0]


def reproducibility_facts(is_on: bool, device: torch.device) -> dict[str, Any]:
    """Describe for a summary what the bits of a training depend on, beside seed and versions."""
    facts: dict[str, Any] = {"deterministic": is_on, "device": str(device), "gpu": None}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "compute_capability": f"{major}.{minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cublas_workspace": os.environ.get(WORKSPACE_VARIABLE),
            # PyTorch's own settings, which we leave alone: "tf32" rounds the factors of a product to 10 bits
            "fp32_precision": {
                "matmul": torch.backends.cuda.matmul.fp32_precision,
                "convolution": _CUDNN.conv.fp32_precision,
            },
        }
    return facts


@contextmanager
def _restored_settings() -> Iterator[None]:
    """Restore PyTorch's settings of determinism after the block."""
    is_on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = _MEMORY.fill_uninitialized_memory
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=warns)
        _MEMORY.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic


def _failing_layer(trace: TracebackType | None, network: nn.Module | None) -> str:
    """Name the innermost module whose forward pass was running, as ` in layer 'features.3' (Conv2d)`; else nothing."""
    modules: list[nn.Module] = []
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
        trace = trace.tb_next
    if not modules:
        return ""
    innermost = modules[-1]
    for root in (network, *modules):
        for name, module in root.named_modules() if root is not None else ():
            if module is innermost and name:
                return f" in layer {name!r} ({type(innermost).__name__})"
    return f" in {type(innermost).__name__}"


def _layers_like(operation: str, network: nn.Module | None) -> str:
    """Name the layers whose class is called like an operation, which may have failed in the backward pass."""
    key = operation.split("_backward")[0].replace("_", "").lower()
    named = network.named_modules() if network is not None else ()
    layers = [name for name, module in named if type(module).__name__.lower() == key]
    return f" (of {', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''})" if layers else ""


def _pools_adaptively(network: nn.Module) -> bool:
    """Test whether a network has an adaptive pooling to more than one value, whose gradient is not deterministic."""
    sizes = [module.output_size for module in network.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    return any(size not in (1, (1, 1), [1, 1]) for size in sizes)


class _DeterministicPooling(TorchFunctionMode):
    """Replacement of adaptive average pooling, whose gradient on a GPU varies, by products of matrices."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Intercept every function of torch."""
        if func is F.adaptive_avg_pool2d:
            return adaptive_avg_pool2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Compute `F.adaptive_avg_pool2d` with products of matrices, which have a deterministic gradient on a GPU."""
    wanted = (output_size, output_size) if isinstance(output_size, int) or output_size is None else output_size
    for dim, size in zip((-2, -1), wanted, strict=True):
        if size is not None and size != input.size(dim):
            input = (input.movedim(dim, -1) @ _window_means(input.size(dim), size, input).T).movedim(-1, dim)
    return input


def _window_means(size: int, windows: int, like: Tensor) -> Tensor:
    """Build the matrix (windows, size) that averages over the windows of adaptive pooling; they may overlap."""
    # Made where it is used: a copy to a GPU would wait for all that is queued there.
    number = torch.arange(windows, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    starts, ends = number * size // windows, ((number + 1) * size + windows - 1) // windows
    is_inside = (starts <= position) & (position < ends)
    return (is_inside / is_inside.sum(1, keepdim=True)).to(like.dtype)
