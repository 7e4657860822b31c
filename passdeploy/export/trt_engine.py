"""Build a TensorRT engine from an ONNX file, and write its sidecar.

Networks are built strongly typed in every release, so the precision is that of the ONNX graph; the precisions
of the engine's layers are counted after the build.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from passdeploy.errors import CorruptArtifact, ExportError, RunError, UsageError
from passdeploy.export.artifact import Artifact, BatchRange, describe_artifact
from passdeploy.export.trt_api import Flavour, TensorRT, load_trt
from passdeploy.export.trt_layer_precisions import count_layer_precisions, require_precision
from passdeploy.export.trt_log import BuilderLog, create_trt_object, make_logger, parse_failure
from passdeploy.export.trt_sidecar import write_sidecar
from passdeploy.runtime.cuda_driver import probe_driver
from passdeploy.runtime.events import Listener, Warned, silent
from passdeploy.runtime.files import atomic_path, sha256_of, write_atomically
from passdeploy.runtime.garbage import garbage_collection_paused

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class EngineOptions:
    """Options of TensorRT's builder. All but the first three cost speed or size, so they are off by default."""

    workspace_bytes: int | None = None  # scratch memory of the builder; None: TensorRT's own limit
    optimization_level: int = 3  # 0 (fast build) to 5 (fast engine)
    timing_cache: Path | None = None  # read if it exists, and written back; not for TensorRT for RTX
    version_compatible: bool = False  # the engine also runs on later releases; it then contains host code
    hardware_compatible: bool = False  # the engine runs on Ampere and every later GPU
    refittable: bool = False  # the engine's weights can be replaced
    weight_stripped: bool = False  # the engine has no weights; they are read from its ONNX file when it is loaded
    tf32: bool = True  # products of float32 numbers in TF32, TensorRT's default; False: in float32

    def require_possible(self, flavour: Flavour) -> None:
        """Raise unless the options are valid and the flavour supports them.

        Raises:
            UsageError: an invalid optimisation level, or an option that TensorRT for RTX does not have.
        """
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(
                f"optimisation level {self.optimization_level} does not exist: TensorRT has 0 (quick) to 5 (thorough)."
            )
        if flavour == "rtx" and (unsupported := [option for option in _NOT_FOR_RTX if getattr(self, option)]):
            names = ", ".join("--" + option.replace("_", "-") for option in unsupported)
            raise UsageError(
                f"TensorRT for RTX builds without a GPU, and so without {names}.\n"
                "Leave it out, or build with --flavour tensorrt on the target."
            )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for a sidecar or a bundle."""
        return {**asdict(self), "timing_cache": None if self.timing_cache is None else self.timing_cache.name}


# In TensorRT for RTX, refitting needs CUDA, version compatibility needs a lean runtime, and hardware compatibility is
# silently ignored. It compiles its kernels on the target, so that a timing cache would be empty.
_NOT_FOR_RTX = ("version_compatible", "hardware_compatible", "refittable", "weight_stripped", "timing_cache")


@garbage_collection_paused()
def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    flavour: Flavour = "tensorrt",
    batch: Sequence[int] = (1, 8, 32),
    precision: str = "fp32",
    options: EngineOptions | None = None,
    listener: Listener = silent,
) -> Artifact:
    """Build `engine_path`, and beside it the sidecar `<engine_path>.json` with the settings of the build.

    Args:
        onnx_path: a graph whose only open dimension is the batch.
        engine_path: where the engine is written, atomically.
        flavour: `tensorrt` builds for the GPU of this machine, `rtx` for any RTX GPU and without one.
        batch: (min, opt, max); opt is the size the engine is tuned for.
        precision: of the graph; it is an error if no convolution of the engine runs in it.
        options: of the builder; None: TensorRT's defaults.
        listener: is warned of a timing cache that TensorRT refuses, or that cannot be written.

    Raises:
        RunError: there is no such ONNX file.
        MissingError: see `load_trt`.
        CorruptArtifact: the file holds no network.
        ExportError: TensorRT refuses the graph; the message has the text of its parser or builder.
        UsageError: `batch` is not a valid range, or an option is invalid.
    """
    onnx_path, engine_path, sizes = Path(onnx_path), Path(engine_path), BatchRange.of(batch)
    options = options or EngineOptions()
    options.require_possible(flavour)
    if not onnx_path.is_file():
        raise RunError(f"there is no ONNX file {onnx_path}.\nWrite it with: passdeploy export --onnx")
    trt = load_trt(flavour)
    driver = probe_driver()
    log = BuilderLog()
    logger = make_logger(trt, log)
    builder = create_trt_object(lambda: trt.Builder(logger), log)
    network = parse_network(trt, builder, logger, log, onnx_path)
    config = builder.create_builder_config()
    _configure(config, trt, options)
    _add_profile(builder, network, config, sizes)
    began = perf_counter()
    with _timing_cache(config, options.timing_cache, listener) as cache:
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT cannot build an engine from {onnx_path.name}.\nIt says: {log.last_error()}")
    build_seconds = perf_counter() - began
    layer_precisions = count_layer_precisions(trt, logger, plan, network, driver)
    require_precision(layer_precisions, precision)

    with atomic_path(engine_path) as draft:
        draft.write_bytes(memoryview(plan))
    facts = {
        "flavour": flavour,
        "tensorrt": trt.__version__,
        "driver_cuda": f"{driver.cuda[0]}.{driver.cuda[1]}" if driver else None,
        "gpus": list(driver.devices) if driver else [],
        "batch": sizes.as_list(),
        "options": options.to_json(),
        "strongly_typed": True,
        "timing_cache_sha256": sha256_of(cache) if cache is not None and cache.is_file() else None,
        "onnx": onnx_path.name,
        "onnx_sha256": sha256_of(onnx_path),
        "layers": network.num_layers,
        "build_seconds": round(build_seconds, 1),
        "census": layer_precisions,
    }
    engine = describe_artifact(engine_path, kind="engine", precision=precision, facts=facts)
    write_sidecar(engine)
    return engine


def parse_network(
    trt: TensorRT, builder: tensorrt.Builder, logger: tensorrt.ILogger, log: BuilderLog, onnx_path: Path
) -> tensorrt.INetworkDefinition:
    """Parse an ONNX file into a network that is built with the types it has.

    Raises:
        ExportError: TensorRT refuses the graph.
        CorruptArtifact: the file holds no network.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = create_trt_object(lambda: trt.OnnxParser(network, logger), log)
    if not parser.parse_from_file(str(onnx_path)):  # the path, not the bytes: weights may be in a file beside it
        raise parse_failure(onnx_path, parser, log)
    if network.num_outputs == 0:
        raise CorruptArtifact(f"{onnx_path.name} holds no network: the file is empty or was cut off.")
    return network


def _configure(config: tensorrt.IBuilderConfig, trt: TensorRT, options: EngineOptions) -> None:
    """Write the options into the builder's configuration."""
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise the inspector reports only names
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.weight_stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)


@contextmanager
def _timing_cache(config: tensorrt.IBuilderConfig, path: Path | None, listener: Listener) -> Iterator[Path | None]:
    """Read the kernel timings of earlier builds from `path`, and write those of this build there, if it takes them.

    Yields the file that TensorRT uses. It refuses timings of another release or GPU, whose file then stays as it is.
    """
    if path is None:
        yield None
        return
    earlier = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(earlier)
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        listener(
            Warned(
                f"the timing cache {path} is not used: TensorRT refuses it, as it does timings of another release or "
                "GPU. Name another file to keep those of this one."
            )
        )
        yield None
        return
    yield path
    cache = config.get_timing_cache()
    try:
        write_atomically(path, bytes(memoryview(cache.serialize())) if cache is not None else earlier)
    except OSError as error:  # no reason to lose an engine
        listener(Warned(f"the timings of this build are not kept: {path} cannot be written ({error.strerror})."))


def _add_profile(
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    sizes: BatchRange,
) -> None:
    """Add an optimisation profile with the range of the batch, the only dimension that may be dynamic."""
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
