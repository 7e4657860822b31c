"""Error messages from TensorRT's log: TensorRT reports a failure as None and a log line, not as an exception.

The last lines of the log are kept, since they alone have the reason, and become part of the error's message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from passdeploy.errors import CorruptArtifact, ExportError, MissingError
from passdeploy.export.trt_api import TensorRT

if TYPE_CHECKING:
    import tensorrt

T = TypeVar("T")

_ADVICE = {  # text in a parser's message -> advice
    "must resolve to a build-time constant": "Export with passdeploy, which folds the graph (optimize=True).",
    "Non-zero zero point": "Quantise symmetrically: TensorRT takes no zero points.",
    "Plugin not found": "TensorRT has no such operator; replace it in the model.",
}
_KEPT_LINES = 64  # of the builder's log
_SHOWN_CHARACTERS = 400


class BuilderLog:
    """The last lines that TensorRT logged."""

    def __init__(self) -> None:
        self.lines: deque[tuple[str, str]] = deque(maxlen=_KEPT_LINES)  # (severity name, text)

    def add(self, severity: str, text: str) -> None:
        """Add a line, and drop the oldest one when there are too many."""
        self.lines.append((severity, text))

    def last_error(self) -> str:
        """Return the last error in one line, with advice in a second one where the driver is missing or too old."""
        errors = [text for severity, text in self.lines if severity.endswith("ERROR")]
        if not errors:
            return "TensorRT gave no reason."
        text = " ".join(errors[-1].split())[:_SHOWN_CHARACTERS]
        if "cudaError 35" in text:
            text += "\nThe NVIDIA driver is missing or older than this TensorRT's CUDA: update the driver."
        return text


def make_logger(trt: TensorRT, log: BuilderLog) -> tensorrt.ILogger:
    """Make an ILogger that writes to `log`; its class is made here because its base class comes from `trt`."""
    base: Any = trt.ILogger

    def start(self: Any) -> None:
        base.__init__(self)  # pybind11 requires the explicit call

    def log_line(self: Any, severity: tensorrt.ILogger.Severity, text: str) -> None:
        log.add(severity.name, text)

    logger_class = type("LineLogger", (base,), {"__init__": start, "log": log_line})
    return cast("tensorrt.ILogger", logger_class())


def create_trt_object(factory: Callable[[], T], log: BuilderLog) -> T:
    """Call a TensorRT constructor, and turn its TypeError about a null pointer into a MissingError with the reason."""
    try:
        return factory()
    except TypeError as error:
        raise MissingError(f"TensorRT could not start: {log.last_error()}") from error


def parse_failure(onnx_path: Path, parser: tensorrt.OnnxParser, log: BuilderLog) -> ExportError | CorruptArtifact:
    """Make the error for a graph that the parser refused: the first node, the number of others, and advice."""
    if parser.num_errors == 0:
        return ExportError(f"TensorRT cannot parse {onnx_path.name}: {log.last_error()}")
    first = parser.get_error(0)
    reason = " ".join(first.desc().split())[:_SHOWN_CHARACTERS]
    if not first.node_operator():  # the error is about the file, not about a node
        return CorruptArtifact(f"TensorRT cannot read {onnx_path.name}: {reason}")
    where = f"{first.node_operator()} node {first.node_name()!r}"
    more = f" ({parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    advice = next((text for words, text in _ADVICE.items() if words in reason), "")
    lines = (f"TensorRT does not accept the {where} of {onnx_path.name}{more}.", f"It says: {reason}", advice)
    return ExportError("\n".join(line for line in lines if line))
