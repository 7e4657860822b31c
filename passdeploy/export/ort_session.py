"""One way to open an ONNX file in ONNX Runtime, for checking as for timing.

ONNX Runtime takes another provider without a word when the one asked for cannot start, so the
provider that really runs is compared with the one that was asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.errors import CorruptArtifact, MissingError, RunError, first_line, require

if TYPE_CHECKING:
    from onnx import ModelProto

_ERRORS_ONLY = 3  # severity 0 (verbose) to 4 (fatal)


def open_session(
    source: Path | ModelProto,
    *,
    threads: int,
    provider: str = "CPUExecutionProvider",
    is_optimised: bool = True,
    profile_to: Path | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` on `threads` threads, of a file or of a graph in memory.

    Threads spin while a run lasts, which is the runtime's own default and its fastest mode, and stop
    when it returns: two sessions in one process then do not steal each other's cores.

    Args:
        source: the file, or the graph.
        threads: of every operator.
        provider: what must run it.
        is_optimised: False takes the graph as it is.
        profile_to: where ONNX Runtime's own profile goes, a path without its ending; None: no profile.

    Raises:
        MissingError: onnxruntime is not installed, or `provider` is not what runs.
        RunError: there is no such file.
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
    available = ort.get_available_providers()
    if provider not in available:
        raise MissingError(
            f"ONNX Runtime {ort.__version__} has no {provider} here, only {', '.join(available)}.\n"
            "On an NVIDIA GPU install: pip install 'passdeploy[gpu]'"
        )
    try:
        content = str(source) if isinstance(source, Path) else source.SerializeToString()
        session = ort.InferenceSession(content, options, providers=[provider])
    except Exception as error:  # its exceptions share no base class of their own
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
