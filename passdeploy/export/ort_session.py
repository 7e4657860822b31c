"""ONNX Runtime sessions: open an ONNX file with a given execution provider, for checking and for timing.

ONNX Runtime falls back to another provider without an error when the requested one cannot start, so
the provider that runs is compared with the requested one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.errors import CorruptArtifact, MissingError, RunError, first_line, require

if TYPE_CHECKING:
    from onnx import ModelProto

_ERRORS_ONLY = 3  # severity 0 (verbose) to 4 (fatal)


def require_provider(provider: str) -> None:
    """Check that the installed ONNX Runtime was built with an execution provider; whether it starts is another matter.

    Raises:
        MissingError: onnxruntime is not installed, or has no such provider.
    """
    ort = require("onnxruntime", extra="cpu")
    available = ort.get_available_providers()
    if provider not in available:
        raise MissingError(
            f"ONNX Runtime {ort.__version__} has no {provider} here, only {', '.join(available)}.\n"
            "On an NVIDIA GPU install: pip install 'passdeploy[gpu]'"
        )


def open_session(
    source: Path | ModelProto,
    *,
    threads: int,
    provider: str = "CPUExecutionProvider",
    gpu: int = 0,
    is_optimised: bool = True,
    profile_to: Path | None = None,
) -> Any:
    """Open an `onnxruntime.InferenceSession` for a file or a graph in memory.

    Threads spin during a run, which is the runtime's own default and its fastest mode, and stop when it
    returns, so that two sessions in one process do not compete for cores.

    Args:
        source: the file, or the graph.
        threads: number of threads within an operator.
        provider: the execution provider that must run the graph.
        gpu: number of the GPU, for a provider that runs on one.
        is_optimised: False turns off ONNX Runtime's graph optimisations.
        profile_to: path, without its suffix, of a profile that ONNX Runtime writes; None: no profile.

    Raises:
        MissingError: onnxruntime is not installed, or another provider than `provider` runs.
        RunError: the file does not exist.
        CorruptArtifact: ONNX Runtime cannot read the file.
    """
    if isinstance(source, Path) and not source.is_file():
        raise RunError(f"there is no ONNX file {source}.\nWrite it with: passdeploy export --onnx")
    ort = require("onnxruntime", extra="cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if not is_optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    require_provider(provider)
    try:
        content = str(source) if isinstance(source, Path) else source.SerializeToString()
        session = ort.InferenceSession(
            content, options, providers=[(provider, {"device_id": gpu}) if gpu else provider]
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        shown = source if isinstance(source, Path) else "the graph"
        raise CorruptArtifact(
            f"ONNX Runtime {ort.__version__} cannot open {shown}.\nIt says: {first_line(error)}"
        ) from error
    if session.get_providers()[0] != provider:
        raise MissingError(
            f"asked ONNX Runtime for {provider}, it runs {session.get_providers()[0]} instead: "
            "the provider could not start.\nIts libraries are missing or do not fit the driver."
        )
    return session
