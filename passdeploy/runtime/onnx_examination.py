"""The process in which ONNX files of others are parsed, opened and run for the first time, under limits.

    python -m passdeploy.runtime.onnx_examination PROVIDER MEMORY_BYTES        0: no limit

It answers requests with `{}` or `{"error": text}`. Parsers of ONNX
and ONNX Runtime are native code; a file that crashes them ends this process and not the one that asked
(`onnx_examiner.py`). It imports neither torch nor anything else that would make it slow to start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from passdeploy.errors import first_line
from passdeploy.runtime.child_process import answer_requests

CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3  # severity 0 (verbose) to 4 (fatal)


def main() -> None:
    """Answer requests until stdin ends."""
    provider, memory_bytes = sys.argv[1], int(sys.argv[2])
    sessions: dict[str, Any] = {}

    def answer(request: dict[str, Any]) -> dict[str, str]:
        path = Path(request["path"])
        try:
            if "close" in request:
                sessions.pop(str(path), None)
            elif "parse" in request:
                _require_own_data(path)
                onnx.checker.check_model(path)
            elif "inputs" not in request:
                _require_own_data(path)
                if (session := _open(path, provider)) is not None:
                    sessions[str(path)] = session
            elif str(path) in sessions:
                sessions[str(path)].run(None, _zeros(request["inputs"]))
        except Exception as error:  # of the parser, of ONNX Runtime: they have no common base class
            return {"error": first_line(error)}
        return {}

    answer_requests(answer, memory_bytes=memory_bytes or None)


def _require_own_data(path: Path) -> None:
    """Parse a file, and check that no tensor of it lies in a file outside of its folder, links resolved."""
    model = onnx.load(path, load_external_data=False)
    folder = path.resolve().parent
    for tensor in _tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            places = [entry.value for entry in tensor.external_data if entry.key == "location"]
            if not places or not (folder / places[0]).resolve().is_relative_to(folder):
                raise ValueError(f"its tensor {tensor.name!r} lies outside of its folder: {(places or [''])[0]!r}")
    if not model.graph.node and not model.graph.output:
        raise ValueError("it holds no graph")


def _tensors_of(message: Any) -> Iterator[Any]:
    """Yield every tensor in a protobuf message, also in nodes of graphs of nodes and in functions."""
    left = [message]
    while left:
        one = left.pop()
        if isinstance(one, onnx.TensorProto):
            yield one
            continue
        for field, value in one.ListFields():
            if field.type == field.TYPE_MESSAGE:
                left += list(value) if hasattr(value, "__len__") else [value]


def _open(path: Path, provider: str) -> Any:
    """Open a file in ONNX Runtime, without which only the checker of ONNX looks at it."""
    try:
        import onnxruntime as ort
    except ImportError:
        onnx.checker.check_model(path)
        return None
    if provider not in ort.get_available_providers():
        return None  # the caller says so when it opens the file itself
    if provider != CPU and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries, which torch brings along in the process of the caller
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return ort.InferenceSession(str(path), options, providers=[provider])


def _zeros(inputs: Mapping[str, tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype) for name, (dtype, shape) in inputs.items()}


if __name__ == "__main__":
    main()
