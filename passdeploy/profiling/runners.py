"""Ways to run a network, all of one shape: prepare a batch, then run it as often as you like.

A runner holds nothing but what one call needs; inputs are bound before the clock starts. Which provider
really runs is the session's own answer, not the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from passdeploy.errors import MissingError, UsageError, first_line, require
from passdeploy.export.ort_session import open_session
from passdeploy.profiling.cuda import captured
from passdeploy.profiling.execution import Setting

if TYPE_CHECKING:
    from onnx import ModelProto


_CALLS_UNTIL_CAPTURED = 3  # the compiler's graphs are captured in the second call and settled in the third


class Runner(Protocol):
    """Something that can be timed."""

    name: str  # "dense" or "slim"
    artifact: str  # the file, or what else is run
    backend: str
    device: str
    precision: str

    def prepare(self, images: Tensor) -> None:
        """Take the batch that every following `run` uses, shape (batch, 3, height, width)."""
        ...

    def run(self) -> None:
        """One inference on the prepared batch."""
        ...


class TorchRunner:
    """PyTorch eager, in eval and inference mode, on a copy of the module.

    Args:
        name: of the network.
        module: the network; it is left as it was.
        artifact: the file it came from; its class where it came from none.
        setting: device, precision, layout, and whether a CUDA graph is captured.
    """

    backend = "torch"

    def __init__(self, name: str, module: nn.Module, *, artifact: str = "", setting: Setting | None = None) -> None:
        self.setting = setting or Setting()
        self.name, self.artifact = name, artifact or type(module).__name__
        self.device, self.precision = self.setting.device, self.setting.precision
        self.module = self.setting.placed(deepcopy(module)).eval()
        self.images = self._staged = torch.empty(0)
        self._replay: Callable[[], None] | None = None

    def prepare(self, images: Tensor) -> None:
        """Move the batch to the device; with a CUDA graph, capture a call.

        Raises:
            UsageError: the network cannot be captured.
        """
        self._staged = self.setting.staged(images)
        self.images = self._staged.to(self.device)
        if self.setting.cuda_graph:
            self._replay = captured(self._forward, self.artifact)

    def run(self) -> None:
        """One forward pass; on a GPU it is queued, the clock waits for it."""
        if self._replay is not None:
            self._replay()
        else:
            self._forward()

    def copy(self) -> None:
        """The batch once more from the host to the device."""
        self.images.copy_(self._staged, non_blocking=True)

    def run_eagerly(self) -> None:
        """One forward pass operator by operator, whatever `run` replays or has compiled."""
        with torch.inference_mode():
            self.module(self.images)

    def _forward(self) -> None:
        self.run_eagerly()


class CompiledRunner(TorchRunner):
    """PyTorch through `torch.compile`; the first call of a shape compiles, which `prepare` waits for.

    With a CUDA graph, it is the compiler that captures (`mode="reduce-overhead"`).
    """

    backend = "compile"

    def __init__(self, name: str, module: nn.Module, *, artifact: str = "", setting: Setting | None = None) -> None:
        super().__init__(name, module, artifact=artifact, setting=setting)
        torch._dynamo.reset()  # what was compiled for another batch would make this one dynamic
        self._compiled: Any = torch.compile(self.module, mode="reduce-overhead" if self.setting.cuda_graph else None)

    def prepare(self, images: Tensor) -> None:
        """Move the batch to the device, and compile for it.

        Raises:
            MissingError: this machine cannot compile: there is no C++ compiler, or no Triton.
        """
        self._staged = self.setting.staged(images)
        self.images = self._staged.to(self.device)
        try:
            for _ in range(_CALLS_UNTIL_CAPTURED if self.setting.cuda_graph else 1):
                self.run()
        except Exception as error:  # the compiler's own, whatever it wraps
            raise MissingError(
                f"torch.compile cannot compile {self.artifact} here: {first_line(error)}\n"
                "It needs a C++ compiler on the CPU, Triton on a GPU. Leave compile out of --backend."
            ) from error

    def _forward(self) -> None:
        with torch.inference_mode():
            self._compiled(self.images)


class ProgramRunner(TorchRunner):
    """An exported program as it is; with TensorRT inside, `backend` is `torch-trt`.

    Its precision is part of it, and it knows neither `eval` nor another layout.
    """

    def __init__(
        self,
        name: str,
        program: Callable[[Tensor], object],
        *,
        artifact: str,
        backend: str,
        device: str,
        precision: str,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__(
            name, _Called(program), artifact=artifact, setting=Setting(device=device, cuda_graph=cuda_graph)
        )
        self.backend, self.precision = backend, precision


class _Called(nn.Module):
    """A function as a module without submodules, so that nothing is copied, converted or put into a mode."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._held = [function]

    def forward(self, images: Tensor) -> object:
        return self._held[0](images)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Called:
        return self


PROVIDERS = {
    "ort": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-trt": "TensorrtExecutionProvider",
}


class OrtRunner:
    """ONNX Runtime with input and output bound, so that no copy is timed; the provider that was asked for runs."""

    def __init__(
        self,
        name: str,
        source: Path | ModelProto,
        *,
        threads: int,
        backend: str = "ort",
        profile_to: Path | None = None,
    ) -> None:
        self.name, self.artifact = name, source.name if isinstance(source, Path) else "graph"
        self.backend, self.device = backend, "cpu" if backend == "ort" else "cuda"
        self.source, self.threads = source, threads
        self.session = open_session(source, threads=threads, provider=PROVIDERS[backend], profile_to=profile_to)
        self.precision: str = self.session.get_modelmeta().custom_metadata_map.get("precision", "as in the file")
        self.images = torch.empty(0)
        self._binding: Any = None

    def prepare(self, images: Tensor) -> None:
        """Bind the batch, and let ONNX Runtime allocate the output.

        Raises:
            UsageError: the file takes images of another shape, or has another, fixed batch.
        """
        wanted = self.session.get_inputs()[0]
        sizes = zip(wanted.shape, images.shape, strict=True)
        if any(isinstance(fixed, int) and fixed != given for fixed, given in sizes):
            raise UsageError(
                f"{self.artifact} takes images of shape {wanted.shape}, asked was {list(images.shape)}.\n"
                "Export it again for this shape with: passdeploy export --onnx"
            )
        self.images, self._binding = images, self.session.io_binding()
        if self.device == "cpu":
            self._binding.bind_cpu_input(wanted.name, images.contiguous().numpy())
            self._binding.bind_output(self.session.get_outputs()[0].name)
            return
        ort = require("onnxruntime", extra="gpu")
        self._binding.bind_ortvalue_input(
            wanted.name, ort.OrtValue.ortvalue_from_numpy(images.contiguous().numpy(), "cuda", 0)
        )
        self._binding.bind_output(self.session.get_outputs()[0].name, "cuda", 0)  # it stays on the device

    def run(self) -> None:
        """One inference; on a GPU it is over when the call returns, so the host's clock times it."""
        self.session.run_with_iobinding(self._binding)
        if self.device != "cpu":
            self._binding.synchronize_outputs()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch on `threads` threads inside the block, and as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
