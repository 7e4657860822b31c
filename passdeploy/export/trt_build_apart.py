"""Engines of ONNX files of others, built in a process of their own: TensorRT's parser and builder are native code.

A file that crashes them, or keeps them busy without end, is refused in a sentence, and this process goes on. The
address space of the process is not limited, since CUDA reserves more than there is memory.

    python -m passdeploy.export.trt_build_apart      the process, which answers one request
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from passdeploy import errors
from passdeploy.errors import CorruptArtifact, ExportError, PassDeployError, first_line
from passdeploy.export.artifact import Artifact
from passdeploy.export.trt_api import Flavour
from passdeploy.export.trt_engine import EngineOptions, build_engine
from passdeploy.runtime.child_process import AnsweringChild, ChildEnded, answer_requests
from passdeploy.runtime.events import Event, Listener, Warned, silent

_LIMIT_S = 4 * 3600.0  # large networks take an hour at the highest optimisation level


def build_engine_apart(
    onnx_path: Path,
    engine_path: Path,
    *,
    flavour: Flavour,
    batch: Sequence[int],
    precision: str,
    options: EngineOptions,
    listener: Listener = silent,
) -> Artifact:
    """Do what `build_engine` does, in a process of its own.

    Raises:
        CorruptArtifact: the file crashes TensorRT, or does not end; or see `build_engine`.
        PassDeployError: see `build_engine`.
    """
    request = {
        "onnx": str(onnx_path.absolute()),
        "engine": str(engine_path.absolute()),
        "flavour": flavour,
        "batch": list(batch),
        "precision": precision,
        "options": options.to_json()
        | {"timing_cache": None if options.timing_cache is None else str(options.timing_cache.absolute())},
    }
    child = _start()
    try:
        answer = child.ask(request, limit_s=_LIMIT_S)
    except TimeoutError as error:
        raise CorruptArtifact(f"{onnx_path} keeps TensorRT busy for more than {_LIMIT_S / 3600:.0f} hours.") from error
    except ChildEnded as error:
        raise CorruptArtifact(
            f"{onnx_path} crashes TensorRT while an engine is built from it ({error}).\n"
            "That was a process of its own. The file is damaged, made to do this, or there was too little memory."
        ) from error
    finally:
        child.close()
        for draft in engine_path.parent.glob(f".*.{child.pid}.*"):  # of a process that crashed while it wrote
            draft.unlink(missing_ok=True)
    for text in answer["warnings"]:
        listener(Warned(text))
    if "error" in answer:
        kind = getattr(errors, answer["error"]["kind"], ExportError)
        failure: PassDeployError = PassDeployError.__new__(kind)  # some build their text from other arguments
        failure.args = (answer["error"]["message"],)
        raise failure
    return Artifact(engine_path, **answer["engine"])


def _start() -> AnsweringChild:
    return AnsweringChild.start("passdeploy.export.trt_build_apart")


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Build the engine of a request, in the process of its own."""
    warnings: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            warnings.append(event.text)

    path, cache = Path(request["onnx"]), request["options"]["timing_cache"]
    options = EngineOptions(**request["options"] | {"timing_cache": None if cache is None else Path(cache)})
    try:
        engine = build_engine(
            path,
            request["engine"],
            flavour=request["flavour"],
            batch=request["batch"],
            precision=request["precision"],
            options=options,
            listener=listen,
        )
    except PassDeployError as error:
        return {"error": {"kind": type(error).__name__, "message": str(error)}, "warnings": warnings}
    except Exception as error:  # TensorRT's bindings raise errors of several types
        text = f"{path.name} cannot be built: {type(error).__name__}: {first_line(error)}"
        return {"error": {"kind": ExportError.__name__, "message": text}, "warnings": warnings}
    return {"engine": engine.to_json(), "warnings": warnings}


if __name__ == "__main__":
    answer_requests(_answer)
