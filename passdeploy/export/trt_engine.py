"""From an ONNX file to a TensorRT engine and a sidecar that says what it is.

The one place that imports TensorRT, in two flavours with one API: `tensorrt` (10.13 and later, 11), which
builds on the GPU it will run on, and `rtx` (TensorRT for RTX), which builds anywhere. Networks are
strongly typed in both, so the precision is the one of the ONNX graph: there is no flag to set, and what
was built is counted afterwards.

TensorRT reports a failure as None and a log line; the last error lines are therefore kept and become
part of our message. An engine is native code: nothing here loads one that it did not just build.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from passdeploy.errors import CorruptArtifact, ExportError, MissingError, RunError, UsageError
from passdeploy.export.artifact import Artifact, BatchRange, describe
from passdeploy.export.driver import Driver, probe_driver, require_cuda, require_gpu
from passdeploy.export.ort_session import first_line
from passdeploy.files import atomic_path, sha256_of, write_atomically

if TYPE_CHECKING:
    import tensorrt

Flavour = Literal["tensorrt", "rtx"]


class TensorRT(Protocol):
    """The part of the `tensorrt` module used here; the same names exist in both flavours."""

    __version__: str

    @property
    def Builder(self) -> Callable[[tensorrt.ILogger], tensorrt.Builder]: ...  # noqa: D102
    @property
    def OnnxParser(  # noqa: D102
        self,
    ) -> Callable[[tensorrt.INetworkDefinition, tensorrt.ILogger], tensorrt.OnnxParser]: ...
    @property
    def Runtime(self) -> Callable[[tensorrt.ILogger], tensorrt.Runtime]: ...  # noqa: D102
    @property
    def ILogger(self) -> type[tensorrt.ILogger]: ...  # noqa: D102
    @property
    def NetworkDefinitionCreationFlag(self) -> type[tensorrt.NetworkDefinitionCreationFlag]: ...  # noqa: D102
    @property
    def MemoryPoolType(self) -> type[tensorrt.MemoryPoolType]: ...  # noqa: D102
    @property
    def ProfilingVerbosity(self) -> type[tensorrt.ProfilingVerbosity]: ...  # noqa: D102
    @property
    def LayerInformationFormat(self) -> type[tensorrt.LayerInformationFormat]: ...  # noqa: D102


if TYPE_CHECKING:
    _has_them_all: TensorRT = tensorrt


@dataclass(frozen=True)
class _Package:
    """One flavour as it is installed and named."""

    module: str
    title: str
    oldest: tuple[int, int]
    too_new: int  # the first major release that we do not know
    extra: str
    distributions: tuple[str, ...]  # of the bindings, to tell their version where the libraries are missing
    alternative: str


_PACKAGES: Mapping[str, _Package] = {
    "tensorrt": _Package(
        module="tensorrt",
        title="TensorRT",
        oldest=(10, 13),
        too_new=12,
        extra="'passdeploy[trt]' (TensorRT 11) or 'passdeploy[trt10]'",
        distributions=("tensorrt-cu13-bindings", "tensorrt-cu12-bindings", "tensorrt"),
        alternative="ONNX export works without it; --flavour rtx builds without a GPU.",
    ),
    "rtx": _Package(
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
    "Export ONNX here and run `passdeploy export --trt` on the target, "
    "or use --flavour rtx, which builds without a GPU."
)
_INSIGHTS = {  # what the parser says -> what to do about it
    "must resolve to a build-time constant": "Export with passdeploy, which folds the graph (optimize=True).",
    "Non-zero zero point": "Quantise symmetrically: TensorRT takes no zero points.",
    "Plugin not found": "TensorRT has no such operator; replace it in the model.",
}
_CONVOLUTIONS = ("CONVOLUTION", "DECONVOLUTION")
_DATA_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
_KEPT_LINES = 64  # of the builder's log
_SHOWN_CHARACTERS = 400


def load_trt(flavour: Flavour) -> TensorRT:
    """Import TensorRT, after making sure that using it cannot crash the process.

    Raises:
        UsageError: no such flavour.
        MissingError: not installed, half installed, a release we do not know, or (for `tensorrt`) no GPU.
    """
    if flavour not in _PACKAGES:
        raise UsageError(f"no TensorRT flavour {flavour!r}: there are {' and '.join(_PACKAGES)}.")
    package = _PACKAGES[flavour]
    # The driver comes first: without one, installing TensorRT would be in vain.
    driver = require_gpu("a TensorRT engine", hint=NO_DRIVER_HINT) if flavour == "tensorrt" else None
    install = f"Install it with: pip install {package.extra}"
    try:
        module = import_module(package.module)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package.module:
            lines = (f"{package.title} is not installed.", install, package.alternative)
        else:
            found = f"{package.title} {_bindings_version(package)}"
            lines = (
                f"the libraries of {found} do not load: {first_line(error)}",
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


def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    flavour: Flavour = "tensorrt",
    batch: Sequence[int] = (1, 8, 32),
    precision: str = "fp32",
    workspace_bytes: int | None = None,
    optimization_level: int = 3,
    timing_cache: Path | None = None,
) -> Artifact:
    """Build `engine_path`, and beside it `<engine_path>.json`, which says how and from what.

    Args:
        onnx_path: a graph whose only open dimension is the batch.
        engine_path: where the engine goes; it is whole or absent.
        flavour: `tensorrt` builds for the GPU of this machine, `rtx` for any RTX GPU and without one.
        batch: (min, opt, max); opt is the size the engine is tuned for.
        precision: what the graph is said to be in; that no convolution has this type is an error.
        workspace_bytes: scratch memory the builder may use; None leaves TensorRT's own limit.
        optimization_level: 0 (fast build) to 5 (fast engine).
        timing_cache: read if it exists and written back; TensorRT for RTX has none.

    Raises:
        MissingError: see `load_trt`.
        ExportError: TensorRT refuses the graph, with the parser's or the builder's own words.
        UsageError: `batch` is no range, or `optimization_level` is not 0 to 5.
    """
    onnx_path, engine_path, sizes = Path(onnx_path), Path(engine_path), BatchRange.of(batch)
    if not 0 <= optimization_level <= 5:
        raise UsageError(
            f"optimisation level {optimization_level} does not exist: TensorRT has 0 (quick) to 5 (thorough)."
        )
    if not onnx_path.is_file():
        raise RunError(f"there is no ONNX file {onnx_path}.\nWrite it with: passdeploy export --onnx")
    trt = load_trt(flavour)
    driver = probe_driver()
    log = BuilderLog()
    logger = _logger(trt, log)
    builder = _create(lambda: trt.Builder(logger), log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = _create(lambda: trt.OnnxParser(network, logger), log)
    if not parser.parse_from_file(str(onnx_path)):  # the path, not the bytes: weights may lie beside it
        raise _parse_failure(onnx_path, parser, log)
    if network.num_outputs == 0:
        raise CorruptArtifact(f"{onnx_path.name} holds no network: the file is empty or was cut off.")

    config = builder.create_builder_config()
    config.builder_optimization_level = optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows only names
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    _add_profile(builder, network, config, sizes)
    # TensorRT for RTX compiles its kernels on the target; its timing cache does nothing but warn.
    cache = timing_cache if flavour == "tensorrt" else None
    with _timing_cache(config, cache):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT cannot build an engine from {onnx_path.name}.\nIt says: {log.last_error()}")
    census = _census(trt, logger, plan, network, driver)
    _require_precision(census, precision)

    with atomic_path(engine_path) as draft:
        draft.write_bytes(memoryview(plan))
    facts = {
        "flavour": flavour,
        "tensorrt": trt.__version__,
        "driver_cuda": f"{driver.cuda[0]}.{driver.cuda[1]}" if driver else None,
        "gpus": list(driver.devices) if driver else [],
        "batch": sizes.as_list(),
        "optimization_level": optimization_level,
        "workspace_bytes": workspace_bytes,
        "strongly_typed": True,
        "timing_cache_sha256": sha256_of(cache) if cache is not None else None,
        "onnx": onnx_path.name,
        "onnx_sha256": sha256_of(onnx_path),
        "layers": network.num_layers,
        "census": census,
    }
    engine = describe(engine_path, kind="engine", precision=precision, facts=facts)
    _write_sidecar(engine)
    return engine


def _write_sidecar(engine: Artifact) -> None:
    """Everything known about the engine, under its hash: proof that the two belong together."""
    identity = {
        "file": engine.path.name,
        "sha256": engine.sha256,
        "size_bytes": engine.size_bytes,
        "precision": engine.precision,
    }
    content = json.dumps({**identity, **engine.facts}, indent=2)
    write_atomically(sidecar_path(engine.path), content + "\n")


def sidecar_path(engine_path: Path) -> Path:
    """Where the facts of an engine stand: `model.engine.json` beside `model.engine`."""
    return engine_path.with_name(engine_path.name + ".json")


class BuilderLog:
    """The last lines TensorRT logged: the only place where a failure is explained."""

    def __init__(self) -> None:
        self.lines: deque[tuple[str, str]] = deque(maxlen=_KEPT_LINES)  # (severity name, text)

    def add(self, severity: str, text: str) -> None:
        """Keep a line; the oldest goes when there are too many."""
        self.lines.append((severity, text))

    def last_error(self) -> str:
        """The last error in one line, with a translation of the best known one."""
        errors = [text for severity, text in self.lines if severity.endswith("ERROR")]
        if not errors:
            return "TensorRT gave no reason."
        text = " ".join(errors[-1].split())[:_SHOWN_CHARACTERS]
        if "cudaError 35" in text:
            text += "\nThe NVIDIA driver is missing or older than this TensorRT's CUDA: update the driver."
        return text


def _logger(trt: TensorRT, log: BuilderLog) -> tensorrt.ILogger:
    """An ILogger that writes to `log`. Its base class is known only once TensorRT is imported."""
    base: Any = trt.ILogger

    def start(self: Any) -> None:
        base.__init__(self)  # pybind11 asks for the explicit call

    def note(self: Any, severity: tensorrt.ILogger.Severity, text: str) -> None:
        log.add(severity.name, text)

    made = type("RememberingLogger", (base,), {"__init__": start, "log": note})
    return cast("tensorrt.ILogger", made())


@contextmanager
def _timing_cache(config: tensorrt.IBuilderConfig, path: Path | None) -> Iterator[None]:
    """Use the measurements of earlier builds from `path`, and keep those of this one there."""
    if path is None:
        yield
        return
    earlier = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(earlier), ignore_mismatch=False)
    yield
    cache = config.get_timing_cache()
    write_atomically(path, bytes(memoryview(cache.serialize())) if cache is not None else earlier)


def _create(factory: Callable[[], Any], log: BuilderLog) -> Any:
    """Construct a TensorRT object; a refused one arrives as a TypeError about a null pointer."""
    try:
        return factory()
    except TypeError as error:
        raise MissingError(f"TensorRT could not start: {log.last_error()}") from error


def _parse_failure(onnx_path: Path, parser: tensorrt.OnnxParser, log: BuilderLog) -> ExportError | CorruptArtifact:
    """What the parser did not accept: the first node in full, how many more, and what to do."""
    if parser.num_errors == 0:
        return ExportError(f"TensorRT cannot parse {onnx_path.name}: {log.last_error()}")
    first = parser.get_error(0)
    reason = " ".join(first.desc().split())[:_SHOWN_CHARACTERS]
    if not first.node_operator():  # no node at all: the file itself is the trouble
        return CorruptArtifact(f"TensorRT cannot read {onnx_path.name}: {reason}")
    where = f"{first.node_operator()} node {first.node_name()!r}"
    more = f" ({parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    advice = next((text for words, text in _INSIGHTS.items() if words in reason), "")
    lines = (f"TensorRT does not accept the {where} of {onnx_path.name}{more}.", f"It says: {reason}", advice)
    return ExportError("\n".join(line for line in lines if line))


def _add_profile(
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    sizes: BatchRange,
) -> None:
    """Tell the builder the range of the batch, the only dimension that may be open."""
    profile = builder.create_optimization_profile()
    is_open = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        others = [axis for axis, extent in enumerate(shape) if extent < 0 and axis > 0]
        if others:
            raise ExportError(
                f"input {tensor.name!r} has open dimensions {others} beside the batch, shape {list(shape)}.\n"
                "Export it with a fixed image size."
            )
        if shape[0] >= 0:
            if shape[0] != sizes.smallest or not sizes.is_fixed:
                asked = ",".join(map(str, sizes.as_list()))
                raise ExportError(
                    f"input {tensor.name!r} has a fixed batch of {shape[0]}; asked was --batch {asked}.\n"
                    f"Build with --batch {shape[0]},{shape[0]},{shape[0]}, or export with an open batch."
                )
            continue
        is_open = True
        image = shape[1:]
        profile.set_shape(tensor.name, (sizes.smallest, *image), (sizes.typical, *image), (sizes.largest, *image))
    if is_open:
        config.add_optimization_profile(profile)


def _census(
    trt: TensorRT,
    logger: tensorrt.ILogger,
    plan: tensorrt.IHostMemory,
    network: tensorrt.INetworkDefinition,
    driver: Driver | None,
) -> dict[str, Any]:
    """How many layers run in which data type: from the engine where it loads here, else from the network.

    The network of a strongly typed build fixes every type, but only the engine proves it; the
    key "source" says which of the two was counted.
    """
    if driver is not None and driver.devices:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is not None:
            text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
            return {"source": "engine", **count_engine_layers(text)}
    layers: Counter[tuple[str, str]] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs:
            layers[layer.type.name, layer.get_output(0).dtype.name] += 1
    return {"source": "network", **_tabulate(layers)}


def count_engine_layers(inspector_json: str) -> dict[str, Any]:
    """Layers per kind and data type from the inspector's JSON, in TensorRT 10's dialect and in 11's.

    TensorRT 10 names a tensor's type inside its "Format/Datatype", 11 in a field "Datatype" of its own.

    >>> report = '{"Layers": [{"LayerType": "CaskConvolution", "Outputs": [{"Datatype": "Half"}]}]}'
    >>> count_engine_layers(report)["convolutions"]
    {'fp16': 1}
    """
    layers: Counter[tuple[str, str]] = Counter()
    for layer in json.loads(inspector_json).get("Layers", []):
        if not isinstance(layer, dict) or not layer.get("Outputs"):
            continue
        output = layer["Outputs"][0]
        kind = "CONVOLUTION" if "conv" in str(layer.get("LayerType", "")).lower() else str(layer.get("LayerType"))
        layers[kind, _type_in(str(output.get("Datatype") or output.get("Format/Datatype") or ""))] += 1
    return _tabulate(layers)


def _type_in(text: str) -> str:
    """The data type that an inspector's words name, as `DataType` spells it."""
    words = {
        "float": "FLOAT",
        "fp32": "FLOAT",
        "half": "HALF",
        "fp16": "HALF",
        "bf16": "BF16",
        "bfloat16": "BF16",
    }
    words |= {"int8": "INT8", "fp8": "FP8"}
    return next((words[word] for word in text.lower().replace("-", " ").split() if word in words), text)


def _tabulate(layers: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Counts by data type: of all layers, and of the convolutions alone."""
    everything: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    for (kind, data_type), count in layers.items():
        name = _DATA_TYPES.get(data_type, data_type.lower())
        everything[name] += count
        if kind in _CONVOLUTIONS:
            convolutions[name] += count
    return {"layers": dict(sorted(everything.items())), "convolutions": dict(sorted(convolutions.items()))}


def _require_precision(census: Mapping[str, Any], precision: str) -> None:
    """At least one convolution runs in the precision asked for, if there are any."""
    convolutions: Mapping[str, int] = census["convolutions"]
    if convolutions and precision not in convolutions:
        found = ", ".join(f"{count} {name}" for name, count in convolutions.items())
        raise ExportError(
            f"asked {precision}, found 0 of {sum(convolutions.values())} convolutions in it ({found}).\n"
            f"TensorRT takes the precision from the graph: export the ONNX in {precision} first."
        )


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _bindings_version(package: _Package) -> str:
    for name in package.distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(of unknown version)"
