"""Export of the networks of a finished run: ONNX, TensorRT engines, Torch-TensorRT programs, Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from passdeploy.data.splits import load_data
from passdeploy.errors import UsageError
from passdeploy.export import Artifact, ExportSettings, Samples, export_artifacts
from passdeploy.export.exporter import preview_programs
from passdeploy.export.packaging import Packaging
from passdeploy.export.settings import require_possible
from passdeploy.export.trt_sidecar import sidecar_path
from passdeploy.report.write import renew_report
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import LATEST, load_network, read_plan_document, recipe_of
from passdeploy.runtime.events import Listener, silent

EXPORTED = "export/artifacts.json"
_INPUT_FACTS = ("model", "classes", "mean", "std", "preprocessing")  # of plan.json, written into exported files


@dataclass(frozen=True)
class Exported:
    """The files that an export wrote."""

    run: Path  # the run folder; without a run, the folder of the files
    artifacts: tuple[Artifact, ...]
    previews: tuple[Mapping[str, Any], ...] = ()  # of a dry run: what would be made, by network and precision


def export_run(
    run: Path | str = LATEST,
    settings: ExportSettings | None = None,
    *,
    dense: bool = False,
    image_size: int | None = None,
    packaging: Packaging | None = None,
    allow_code: bool = False,
    listener: Listener = silent,
) -> Exported:
    """Export the slim network of a run into its `export` folder, checked on images of its test set.

    Args:
        run: the run folder.
        settings: what to export; None: ONNX in fp32.
        dense: export the dense network too.
        image_size: height and width in pixels; None: the run's own. A network with a visual prompt takes no other.
        packaging: a Triton repository or a bundle to write as well; its folders are relative to the run's.
        allow_code: let the recipe name a model factory, which runs its module's code.
        listener: receives progress events and warnings.
    """
    settings = settings or ExportSettings()
    require_possible(settings)
    with RunFolder.open(Path(run), write=True) as folder:
        samples = samples_of(folder, settings, image_size)
        if settings.is_dry_run:
            previews = [
                {"network": name, **facts}
                for name in (("slim", "dense") if dense else ("slim",))
                for facts in preview_programs(
                    load_network(folder, name, allow_code), samples, settings, listener=listener
                )
            ]
            return Exported(folder.path, (), tuple(previews))
        written = [
            artifact
            for name in (("slim", "dense") if dense else ("slim",))
            for artifact in export_network(folder, name, settings, samples, allow_code, listener)
        ]
        if packaging is not None:
            name = folder.path.name.rpartition("-")[0]
            packages = packaging.write(folder.path, written, settings, samples, name=name)
            for artifact in packages:
                if artifact.path.is_relative_to(folder.path):
                    folder.record_existing(artifact.path.relative_to(folder.path).as_posix(), artifact.kind)
            written += packages
        renew_report(folder)
        return Exported(folder.path, tuple(written))


FILE_PREFIX = {"dense": "dense", "slim": "model"}  # network -> first part of the names of its exported files


def export_network(
    folder: RunFolder,
    name: str,
    settings: ExportSettings,
    samples: Samples,
    allow_code: bool,
    listener: Listener,
) -> list[Artifact]:
    """Export one network of a run; each file is recorded in the manifest and in `artifacts.json` once it is written."""
    facts, recipe = read_plan_document(folder), recipe_of(folder)
    settings = replace(settings, fp32_tolerance=recipe.gates.parity)
    manifest = folder.manifest()
    metadata: dict[str, Any] = {
        **{key: facts[key] for key in _INPUT_FACTS if key in facts},  # runs of earlier versions have fewer
        "image_shape": list(samples.image_shape),
        "network": name,
        "run": folder.path.name,
        "sha256": {file: manifest[file]["sha256"] for file in (f"{name}.safetensors", "plan.json")},
    }
    network = load_network(folder, name, allow_code)
    written = []
    for artifact in export_artifacts(
        network,
        samples,
        folder.path / "export",
        settings,
        metadata=metadata,
        prefix=FILE_PREFIX[name],
        listener=listener,
    ):
        folder.record_existing(f"export/{artifact.path.name}", artifact.kind)
        if artifact.kind == "engine":
            folder.record_existing(f"export/{sidecar_path(artifact.path).name}", "sidecar")
        has_records = folder.has(EXPORTED) and (folder.path / EXPORTED).is_file()  # a user may have deleted the file
        records = folder.read_json(EXPORTED) if has_records else {}
        records[artifact.path.name] = {"network": name, **artifact.to_json()}
        folder.write_json(EXPORTED, records)
        written.append(artifact)
    return written


def samples_of(folder: RunFolder, settings: ExportSettings, image_size: int | None = None) -> Samples:
    """Return images of the run's data to check on and to calibrate on, scaled to `image_size` if one is given.

    Raises:
        UsageError: the network has a visual prompt, which fits one image size only.
    """
    facts = read_plan_document(folder)
    if image_size is not None and facts["prompt"] and image_size != facts["image_shape"][1]:
        raise UsageError(
            f"the network of {folder.path.name} has a visual prompt of {facts['image_shape'][1]} pixels.\n"
            "Leave --image-size out; with prune.prompt.keep: false, networks take other sizes too."
        )
    size = {} if image_size is None else {"image_size": image_size}
    return Samples.of(load_data(recipe_of(folder).data.model_copy(update=size)), settings)
