"""Import of TensorRT, in two flavours with one API; every other module gets it from here at run time.

`tensorrt` (10.3 and later, 11) builds on the GPU the engine will run on; `rtx` (TensorRT for RTX) builds anywhere.
The part of the module that passdeploy uses is a Protocol, checked by mypy against both major releases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, Protocol, cast

from passdeploy.errors import MissingError, UsageError, first_line
from passdeploy.runtime.cuda_driver import require_cuda, require_gpu

if TYPE_CHECKING:
    import tensorrt

Flavour = Literal["tensorrt", "rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "rtx")


class TensorRT(Protocol):
    """The part of the `tensorrt` module that passdeploy uses; the same names exist in both flavours."""

    __version__: str

    @property
    def Builder(self) -> Callable[[tensorrt.ILogger], tensorrt.Builder]: ...
    @property
    def OnnxParser(
        self,
    ) -> Callable[[tensorrt.INetworkDefinition, tensorrt.ILogger], tensorrt.OnnxParser]: ...
    @property
    def Refitter(self) -> Callable[[tensorrt.ICudaEngine, tensorrt.ILogger], tensorrt.Refitter]: ...
    @property
    def OnnxParserRefitter(
        self,
    ) -> Callable[[tensorrt.Refitter, tensorrt.ILogger], tensorrt.OnnxParserRefitter]: ...
    @property
    def Runtime(self) -> Callable[[tensorrt.ILogger], tensorrt.Runtime]: ...
    @property
    def ILogger(self) -> type[tensorrt.ILogger]: ...
    @property
    def NetworkDefinitionCreationFlag(self) -> type[tensorrt.NetworkDefinitionCreationFlag]: ...
    @property
    def MemoryPoolType(self) -> type[tensorrt.MemoryPoolType]: ...
    @property
    def ProfilingVerbosity(self) -> type[tensorrt.ProfilingVerbosity]: ...
    @property
    def BuilderFlag(self) -> type[tensorrt.BuilderFlag]: ...
    @property
    def HardwareCompatibilityLevel(self) -> type[tensorrt.HardwareCompatibilityLevel]: ...
    @property
    def TensorIOMode(self) -> type[tensorrt.TensorIOMode]: ...
    @property
    def IProfiler(self) -> type[tensorrt.IProfiler]: ...
    @property
    def LayerInformationFormat(self) -> type[tensorrt.LayerInformationFormat]: ...


if TYPE_CHECKING:
    _conforms: TensorRT = tensorrt


@dataclass(frozen=True)
class _TensorRTPackage:
    """The packages, supported releases and extras of one flavour."""

    module: str
    title: str
    oldest: tuple[int, int]  # the oldest supported release: major, minor
    too_new: int  # the first major release that is not supported
    extra: str
    distributions: tuple[str, ...]  # of the bindings, to find their version where the libraries are missing
    alternative: str  # what the user can do without it


_TENSORRT_PACKAGES: Mapping[str, _TensorRTPackage] = {
    "tensorrt": _TensorRTPackage(
        module="tensorrt",
        title="TensorRT",
        oldest=(10, 3),
        too_new=12,
        extra="'passdeploy[trt]' (TensorRT 11) or 'passdeploy[trt10]'",
        distributions=("tensorrt-cu13-bindings", "tensorrt-cu12-bindings", "tensorrt"),
        alternative="ONNX export works without it; --flavour rtx builds without a GPU.",
    ),
    "rtx": _TensorRTPackage(
        module="tensorrt_rtx_bindings",
        title="TensorRT for RTX",
        oldest=(1, 7),
        too_new=2,
        extra="'passdeploy[rtx]'",
        distributions=("tensorrt-rtx-cu13-bindings",),
        alternative="ONNX export works without it.",
    ),
}

NO_DRIVER_HINT = (
    "Two ways on: --bundle writes what the target needs to build it there; --flavour rtx builds here, for RTX GPUs."
)


def load_trt(flavour: Flavour) -> TensorRT:
    """Import TensorRT, after checking that its use cannot crash the process.

    Raises:
        UsageError: unknown flavour.
        MissingError: not installed, without its libraries, an unsupported release, or (for `tensorrt`) no GPU.
    """
    if flavour not in _TENSORRT_PACKAGES:
        raise UsageError(f"unknown TensorRT flavour {flavour!r}: there are {' and '.join(_TENSORRT_PACKAGES)}.")
    package = _TENSORRT_PACKAGES[flavour]
    # The driver is checked first: without one, it would not help to install TensorRT.
    driver = require_gpu("a TensorRT engine", hint=NO_DRIVER_HINT) if flavour == "tensorrt" else None
    install = f"Install it with: pip install {package.extra}"
    try:
        module = import_module(package.module)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package.module:
            lines = (f"{package.title} is not installed.", install, package.alternative)
        else:
            release_text = f"{package.title} {_bindings_version(package)}"
            lines = (
                f"the libraries of {release_text} do not load: {first_line(error)}",
                "The matching -libs package is missing, or LD_LIBRARY_PATH leads to another release.",
                install,
            )
        raise MissingError("\n".join(lines)) from error
    release = _release(str(module.__version__))
    if not (package.oldest <= release and release[0] < package.too_new):
        supported = f">={package.oldest[0]}.{package.oldest[1]},<{package.too_new}"
        raise MissingError(f"found {package.title} {module.__version__}, supported is {supported}.\n{install}")
    if driver is not None:
        require_cuda(driver, 13 if release[0] >= 11 else 12, f"TensorRT {module.__version__}")
    return cast(TensorRT, module)


def _release(text: str) -> tuple[int, int]:
    """Parse the major and minor number of a version such as "10.16.1.11"."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _bindings_version(package: _TensorRTPackage) -> str:
    """Return the version of the installed bindings from their metadata."""
    for name in package.distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(of unknown version)"
