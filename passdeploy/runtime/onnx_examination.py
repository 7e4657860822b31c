"""The process in which ONNX files of others are parsed, opened and run for the first time, under limits.

    python -m passdeploy.runtime.onnx_examination MEMORY_BYTES

It reads one request (JSON) a line from stdin and answers each on stdout: `{}`, or `{"error": text}`. Parsers of ONNX
and ONNX Runtime are native code; a file that crashes them ends this process and not the one that asked
(`onnx_examiner.py`). It imports neither torch nor anything else that would make it slow to start.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from passdeploy.errors import first_line

_ERRORS_ONLY = 3  # severity 0 (verbose) to 4 (fatal)


def main() -> None:
    """Answer requests until stdin ends."""
    _limit_memory(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    sessions: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        path = Path(request["path"])
        answer: dict[str, str] = {}
        try:
            if "close" in request:
                sessions.pop(str(path), None)
            elif "inputs" in request:
                sessions[str(path)].run(None, _zeros(request["inputs"]))
            else:
                _require_own_data(path)
                if (session := _open(path)) is not None:
                    sessions[str(path)] = session
        except Exception as error:  # of the parser, of ONNX Runtime: they have no common base class
            answer = {"error": first_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


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


def _open(path: Path) -> Any:
    """Open a file in ONNX Runtime, without which only the checker of ONNX looks at it."""
    try:
        import onnxruntime as ort
    except ImportError:
        onnx.checker.check_model(path)
        return None
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _zeros(inputs: Mapping[str, tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype) for name, (dtype, shape) in inputs.items()}


def _limit_memory(most_bytes: int) -> None:
    """Limit the address space, and write no core dump."""
    try:
        import resource
    except ImportError:  # on Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


if __name__ == "__main__":
    main()
