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
    bindings: tuple[str, ...]  # distributions, of which one is installed
    libraries: tuple[str, ...]  # the same; they may come with the system instead
    alternative: str  # what the user can do without it


_TENSORRT_PACKAGES: Mapping[str, _TensorRTPackage] = {
    "tensorrt": _TensorRTPackage(
        module="tensorrt",
        title="TensorRT",
        oldest=(10, 3),
        too_new=12,
        extra="'passdeploy[trt]' (TensorRT 11) or 'passdeploy[trt10]'",
        bindings=("tensorrt-cu13-bindings", "tensorrt-cu12-bindings", "tensorrt"),
        libraries=("tensorrt-cu13-libs", "tensorrt-cu12-libs"),
        alternative="ONNX export works without it; --flavour rtx builds without a GPU.",
    ),
    "rtx": _TensorRTPackage(
        module="tensorrt_rtx_bindings",
        title="TensorRT for RTX",
        oldest=(1, 7),
        too_new=2,
        extra="'passdeploy[rtx]'",
        bindings=("tensorrt-rtx-cu13-bindings",),
        libraries=("tensorrt-rtx-cu13-libs",),
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
        half = half_installed(flavour)
        if isinstance(error, ModuleNotFoundError) and error.name in (package.module, f"{package.module}_bindings"):
            lines = (half or f"{package.title} is not installed.", install, package.alternative)
        else:
            _, release_text = _installed(package.bindings) or ("", "(of unknown version)")
            lines = (
                f"the libraries of {package.title} {release_text} do not load: {first_line(error)}",
                half or "LD_LIBRARY_PATH leads to another release, or a library of CUDA is missing.",
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


def half_installed(flavour: Flavour) -> str | None:
    """Say which half of TensorRT is installed without the other, its bindings or its libraries; None if both are.

    The libraries may have come with the system, so this explains a failure and is none by itself.
    """
    package = _TENSORRT_PACKAGES[flavour]
    bindings, libraries = _installed(package.bindings), _installed(package.libraries)
    # The package `tensorrt` may be all there is: on a Jetson and in containers its libraries come with the system.
    if bindings is not None and libraries is None and "bindings" in bindings[0]:
        missing = bindings[0].replace("bindings", "libs")
        return f"{bindings[0]} {bindings[1]} is installed without {missing}."
    if libraries is not None and bindings is None:
        missing = libraries[0].replace("libs", "bindings")
        return f"{libraries[0]} {libraries[1]} is installed without {missing}."
    return None


def _installed(distributions: tuple[str, ...]) -> tuple[str, str] | None:
    """Return name and version of the first of these distributions that is installed, from its metadata."""
    for name in distributions:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None
