"""The sidecar of an engine: what it is, under its hash, and the lock on loading it.

An engine is native code that TensorRT runs without looking at it. One is loaded only where its sidecar knows
its bytes, or where the user says --trust-engine. A version-compatible engine brings code of its own for
the host as well, which runs only with --trust-engine, sidecar or not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.errors import CorruptArtifact, ExportError, MissingError, RunError, UsageError
from passdeploy.export.artifact import Artifact
from passdeploy.export.trt_api import Flavour, TensorRT, load_trt
from passdeploy.export.trt_log import BuilderLog, create_trt_object, make_logger
from passdeploy.runtime.cuda_driver import require_gpu
from passdeploy.runtime.files import sha256_of, write_atomically
from passdeploy.runtime.garbage import garbage_collection_paused

if TYPE_CHECKING:
    import tensorrt

_NO_GPU_HINT = "Run it on the machine with the GPU it was built for."


def engine_path_for(onnx_path: Path, flavour: Flavour) -> Path:
    """Where the engine of an ONNX file goes: beside it, `model.engine` or `model-rtx.engine`."""
    return onnx_path.with_name(onnx_path.stem + ("-rtx.engine" if flavour == "rtx" else ".engine"))


def sidecar_path(engine_path: Path) -> Path:
    """Where the facts of an engine stand: `model.engine.json` beside `model.engine`."""
    return engine_path.with_name(engine_path.name + ".json")


def write_sidecar(engine: Artifact) -> None:
    """Everything known about the engine, under its hash: proof that the two belong together."""
    identity = {
        "file": engine.path.name,
        "sha256": engine.sha256,
        "size_bytes": engine.size_bytes,
        "precision": engine.precision,
    }
    content = json.dumps({**identity, **engine.facts}, indent=2)
    write_atomically(sidecar_path(engine.path), content + "\n")


def read_sidecar(engine_path: Path) -> dict[str, Any]:
    """What the sidecar says of an engine, whose bytes are the ones it knows.

    Raises:
        RunError: there is no such engine.
        CorruptArtifact: it has no sidecar, one that cannot be read, or one of another file.
    """
    if not engine_path.is_file():
        raise RunError(f"there is no engine {engine_path}.\nBuild it with: passdeploy export --trt")
    path = sidecar_path(engine_path)
    trust = "An engine is native code. If you know where it comes from: --trust-engine"
    if not path.is_file():
        raise CorruptArtifact(f"{engine_path.name} has no sidecar {path.name} that says what it is.\n{trust}")
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        known = facts["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path} is not the sidecar of an engine.\n{trust}") from error
    if known != sha256_of(engine_path):
        raise CorruptArtifact(
            f"{engine_path.name} is not the file its sidecar describes: the SHA-256 is another one.\n{trust}"
        )
    return facts


def is_outdated(engine_path: Path, onnx_sha256: str) -> bool:
    """Whether there is such an engine and its sidecar says that it was built from another ONNX file."""
    try:
        facts = read_sidecar(engine_path)
    except (RunError, CorruptArtifact):  # no engine, or one that does not load anyway
        return False
    return bool(facts.get("onnx_sha256") != onnx_sha256)


@garbage_collection_paused()
def load_engine(
    engine_path: Path, *, flavour: Flavour | None = None, trust_engine: bool = False
) -> tuple[TensorRT, tensorrt.ICudaEngine]:
    """The engine, ready to run on this machine's GPU, and the TensorRT that runs it.

    Args:
        engine_path: an engine that `build_engine` wrote.
        flavour: of the TensorRT to load it with; None: what the sidecar says.
        trust_engine: load it without a sidecar, and let it run its own code on the host.

    Raises:
        RunError, CorruptArtifact: see `read_sidecar`.
        MissingError: no GPU, no TensorRT, or another TensorRT than the one that built it.
        UsageError: a version-compatible engine without `trust_engine`.
        ExportError: TensorRT does not take it, in its own words.
    """
    facts = _read_or_trust(engine_path, trust_engine)
    # Without a driver some of TensorRT's libraries crash the process, so the driver comes first, for both flavours.
    require_gpu("running an engine", hint=_NO_GPU_HINT)
    trt = load_trt(flavour or facts.get("flavour", "tensorrt"))
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
    if is_portable:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(engine_path.read_bytes())
    if engine is None:
        raise ExportError(f"TensorRT cannot load {engine_path.name}.\nIt says: {log.last_error()}")
    return trt, engine


def _read_or_trust(engine_path: Path, trust_engine: bool) -> dict[str, Any]:
    """The sidecar; with trust, also one that does not match, since the user vouches for the file."""
    try:
        return read_sidecar(engine_path)
    except CorruptArtifact:
        if not trust_engine:
            raise
        return {}
