"""Bundles: folders with all that another machine needs to build TensorRT engines on its own GPU.

    <bundle>/model.onnx  model-fp16.onnx  ...    ONNX files that passed their parity check
    <bundle>/samples.safetensors                 images to check and to calibrate on, in the form the graphs accept,
                                                 and what the PyTorch models answer to them
    <bundle>/manifest.json                       hashes, batch sizes, limits, options, and the commands of build.sh
    <bundle>/build.sh                            the passdeploy command, and trtexec's for each file as a comment

`passdeploy export --from-bundle` verifies every hash before it builds, and compares each engine with its PyTorch model.
Bundles of earlier versions have the answers of the ONNX files alone, and the limits are those of the precisions.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from passdeploy.errors import CorruptArtifact, RunError
from passdeploy.export.artifact import Artifact, BatchRange, describe_artifact, file_stem
from passdeploy.export.drafts import folder_of_drafts
from passdeploy.export.lint import lint_file
from passdeploy.export.onnx_graph import INPUT
from passdeploy.export.parity import compute_answers_of_file, summary_line
from passdeploy.export.precision import LIMITS, Limits
from passdeploy.export.preprocessing import OnPixels
from passdeploy.export.reference import ONNX_FILE, PYTORCH, Reference, compute_answers, reference_from_answers
from passdeploy.export.trt_api import Flavour, load_trt
from passdeploy.export.trt_binding import has_gpu_of_torch
from passdeploy.export.trt_build_apart import build_engine_apart
from passdeploy.export.trt_engine import EngineOptions
from passdeploy.export.trt_parity import require_engine_parity
from passdeploy.export.trt_sidecar import engine_path_for, name_engine
from passdeploy.runtime.events import Listener, Warned, silent, stage
from passdeploy.runtime.files import atomic_path, sha256_of, write_atomically
from passdeploy.runtime.onnx_examiner import OnnxExaminer
from passdeploy.runtime.sealed_json import read_sealed, sealed
from passdeploy.runtime.versions import __version__

if TYPE_CHECKING:
    from passdeploy.export.settings import ExportSettings, Samples

MANIFEST, SAMPLES, SCRIPT = "manifest.json", "samples.safetensors", "build.sh"
_VERSION = 2  # of the manifest; from 2 on it is sealed
# Prefixes of the names of tensors: the answers of a PyTorch model, followed by the first part of the names of its ONNX
# files; those of an ONNX file, followed by its name, where the model was not given.
_ANSWERS, _ANSWERS_OF_FILE = "pytorch/", "answers/"


def require_buildable(settings: ExportSettings) -> None:
    """Raise unless the target can build engines with these options, so that no bundle is written in vain.

    Raises:
        UsageError: see `EngineOptions.require_possible`.
    """
    replace(settings.engine, timing_cache=None).require_possible(settings.engine_flavour)  # bundles have no cache


def write_bundle(
    folder: Path,
    artifacts: Sequence[Artifact],
    settings: ExportSettings,
    samples: Samples,
    *,
    networks: Mapping[str, nn.Module] | None = None,
) -> list[Artifact]:
    """Write a bundle of the ONNX files among `artifacts`.

    Args:
        folder: the bundle; made if it does not exist.
        artifacts: exported files, of which only the ONNX files are copied.
        settings: of the export.
        samples: the normalised images that were given to `export_artifacts`.
        networks: that the files were exported from, by the `prefix` that was given to `export_artifacts`. Engines are
            compared with them; those of another file with the answers of that file.

    Returns:
        Every file of the bundle, its manifest last.

    Raises:
        UsageError: see `require_buildable`.
    """
    require_buildable(settings)
    folder.mkdir(parents=True, exist_ok=True)
    samples = samples.as_graph_inputs(settings)
    files: list[dict[str, Any]] = []
    for artifact in (item for item in artifacts if item.kind == "onnx"):
        with atomic_path(folder / artifact.path.name) as draft:
            shutil.copyfile(artifact.path, draft)
        files.append(
            {
                "file": artifact.path.name,
                "sha256": artifact.sha256,
                "precision": artifact.precision,
                "batch": list(artifact.facts["batch"]),
                "input": {INPUT: list(artifact.facts["input"])},
                "input_values": artifact.facts.get("input_values"),
                "parity": artifact.facts.get("parity"),
                "limits": asdict(settings.limits(artifact.precision)),
            }
        )
    tensors = {"images": samples.images, "calibration": samples.calibration}
    if samples.labels is not None:
        tensors["labels"] = samples.labels
    tensors |= _recorded_answers(folder, files, samples, settings, networks or {})
    content = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_atomically(folder / SAMPLES, safetensors.torch.save(content))
    commands = _script_lines(files, settings)
    write_atomically(folder / SCRIPT, "\n".join(commands) + "\n")
    other_hashes = {name: sha256_of(folder / name) for name in (SAMPLES, SCRIPT)}
    manifest = {
        "version": _VERSION,
        "passdeploy_version": __version__,
        "flavour": settings.engine_flavour,
        "options": settings.engine.to_json()
        | {"timing_cache": None},  # a timing cache is valid only on the machine that made it
        "models": files,
        "sha256": other_hashes,
        "commands": [line for line in commands if not line.startswith("#")],
    }
    write_atomically(folder / MANIFEST, sealed(manifest))
    names = [*(entry["file"] for entry in files), SAMPLES, SCRIPT, MANIFEST]
    return [describe_artifact(folder / name, kind="bundle", precision="", facts={}) for name in names]


def build_bundle(
    folder: Path, *, flavour: Flavour | None = None, options: EngineOptions | None = None, listener: Listener = silent
) -> Iterator[Artifact]:
    """Build an engine beside every ONNX file of a bundle, and yield each when it is finished.

    Args:
        folder: a bundle that `write_bundle` made.
        flavour, options: replace those that the bundle was made with.
        listener: receives progress events and warnings.

    Raises:
        RunError: `folder` is not a bundle.
        CorruptArtifact: a file is missing or has changed since it was bundled, or crashes what parses it.
        MissingError, ExportError: see `build_engine`.
        ParityError: an engine differs from its model by more than the limits of the bundle allow.
    """
    manifest = _read_verified_manifest(folder)
    chosen_flavour: Flavour = flavour or manifest["flavour"]
    chosen_options = options or EngineOptions(**manifest["options"])
    sources = [folder / entry["file"] for entry in manifest["models"]]
    _examine(sources)
    for entry, source in zip(manifest["models"], sources, strict=True):
        for finding in lint_file(source, entry["precision"]).findings:
            if finding.blocks_tensorrt:
                listener(Warned(f"{source.name}: {finding.text}"))
    load_trt(chosen_flavour)
    for entry in manifest["models"]:
        source = folder / entry["file"]
        path = engine_path_for(source, chosen_flavour)
        with folder_of_drafts(folder) as drafts:
            with stage("engine", f"{path.name} ({chosen_flavour})", listener) as progress:
                engine = build_engine_apart(
                    source,
                    drafts / path.name,
                    flavour=chosen_flavour,
                    batch=entry["batch"],
                    precision=entry["precision"],
                    options=chosen_options,
                    listener=listener,
                )
                progress.text = f"{path.name} {engine.size_bytes / 1e6:.1f} MB, {engine.facts['layers']} layers"
            engine = name_engine(_compared(engine, path, entry, folder, listener), path)
        yield engine


def _examine(sources: Sequence[Path]) -> None:
    """Parse each ONNX file in a process of its own: a bundle comes from another machine.

    None is opened in ONNX Runtime, which runs no bf16 on a CPU, and may be older here than the file.
    """
    with OnnxExaminer() as examiner:
        for source in sources:
            examiner.parse(source)


def _recorded_answers(
    folder: Path,
    entries: Sequence[Mapping[str, Any]],
    samples: Samples,
    settings: ExportSettings,
    networks: Mapping[str, nn.Module],
) -> dict[str, Tensor]:
    """Compute what the networks answer to the images, or to noise where there are none: name of a tensor -> tensor.

    A file whose network is not among them answers itself, where ONNX Runtime is installed.
    """
    images, recorded = samples.images, dict[str, Tensor]()
    if not len(images):
        recorded["noise"] = images = samples.noise(settings)
    for entry in entries:
        prefix, batch = _prefix_of(entry), BatchRange.of(entry["batch"]).largest
        network = networks.get(prefix)
        if network is None:
            if find_spec("onnxruntime") is not None:
                recorded[_ANSWERS_OF_FILE + entry["file"]] = compute_answers_of_file(
                    folder / entry["file"], entry["precision"], images, batch=batch
                )
        elif _ANSWERS + prefix not in recorded:
            asked = OnPixels(network, samples.mean, samples.std) if settings.takes_pixels else network
            recorded[_ANSWERS + prefix] = compute_answers(asked, images, batch=batch)
    return recorded


def _prefix_of(entry: Mapping[str, Any]) -> str:
    """Return the first part of a file's name, which all files of a network have in common: `model`, `dense`."""
    return Path(entry["file"]).stem.removesuffix(file_stem("", entry["precision"]))


def _compared(engine: Artifact, final: Path, entry: Mapping[str, Any], folder: Path, listener: Listener) -> Artifact:
    """Compare an engine with the recorded answers of its model; engines for RTX GPUs are built anywhere."""
    if engine.facts["flavour"] == "rtx":
        return engine
    reference = _recorded_reference(folder, entry)
    if reference is None or not has_gpu_of_torch():
        why = "the bundle has no answers to compare with" if reference is None else "this PyTorch cannot use the GPU"
        listener(Warned(f"{final.name} was not compared with its model: {why}."))
        return engine
    if reference.answered_by == ONNX_FILE:
        text = f"the bundle has no answers of PyTorch: {final.name} is compared with {entry['file']}"
        listener(Warned(f"{text}, and what that file loses comes on top."))
    limits = _limits_of(entry)
    with stage("parity", f"{final.name} in TensorRT", listener) as progress:
        engine, parity = require_engine_parity(engine, reference, limits, final=final)
        progress.text = summary_line(parity, limits)
    return engine


def _recorded_reference(folder: Path, entry: Mapping[str, Any]) -> Reference | None:
    """Read what the model of a file answers, or the file itself in a bundle without the model's; None without both."""
    samples = safetensors.torch.load_file(folder / SAMPLES)
    answers, answered_by = samples.get(_ANSWERS + _prefix_of(entry)), PYTORCH
    if answers is None:
        answers, answered_by = samples.get(_ANSWERS_OF_FILE + entry["file"]), ONNX_FILE
    if answers is None:
        return None
    is_real = "noise" not in samples
    return reference_from_answers(
        samples["images"] if is_real else samples["noise"],
        answers,
        samples.get("labels") if is_real else None,
        batch_sizes=BatchRange.of(entry["batch"]).parity_sizes,
        is_real=is_real,
        answered_by=answered_by,
    )


def _limits_of(entry: Mapping[str, Any]) -> Limits:
    """Return the limits that a file was exported with; in a bundle of an earlier version those of its precision."""
    return Limits(**entry["limits"]) if "limits" in entry else LIMITS[entry["precision"]]


def _read_verified_manifest(folder: Path) -> dict[str, Any]:
    """Read a bundle's manifest and compare every file with its hash."""
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(
            f"{folder} is not a bundle: it has no {MANIFEST}.\nWrite a bundle with: passdeploy export --bundle"
        )
    try:
        manifest = read_sealed(path.read_bytes(), version_key="version", sealed_from=_VERSION)
        hashes = {**{entry["file"]: entry["sha256"] for entry in manifest["models"]}, **manifest["sha256"]}
        EngineOptions(**manifest["options"])
        for entry in manifest["models"]:
            _limits_of(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{path} is not the manifest of a bundle.\nCopy the whole bundle again.") from error
    for name, sha256 in hashes.items():
        if Path(name).name != name:
            raise CorruptArtifact(f"{path} names a file outside the bundle: {name!r}.")
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            raise CorruptArtifact(
                f"{folder / name} is missing or has changed since it was bundled.\nCopy the whole bundle again."
            )
    return manifest


def _script_lines(files: Sequence[Mapping[str, Any]], settings: ExportSettings) -> list[str]:
    """Return the lines of build.sh: the passdeploy command, and those of TensorRT's own tool as comments."""
    flavour = "" if settings.engine_flavour == "tensorrt" else f" --flavour {settings.engine_flavour}"
    lines = [
        "#!/bin/sh -e",
        "# On the target, in this folder. With passdeploy, which also writes sidecars and counts precisions:",
        f"passdeploy export --from-bundle .{flavour}",
        "# Or with TensorRT's own tool; TensorRT 10 needs --stronglyTyped as well:",
    ]
    tool = "tensorrt_rtx" if settings.engine_flavour == "rtx" else "trtexec"
    lines += [f"# {tool} {_trtexec_options(entry, settings)}" for entry in files]
    return lines


def _trtexec_options(entry: Mapping[str, Any], settings: ExportSettings) -> str:
    """Return trtexec's options for one file of the manifest: shapes, optimisation level, memory and flags."""
    options = [f"--onnx={entry['file']}", f"--saveEngine={Path(entry['file']).stem}.engine"]
    dims = entry["input"][INPUT]
    if isinstance(dims[0], str):
        shapes = ["x".join(map(str, (size, *dims[1:]))) for size in entry["batch"]]
        options += [f"--{end}Shapes={INPUT}:{shape}" for end, shape in zip(("min", "opt", "max"), shapes, strict=True)]
    engine = asdict(settings.engine)
    options.append(f"--builderOptimizationLevel={engine['optimization_level']}")
    if engine["workspace_bytes"] is not None:
        options.append(f"--memPoolSize=workspace:{engine['workspace_bytes'] // 2**20}M")
    flags = {"version_compatible": "--versionCompatible", "refittable": "--refit", "weight_stripped": "--stripWeights"}
    options += [flag for name, flag in flags.items() if engine[name]]
    if not engine["tf32"]:
        options.append("--noTF32")
    if engine["hardware_compatible"]:
        options.append("--hardwareCompatibilityLevel=ampere+")
    return " ".join([*options, "--profilingVerbosity=detailed"])
