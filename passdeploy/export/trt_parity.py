"""Parity check of TensorRT engines: run an engine on this machine's GPU, and compare it with its PyTorch model.

The reference is the one that the ONNX file was compared with: the model in float32 on the CPU, on real images and on
noise, at the smallest, the typical and the largest batch size of the engine's optimisation profile, and at 1 and 2.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from passdeploy.errors import ParityError
from passdeploy.export.artifact import Artifact, describe_artifact
from passdeploy.export.drafts import set_aside
from passdeploy.export.onnx_graph import INPUT
from passdeploy.export.parity import Parity, gate_problem, measure_parity
from passdeploy.export.precision import Limits
from passdeploy.export.reference import Reference
from passdeploy.export.trt_api import TensorRT
from passdeploy.export.trt_binding import BoundEngine
from passdeploy.export.trt_sidecar import load_engine, sidecar_path, write_sidecar

if TYPE_CHECKING:
    import tensorrt

# TensorRT computes products of float32 numbers in TF32, with 10 bits of mantissa, unless it is told not to.
TF32_REL_ERROR = 5e-3


def engine_limits(limits: Limits, precision: str, *, tf32: bool) -> Limits:
    """Return the limits of an ONNX file as they apply to its engine: in float32 with TF32, it may differ more."""
    if precision == "fp32" and tf32:
        return replace(limits, rel_error=max(limits.rel_error, TF32_REL_ERROR))
    return limits


def require_engine_parity(
    engine: Artifact, reference: Reference, limits: Limits, *, device: str = "cuda", final: Path | None = None
) -> tuple[Artifact, Parity]:
    """Compare an engine with its model, and write the result into its sidecar; a failing one is renamed.

    Args:
        engine: that `build_engine` has just written.
        reference: the model's answers, at batch sizes that the engine takes.
        limits: the largest allowed differences of its ONNX file. A float32 engine that uses TF32 may differ by
            `TF32_REL_ERROR`.
        device: `cuda` or `cuda:N`.
        final: the path that the engine will get if it passes; None: its own path.

    Returns:
        The engine with the result among its facts, and the result.

    Raises:
        ParityError: the engine does not run, or differs by more than `limits` allow; the file is set aside as
            `<name>.rejected`, without a sidecar.
        MissingError, ExportError: see `load_engine`.
    """
    limits = engine_limits(limits, engine.precision, tf32=engine.facts["options"]["tf32"])
    # Only for an engine that runs code of its own (version compatible) does trust make a difference: it was built here.
    trt, loaded = load_engine(engine.path, trust_engine=True, onnx_folder=(final or engine.path).parent)
    try:
        session = _EngineSession(trt, loaded, engine.path.name, device)
        parity = measure_parity(session, reference, ran=f"TensorRT {trt.__version__} on the GPU")
        problem = gate_problem(parity, limits)
    except ParityError as error:
        problem = str(error)
    if problem is not None:
        sidecar_path(engine.path).unlink()
        raise set_aside(engine.path, problem, final)
    checked = describe_artifact(
        engine.path,
        kind=engine.kind,
        precision=engine.precision,
        facts={**engine.facts, "parity": parity.to_json()},
    )
    write_sidecar(checked)
    return checked, parity


class _EngineSession:
    """An engine with the part of an ONNX Runtime session's interface that `measure_parity` uses."""

    name = INPUT

    def __init__(self, trt: TensorRT, engine: tensorrt.ICudaEngine, file: str, device: str) -> None:
        self._trt, self._engine, self._file, self._device = trt, engine, file, device
        self._bound: dict[int, BoundEngine] = {}  # by batch size

    def get_inputs(self) -> list[Any]:
        """Return the one input."""
        return [self]

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        """Run a batch on the GPU, and return the outputs as NumPy arrays."""
        (images,) = (torch.from_numpy(array) for array in inputs.values())
        if len(images) not in self._bound:
            self._bound[len(images)] = BoundEngine(
                self._trt, self._engine, images.clone(), file=self._file, device=self._device
            )
        bound = self._bound[len(images)]
        bound.images.copy_(images)
        bound.enqueue()
        outputs: list[Tensor] = list(bound.outputs.values())
        return [output.float().cpu().numpy() for output in outputs]
