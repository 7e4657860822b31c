"""Engine sidecars (`model.engine.json`): write and read them, and load only engines that match theirs.

An engine is native code that TensorRT runs without checking it. It is loaded only if its SHA-256 is the one in
its sidecar, or with --trust-engine. A version-compatible engine also contains code for the host, which runs
only with --trust-engine, with or without a sidecar. What only the sidecar knows is not known without it: the flavour
is then taken from the engine's name, and one that can be refitted may lack its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.errors import CorruptArtifact, ExportError, MissingError, RunError, UsageError
from passdeploy.export.artifact import Artifact
from passdeploy.export.drafts import Replacing, name_file, replacing_freely
from passdeploy.export.trt_api import Flavour, TensorRT, load_trt
from passdeploy.export.trt_log import BuilderLog, create_trt_object, make_logger
from passdeploy.export.trt_refit import onnx_path_of_stripped, refit_
from passdeploy.runtime.cuda_driver import require_gpu
from passdeploy.runtime.events import Listener, Warned, silent
from passdeploy.runtime.files import sha256_of, write_atomically
from passdeploy.runtime.garbage import garbage_collection_paused
from passdeploy.runtime.sealed_json import read_sealed, sealed

if TYPE_CHECKING:
    import tensorrt

_VERSION = 2  # of sidecars; from 2 on they are sealed
_NO_GPU_HINT = "Run it on the machine with the GPU it was built for."
_RTX_ENDING = "-rtx.engine"


def engine_path_for(onnx_path: Path, flavour: Flavour) -> Path:
    """Return the path of the engine of an ONNX file, beside it: `model.engine` or `model-rtx.engine`."""
    return onnx_path.with_name(onnx_path.stem + (_RTX_ENDING if flavour == "rtx" else ".engine"))


def sidecar_path(engine_path: Path) -> Path:
    """Return the path of an engine's sidecar: `model.engine.json` beside `model.engine`."""
    return engine_path.with_name(engine_path.name + ".json")


def write_sidecar(engine: Artifact) -> None:
    """Write the facts of an engine, with its SHA-256, to its sidecar."""
    identity = {
        "file": engine.path.name,
        "sha256": engine.sha256,
        "size_bytes": engine.size_bytes,
        "precision": engine.precision,
    }
    content = sealed({"version": _VERSION, **identity, **engine.facts})
    write_atomically(sidecar_path(engine.path), content)


def name_engine(draft: Artifact, final: Path, replacing: Replacing = replacing_freely) -> Artifact:
    """Give an engine that passed its name, and its sidecar the name beside it; delete one that failed earlier."""
    replacing(sidecar_path(final))
    sidecar_path(draft.path).replace(sidecar_path(final))
    engine: Artifact = name_file(draft, final, replacing)
    return engine


def read_sidecar(engine_path: Path) -> dict[str, Any]:
    """Read an engine's sidecar, and check that it belongs to the engine.

    Raises:
        RunError: there is no such engine.
        CorruptArtifact: the sidecar is missing, cannot be read, or has the SHA-256 of another file.
    """
    if not engine_path.is_file():
        raise RunError(f"there is no engine {engine_path}.\nBuild it with: passdeploy export --trt")
    path = sidecar_path(engine_path)
    trust = "An engine is native code. If you know where it comes from: --trust-engine"
    if not path.is_file():
        raise CorruptArtifact(f"{engine_path.name} has no sidecar {path.name} that describes it.\n{trust}")
    try:
        facts: dict[str, Any] = read_sealed(path.read_bytes(), version_key="version", sealed_from=_VERSION)
        expected = facts["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path} is not the sidecar of an engine.\n{trust}") from error
    if expected != sha256_of(engine_path):
        raise CorruptArtifact(
            f"{engine_path.name} is not the file its sidecar describes: its SHA-256 differs.\n{trust}"
        )
    return facts


def is_outdated(engine_path: Path, onnx_sha256: str) -> bool:
    """True if there is such an engine, and its sidecar names another ONNX file that it was built from."""
    try:
        facts = read_sidecar(engine_path)
    except (RunError, CorruptArtifact):  # no engine, or one that is not loaded anyway
        return False
    return bool(facts.get("onnx_sha256") != onnx_sha256)


@garbage_collection_paused()
def load_engine(
    engine_path: Path,
    *,
    flavour: Flavour | None = None,
    trust_engine: bool = False,
    onnx_folder: Path | None = None,
    listener: Listener = silent,
) -> tuple[TensorRT, tensorrt.ICudaEngine]:
    """Load an engine on this machine's GPU, and return it after the TensorRT module that runs it.

    An engine without weights gets them from its ONNX file.

    Args:
        engine_path: an engine that `build_engine` wrote.
        flavour: of the TensorRT to load it with; None: that of the sidecar, or of the engine's name without one.
        trust_engine: load it without a matching sidecar, and let it run its own code on the host.
        onnx_folder: of that ONNX file; None: the engine's own.
        listener: is warned of an engine without a sidecar that may lack its weights.

    Raises:
        RunError, CorruptArtifact: see `read_sidecar`; or it has no weights, and its ONNX file is missing or another.
        MissingError: no GPU, no TensorRT, or another TensorRT than the one that built it.
        UsageError: a version-compatible engine without `trust_engine`.
        ExportError: TensorRT cannot load it; the message has the text of its log.
    """
    facts = _read_or_trust(engine_path, trust_engine)
    # Without a driver some of TensorRT's libraries crash the process, so it is checked first, for both flavours.
    require_gpu("running an engine", hint=_NO_GPU_HINT)
    trt = load_trt(flavour or facts.get("flavour") or _flavour_by_name(engine_path))
    is_portable = bool(facts.get("options", {}).get("version_compatible"))
    built_with = facts.get("tensorrt")
    if built_with not in (None, trt.__version__) and not is_portable:
        raise MissingError(
            f"{engine_path.name} was built with TensorRT {built_with}, here is {trt.__version__}.\n"
            "Build it again here: passdeploy export --trt"
        )
    if is_portable and not trust_engine:
        raise UsageError(
            f"{engine_path.name} is version compatible, so it carries code of its own that runs on the host.\n"
            "If you know where it comes from: --trust-engine"
        )
    log = BuilderLog()
    logger = make_logger(trt, log)
    runtime = create_trt_object(lambda: trt.Runtime(logger), log)
    if is_portable or not facts:  # whoever trusts an engine without a sidecar trusts the code in it
        runtime.engine_host_code_allowed = True
    weights = None
    if facts.get("options", {}).get("weight_stripped"):
        weights = onnx_path_of_stripped(engine_path, facts, onnx_folder or engine_path.parent)
    engine = runtime.deserialize_cuda_engine(engine_path.read_bytes())
    if engine is None:
        raise ExportError(f"TensorRT cannot load {engine_path.name}.\nIt says: {log.last_error()}")
    if weights is not None:
        refit_(trt, engine, weights, logger, log, engine_path.name)
    elif not facts and engine.refittable:
        listener(
            Warned(
                f"{engine_path.name} can be refitted and has no sidecar: whether it holds its weights is not known, "
                "and without them its answers are arbitrary."
            )
        )
    return trt, engine


def _flavour_by_name(engine_path: Path) -> Flavour:
    """Return the flavour that `engine_path_for` gives such a name."""
    return "rtx" if engine_path.name.endswith(_RTX_ENDING) else "tensorrt"


def _read_or_trust(engine_path: Path, trust_engine: bool) -> dict[str, Any]:
    """Read the sidecar; with `trust_engine`, return no facts where it is missing or does not match."""
    try:
        return read_sidecar(engine_path)
    except CorruptArtifact:
        if not trust_engine:
            raise
        return {}
