"""Export one model in all requested formats and precisions, checking each file before the next step uses it.

For each precision: write the ONNX file, compare it with the PyTorch model, then build the TensorRT engine from it.
A file gets its name only after it passed the comparison (drafts.py), and only such an ONNX file becomes an engine.
Settings that this machine cannot carry out are refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from passdeploy.export.artifact import Artifact, BatchRange, file_stem
from passdeploy.export.conversion import convert_file
from passdeploy.export.drafts import Replacing, folder_of_drafts, name_file, replacing_freely, set_aside
from passdeploy.export.lint import Lint, lint
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.parity import require_parity, summary_line
from passdeploy.export.precision import Limits, choose_opset
from passdeploy.export.preprocessing import NORMALISED, PIXELS, OnPixels
from passdeploy.export.reference import Reference, compute_reference
from passdeploy.export.settings import ExportSettings, Samples, require_possible
from passdeploy.export.torch_trt import compile_program, preview_program
from passdeploy.export.torch_trt_program import program_path_for
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.export.torch_trt_report import describe
from passdeploy.export.trt_api import FLAVOURS
from passdeploy.export.trt_binding import has_gpu_of_torch
from passdeploy.export.trt_engine import build_engine
from passdeploy.export.trt_parity import require_engine_parity
from passdeploy.export.trt_sidecar import engine_path_for, is_outdated, name_engine
from passdeploy.runtime.events import Listener, Warned, silent, stage


def export_artifacts(
    model: nn.Module,
    samples: Samples,
    folder: Path,
    settings: ExportSettings,
    *,
    metadata: Mapping[str, Any] | None = None,
    prefix: str = "model",
    replacing: Replacing = replacing_freely,
    listener: Listener = silent,
) -> Iterator[Artifact]:
    """Write `<prefix>.onnx`, `<prefix>-fp16.onnx`, `<prefix>-fp16.engine`, ... into `folder`, one after the other.

    Each artifact is yielded as soon as it is written and checked, so that the caller keeps those that passed
    when a later one fails.

    Args:
        model: takes normalised images, on the CPU; not changed.
        samples: normalised images to check and calibrate on.
        folder: made if it does not exist.
        settings: formats, precisions, batch sizes and options.
        metadata: written into the ONNX files.
        prefix: of the file names: "model" for the slim network, "dense" for the dense one.
        replacing: is called with the path of each file just before another one takes its place.
        listener: receives progress events and warnings.

    Raises:
        UsageError, MissingError, ExportError, ParityError: see the functions of this folder.
    """
    require_possible(settings, samples)
    samples = samples.as_graph_inputs(settings)
    if settings.takes_pixels:
        model = OnPixels(model, samples.mean, samples.std)
    known = {"input_values": PIXELS if settings.takes_pixels else NORMALISED, **(metadata or {})}
    example = torch.zeros(1, *samples.image_shape)
    reference = _reference(model, samples, settings, listener)

    folder.mkdir(parents=True, exist_ok=True)
    with folder_of_drafts(folder) as drafts:
        sources: dict[int, Path] = {}  # opset -> the float32 file that the other precisions are converted from
        for precision in settings.precisions:
            draft = drafts / f"{file_stem(prefix, precision)}.onnx"
            opset = choose_opset(precision, settings.opset)
            with stage("export", draft.name, listener) as progress:
                is_source = precision == "fp32"
                if is_source or opset not in sources:
                    source = draft if is_source else drafts / f"opset{opset}.onnx"
                    artifact = export_onnx(model, example, source, opset=opset, batch=settings.batch, metadata=known)
                    sources[opset] = source
                if not is_source:
                    artifact = convert_file(
                        sources[opset],
                        draft,
                        precision,
                        calibration=samples.calibration,
                        reference=reference,
                        limits=settings.limits(precision),
                        quantiser=settings.quantiser,
                        progress=progress,
                    )
                report = lint(onnx.load(draft), precision)
                artifact = artifact.with_facts(lint=report.to_json(), input_values=known["input_values"])
                progress.text = _summary_line(artifact)
            for finding in report.findings:
                listener(Warned(f"{draft.name}: {finding.text}."))
            artifact = _check_and_name(artifact, folder / draft.name, report, reference, settings, replacing, listener)
            if is_source:
                sources[opset] = artifact.path
            yield artifact
            try:
                engine = None
                if "trt" in settings.kinds:
                    engine = _build_engine_of(artifact, drafts, settings, reference, replacing, listener)
            finally:  # where it failed, too: the one of before is still there
                _warn_of_outdated_engines(artifact, listener)
            if engine is not None:
                yield engine
        if "torch-trt" in settings.kinds:
            reference = reference or _answers_to(samples, model, settings)
            yield from _compile_programs(model, reference, folder, drafts, settings, prefix, replacing, listener)


def _reference(model: nn.Module, samples: Samples, settings: ExportSettings, listener: Listener) -> Reference | None:
    """Compute the model's answers to compare with; None, with a warning, where ONNX Runtime is not installed."""
    if find_spec("onnxruntime") is None:
        listener(Warned("onnxruntime is not installed: the ONNX file was not compared with the PyTorch model."))
        return None
    if not len(samples.images):
        listener(Warned("there are no real images (--images): parity is checked on noise alone, without accuracy."))
    return _answers_to(samples, model, settings)


def _answers_to(samples: Samples, model: nn.Module, settings: ExportSettings) -> Reference:
    """Compute the model's answers to the real images, with their labels, or to noise where there are none."""
    sizes = BatchRange.of(settings.batch).parity_sizes
    if len(samples.images):
        return compute_reference(model, samples.images, samples.labels, batch_sizes=sizes)
    return compute_reference(model, samples.noise(settings), batch_sizes=sizes, is_real=False)


def _check_and_name(
    draft: Artifact,
    final: Path,
    report: Lint,
    reference: Reference | None,
    settings: ExportSettings,
    replacing: Replacing,
    listener: Listener,
) -> Artifact:
    """Check the precision and parity of a file, then move it to `final`, or to `<final>.rejected` if it fails."""
    counts, precision = report.convolutions, draft.precision
    if counts and precision not in counts:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        total = sum(counts.values())
        raise set_aside(
            draft.path, f"is not {precision}: found 0 of {total} convolutions and products in it ({found})", final
        )
    if reference is not None:
        draft = _with_parity(draft, final, reference, settings.limits(precision), listener)
    return name_file(draft, final, replacing)


def _with_parity(draft: Artifact, final: Path, reference: Reference, limits: Limits, listener: Listener) -> Artifact:
    """Compare a file with the reference, and add the result to its facts; a file that fails is set aside."""
    with stage("parity", f"{final.name} in ONNX Runtime", listener) as progress:
        parity = require_parity(draft.path, reference, draft.precision, limits, final=final)
        progress.text = summary_line(parity, limits)
        return draft.with_facts(parity=parity.to_json())


def _warn_of_outdated_engines(graph: Artifact, listener: Listener) -> None:
    """Warn of engines beside an ONNX file that were built from an earlier version of it."""
    for flavour in FLAVOURS:
        engine = engine_path_for(graph.path, flavour)
        if is_outdated(engine, graph.sha256):
            listener(Warned(f"{engine.name} was built from an earlier {graph.path.name}: build it again with --trt."))


def _build_engine_of(
    artifact: Artifact,
    drafts: Path,
    settings: ExportSettings,
    reference: Reference | None,
    replacing: Replacing,
    listener: Listener,
) -> Artifact:
    """Build the TensorRT engine of an ONNX file, compare it if this GPU can run it, and put it beside the file."""
    path = engine_path_for(artifact.path, settings.engine_flavour)
    with stage("engine", f"{path.name} ({settings.engine_flavour})", listener) as progress:
        engine = build_engine(
            artifact.path,
            drafts / path.name,
            flavour=settings.engine_flavour,
            batch=settings.batch,
            precision=artifact.precision,
            options=settings.engine,
            listener=listener,
        )
        progress.text = f"{engine.path.name} {engine.size_bytes / 1e6:.1f} MB, {engine.facts['layers']} layers"
    # Engines for RTX GPUs are built on machines without one.
    if settings.engine_flavour != "rtx" and reference is not None:
        if has_gpu_of_torch():
            limits = settings.limits(artifact.precision)
            with stage("parity", f"{path.name} in TensorRT", listener) as progress:
                engine, parity = require_engine_parity(engine, reference, limits, final=path)
                progress.text = summary_line(parity, limits)
        else:
            listener(Warned(f"{path.name} was not compared with the PyTorch model: this PyTorch cannot use the GPU."))
    return name_engine(engine, path, replacing)


def _compile_programs(
    model: nn.Module,
    reference: Reference,
    folder: Path,
    drafts: Path,
    settings: ExportSettings,
    prefix: str,
    replacing: Replacing,
    listener: Listener,
) -> Iterator[Artifact]:
    """Compile a Torch-TensorRT program in each precision, and yield each when it is checked."""
    _, flavour = load_torch_trt(settings.flavour)
    for precision in settings.precisions:
        path = program_path_for(folder, file_stem(prefix, precision), flavour)
        with stage("torch-trt", path.name, listener) as progress:
            program = compile_program(
                model,
                reference,
                drafts / path.name,
                precision=precision,
                batch=settings.batch,
                options=settings.engine,
                limits=settings.limits(precision),
                flavour=flavour,
                final=path,
                progress=progress,
            )
            progress.text = f"{path.name} {program.size_bytes / 1e6:.1f} MB, {describe(program.facts)}"
        if "parity" not in program.facts:
            listener(Warned(f"{path.name} was not compared with the PyTorch model: this PyTorch cannot use the GPU."))
        yield name_file(program, path, replacing)


def preview_programs(
    model: nn.Module, samples: Samples, settings: ExportSettings, *, listener: Listener = silent
) -> list[dict[str, Any]]:
    """Tell for each precision what Torch-TensorRT would make of a network; writes nothing.

    Args:
        model: takes normalised images, on the CPU; not changed.
        samples: normalised images to check on.
        settings: precisions, batch sizes and options.
        listener: receives progress events.

    Returns:
        The facts of `preview_program`, with "precision".

    Raises:
        UsageError, MissingError, ExportError: see `require_possible` and `preview_program`.
    """
    require_possible(settings, samples)
    samples = samples.as_graph_inputs(settings)
    if settings.takes_pixels:
        model = OnPixels(model, samples.mean, samples.std)
    reference = _answers_to(samples, model, settings)
    previews = []
    for precision in settings.precisions:
        with stage("torch-trt", f"dry run, {precision}", listener) as progress:
            facts = preview_program(
                model,
                reference,
                precision=precision,
                batch=settings.batch,
                options=settings.engine,
                limits=settings.limits(precision),
                flavour=settings.flavour,
            )
            progress.text = f"{precision}: {describe(facts)}"
        previews.append({"precision": precision, **facts})
    return previews


def _summary_line(artifact: Artifact) -> str:
    """Summarise an ONNX file in one line: name, size, opset and the layers kept in float32."""
    line = f"{artifact.path.name} {artifact.size_bytes / 1e6:.1f} MB, opset {artifact.facts['opset']}"
    kept = artifact.facts.get("kept")
    return f"{line}, {len(kept)} layers kept in fp32: {', '.join(kept[:3])}" if kept else line
