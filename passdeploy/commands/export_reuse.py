"""Exported files of a run that need not be made again, and marks on those that were made from an earlier file."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from passdeploy.errors import CorruptArtifact, RunError
from passdeploy.export import Artifact, ExportSettings, Samples
from passdeploy.export.artifact import file_stem
from passdeploy.export.trt_api import load_trt
from passdeploy.export.trt_binding import has_gpu_of_torch
from passdeploy.export.trt_sidecar import engine_path_for, sidecar_path
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.cuda_driver import probe_driver
from passdeploy.runtime.events import Listener, Warned
from passdeploy.runtime.versions import package_versions

STALE = "STALE.txt"  # in a bundle or a Triton repository whose files are not those of the run any more
_MAKERS = (  # packages that decide what is in a file
    *("passdeploy", "torch", "torchvision", "timm", "numpy"),
    *("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "nvidia-modelopt"),
)
_VERSIONED = ("torch", "torchvision", "timm", "passdeploy")  # packages that define modules
_PACKAGES = ("bundle", "triton")


def fingerprint(settings: ExportSettings, precision: str, weights: Mapping[str, str], samples: Samples) -> str:
    """Return a hash of all that the ONNX file of a precision depends on.

    Args:
        settings: of the export.
        precision: of the file.
        weights: SHA-256 of the files that the network is rebuilt from, and of its code where that has no version.
        samples: images of the export; conversions to another precision depend on them.
    """
    versions = package_versions()
    # Labels decide how much accuracy a conversion loses, and with it which layers stay as they are.
    images = () if precision == "fp32" else (samples.images, samples.calibration, samples.labels)
    content = {
        "weights": dict(weights),
        "image_shape": list(samples.image_shape),
        "precision": precision,
        "batch": list(settings.batch),
        "opset": settings.opset,
        "takes_pixels": settings.takes_pixels,
        "limits": asdict(settings.limits(precision)),
        "quantiser": settings.quantiser,
        "images": [hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in images if each is not None],
        "versions": {name: versions.get(name) for name in _MAKERS},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def hash_code(network: nn.Module) -> str:
    """Hash the source files of the classes of a network's modules, but for those of packages that have a version."""
    files = set[str]()
    for kind in {type(module) for module in network.modules()}:
        if kind.__module__.partition(".")[0] not in _VERSIONED:
            with suppress(TypeError):  # a class that was made in an interactive session has no file
                files.add(inspect.getsourcefile(kind) or "")
    contents = (Path(file).read_bytes() for file in sorted(files) if Path(file).is_file())
    return hashlib.sha256(b"".join(contents)).hexdigest()


def find_unchanged(
    folder: RunFolder,
    home: str,
    records: Mapping[str, Mapping[str, Any]],
    prefix: str,
    settings: ExportSettings,
    precision: str,
    made_from: str,
    images: int,
) -> list[Artifact] | None:
    """Return the files of a precision if all that is asked for is there, verified, and made as it is asked for now.

    Args:
        folder: the run.
        home: folder of the files in it.
        records: content of `artifacts.json`.
        prefix: first part of the file names.
        settings: of the export.
        precision: of the files.
        made_from: the `fingerprint` of now.
        images: that a file is compared on now; one that was compared on fewer is made again.

    Returns:
        The ONNX file and, where engines are asked for, its engine; None if one of them must be made again.
    """
    if "torch-trt" in settings.kinds:
        return None
    name = f"{file_stem(prefix, precision)}.onnx"
    graph = records.get(name)
    if graph is None or graph.get("made_from") != made_from:
        return None
    if (graph["facts"].get("parity") or {}).get("real_images", -1) < images:
        return None
    found = [name]
    if "trt" in settings.kinds:
        engine_name = engine_path_for(folder.path / name, settings.engine_flavour).name
        engine = records.get(engine_name)
        if engine is None or not _is_current(engine["facts"], graph["sha256"], settings):
            return None
        found.append(engine_name)
    try:
        paths = [folder.verified(f"{home}/{file}") for file in found]
        for path in paths[1:]:
            folder.verified(f"{home}/{sidecar_path(path).name}")
    except (RunError, CorruptArtifact):  # deleted or damaged: it is made again
        return None
    fields = ("kind", "precision", "sha256", "size_bytes", "facts")
    return [
        Artifact(path, **{key: records[file][key] for key in fields}) for path, file in zip(paths, found, strict=True)
    ]


def _is_current(facts: Mapping[str, Any], onnx_sha256: str, settings: ExportSettings) -> bool:
    """True if an engine was built from this ONNX file, with these options, by the TensorRT and for the GPU here.

    One that was built for this machine's GPU must have been compared, too, where PyTorch can use the GPU now.
    """
    return bool(
        facts.get("onnx_sha256") == onnx_sha256
        and facts.get("options") == settings.engine.to_json()
        and facts.get("batch") == list(settings.batch)
        and facts.get("tensorrt") == load_trt(settings.engine_flavour).__version__
        and (settings.engine_flavour == "rtx" or (_fits_gpu(facts) and ("parity" in facts or not has_gpu_of_torch())))
    )


def _fits_gpu(facts: Mapping[str, Any]) -> bool:
    """True if an engine runs on the GPU here: it was built on one of the same name, or for several generations."""
    if facts["options"]["hardware_compatible"]:
        return True
    driver = probe_driver()
    built_on = facts.get("gpus") or [None]  # TensorRT builds on the first GPU that it sees
    return driver is not None and list(driver.devices[:1]) == built_on[:1]


def mark_stale_(folder: RunFolder, records: dict[str, dict[str, Any]], listener: Listener) -> None:
    """Mark engines, bundles and Triton repositories that were made from earlier files, and warn of them.

    An engine gets the key `stale` in its record, a folder a file `STALE.txt`; both go once it is made again. The export
    that has outdated an engine warns of it by itself; here only the later ones do.
    """
    for name, record in records.items():
        source = records.get(str(record["facts"].get("onnx")))
        was_stale = record.pop("stale", None) is not None
        if source is not None and record["facts"].get("onnx_sha256") != source["sha256"]:
            record["stale"] = f"built from an earlier {record['facts']['onnx']}: build it again with --trt"
            if was_stale:
                listener(Warned(f"{name} was {record['stale']}."))
    hashes = {record["sha256"] for record in records.values() if "stale" not in record}
    roots: dict[str, bool] = {}
    for file, entry in folder.manifest().items():
        path = PurePosixPath(file)
        if entry["kind"] in _PACKAGES and path.suffix in (".onnx", ".plan") and (folder.path / file).is_file():
            home = path.parent if entry["kind"] == "bundle" else path.parent.parent.parent  # of MODEL/1/model.onnx
            roots[str(home)] = roots.get(str(home), False) or entry["sha256"] not in hashes
    for root, is_stale in roots.items():
        mark = f"{root}/{STALE}"
        if is_stale and (folder.path / root).is_dir():
            text = (
                "Files here are not those of the run any more: export this folder again, with --bundle or --triton.\n"
            )
            folder.write_text(mark, text, kind="mark")
            listener(Warned(f"{root} has files of an earlier export, see {STALE}: write it again."))
        elif folder.has(mark):
            folder.remove(mark)
