"""Runners: run a network in PyTorch, torch.compile, an exported program or ONNX Runtime through one interface.

A runner prepares a batch once and then runs it any number of times. Inputs are bound to memory before the clock starts,
so that no copy is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from passdeploy.errors import MissingError, UsageError, first_line, require
from passdeploy.export.ort_session import open_session
from passdeploy.models.cloning import deep_copy
from passdeploy.profiling.cuda import capture_graph
from passdeploy.profiling.execution import Setting
from passdeploy.runtime.device_memory import is_out_of_memory

if TYPE_CHECKING:
    from onnx import ModelProto


_CALLS_UNTIL_CAPTURED = 3  # the compiler captures its CUDA graph in the second call and replays it from the third on


class Runner(Protocol):
    """The interface of everything that can be timed."""

    name: str  # "dense" or "slim"
    artifact: str  # name of the file or module that is run
    backend: str
    device: str
    precision: str

    def prepare(self, images: Tensor, *others: Tensor) -> None:
        """Set the batch that every following `run` uses, shape (batch, 3, height, width), and further inputs."""
        ...

    def run(self) -> None:
        """Run the prepared batch once."""
        ...


class TorchRunner:
    """PyTorch eager, in eval and inference mode, on a copy of the module.

    Args:
        name: of the network.
        module: the network; it is left as it was.
        artifact: the file that the module came from; empty: its class is named instead.
        setting: device, precision, layout, and whether a CUDA graph is captured.
    """

    backend = "torch"

    def __init__(self, name: str, module: nn.Module, *, artifact: str = "", setting: Setting | None = None) -> None:
        self.setting = setting or Setting()
        self.name, self.artifact = name, artifact or type(module).__name__
        self.device, self.precision = self.setting.device, self.setting.precision
        self.module = self.setting.convert_(deep_copy(module)).eval()
        self.images = self._host_images = torch.empty(0)
        self._others: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None

    def prepare(self, images: Tensor, *others: Tensor) -> None:
        """Move the batch to the device; with a CUDA graph, capture a call.

        Raises:
            UsageError: the network cannot be captured.
        """
        self._move_to_device(images, *others)
        if self.setting.cuda_graph:
            self._replay = capture_graph(self._forward, self.artifact)

    def run(self) -> None:
        """Run one forward pass; on a GPU it is only queued, and the clock waits for it."""
        if self._replay is not None:
            self._replay()
        else:
            self._forward()

    def copy(self) -> None:
        """Copy the batch from the host to the device again."""
        self.images.copy_(self._host_images, non_blocking=True)

    def run_eagerly(self) -> None:
        """Run one forward pass operator by operator, also where `run` replays a graph or compiled code."""
        with torch.inference_mode():
            self.module(self.images, *self._others)

    def _move_to_device(self, images: Tensor, *others: Tensor) -> None:
        self._host_images = self._host_batch(images)
        self.images = self._host_images.to(self.device)
        self._others = tuple(self._host_batch(other).to(self.device) for other in others)

    def _host_batch(self, tensor: Tensor) -> Tensor:
        """Convert an input to the form in which the network takes it, in host memory."""
        return self.setting.to_host_batch(tensor)

    def _forward(self) -> None:
        """Run the pass that `run` times and a CUDA graph captures."""
        self.run_eagerly()


class CompiledRunner(TorchRunner):
    """PyTorch through `torch.compile`; the first call with a shape compiles, so `prepare` runs it.

    A CUDA graph is captured by the compiler (`mode="reduce-overhead"`).
    """

    backend = "compile"

    def __init__(self, name: str, module: nn.Module, *, artifact: str = "", setting: Setting | None = None) -> None:
        super().__init__(name, module, artifact=artifact, setting=setting)
        mode = "reduce-overhead" if self.setting.cuda_graph else None
        self._compiled: Any = torch.compile(_own_function(self.module), mode=mode, dynamic=False)

    def prepare(self, images: Tensor, *others: Tensor) -> None:
        """Move the batch to the device and compile the network for it; there are no other inputs.

        Raises:
            MissingError: this machine cannot compile: there is no C++ compiler, or no Triton.
        """
        self._move_to_device(images, *others)
        try:
            for _ in range(_CALLS_UNTIL_CAPTURED if self.setting.cuda_graph else 1):
                self.run()
        except Exception as error:  # the compiler raises errors of many types
            if is_out_of_memory(error):
                raise
            raise MissingError(
                f"torch.compile cannot compile {self.artifact} here: {first_line(error)}\n"
                "It needs a C++ compiler on the CPU, Triton on a GPU. Leave compile out of --backend."
            ) from error

    def _forward(self) -> None:
        """Run the compiled network."""
        with torch.inference_mode():
            self._compiled(self.images)


def _own_function(module: nn.Module) -> Callable[[Tensor], object]:
    """Make a function that calls `module`, with a code object of its own.

    The compiler caches what it compiled by code object, and networks of one class share that of their `forward`: the
    next network of the class would be compiled as a variant of the last one, and with dynamic shapes; after a few of
    them the compiler gives up. Emptying its cache would make every network that is still in use compile again.
    """

    def call(images: Tensor) -> object:
        return module(images)

    code = call.__code__.replace(co_name=f"network_{next(_NETWORK_NUMBERS)}")
    return FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)


_NETWORK_NUMBERS = count()


class ProgramRunner(TorchRunner):
    """An exported program, unchanged; for a program with TensorRT inside, `backend` is `torch-trt`.

    Its precision and memory format are fixed in the file.
    """

    def __init__(
        self,
        name: str,
        program: Callable[..., object],
        *,
        artifact: str,
        backend: str,
        device: str,
        precision: str,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__(
            name, _FunctionModule(program), artifact=artifact, setting=Setting(device=device, cuda_graph=cuda_graph)
        )
        self.backend, self.precision = backend, precision

    def _host_batch(self, tensor: Tensor) -> Tensor:
        """Keep the type of the input, which the file fixes."""
        return tensor.contiguous().pin_memory() if torch.device(self.device).type == "cuda" else tensor.contiguous()


class _FunctionModule(nn.Module):
    """A module that calls a function; it has no submodules, so nothing is copied, converted or put into eval mode."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self._function = [function]  # in a list, since a module would register another module as its child

    def forward(self, *inputs: Tensor) -> object:
        """Call the function."""
        return self._function[0](*inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FunctionModule:
        return self


PROVIDERS = {
    "ort": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-trt": "TensorrtExecutionProvider",
}


class OrtRunner:
    """ONNX Runtime with input and output bound to memory; opening the session checks that the provider really runs."""

    def __init__(
        self,
        name: str,
        source: Path | ModelProto,
        *,
        threads: int,
        backend: str = "ort",
        device: str = "cuda",
        profile_to: Path | None = None,
    ) -> None:
        self.name, self.artifact = name, source.name if isinstance(source, Path) else "graph"
        self.backend, self.device = backend, "cpu" if backend == "ort" else device
        self.source, self.threads, self._gpu = source, threads, torch.device(self.device).index or 0
        self.session = open_session(
            source, threads=threads, provider=PROVIDERS[backend], gpu=self._gpu, profile_to=profile_to
        )
        self.precision: str = self.session.get_modelmeta().custom_metadata_map.get("precision", "as in the file")
        self.images = torch.empty(0)
        self._binding: Any = None
        self.inputs: list[Tensor] = []  # the images first

    def prepare(self, images: Tensor, *others: Tensor) -> None:
        """Bind the batch to the input and let ONNX Runtime allocate the output.

        Raises:
            UsageError: the file takes images of another shape, or has another, fixed batch.
        """
        self.images, self._binding = images, self.session.io_binding()
        self.inputs = [each.contiguous() for each in (images, *others)]  # the binding does not keep their memory
        for network_input, values in zip(self.session.get_inputs(), self.inputs, strict=False):
            self._bind(network_input, values)
        output = self.session.get_outputs()[0].name
        if self.device == "cpu":
            self._binding.bind_output(output)
        else:
            self._binding.bind_output(output, "cuda", self._gpu)  # the output stays on the device

    def _bind(self, network_input: Any, values: Tensor) -> None:
        sizes = list(zip(network_input.shape, values.shape, strict=False))
        is_other = any(isinstance(fixed, int) and fixed > 0 and fixed != given for fixed, given in sizes)
        if is_other or len(network_input.shape) != values.ndim:
            raise UsageError(
                f"{self.artifact} takes images of shape {network_input.shape}, asked was {list(values.shape)}.\n"
                "Export it again for this shape with: passdeploy export --onnx"
            )
        array = values.numpy()
        if self.device == "cpu":
            self._binding.bind_cpu_input(network_input.name, array)
            return
        ort = require("onnxruntime", extra="gpu")
        value = ort.OrtValue.ortvalue_from_numpy(array, "cuda", self._gpu)
        self._binding.bind_ortvalue_input(network_input.name, value)

    def run(self) -> None:
        """Run once and wait until it is done, on a GPU too, so that the host's clock can time it."""
        self.session.run_with_iobinding(self._binding)
        if self.device != "cpu":
            self._binding.synchronize_outputs()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set PyTorch's number of CPU threads inside the block and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
