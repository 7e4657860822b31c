"""Export of the networks of a finished run: ONNX, TensorRT engines, Torch-TensorRT programs, Triton."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.commands.export_reuse import find_unchanged, fingerprint, hash_code, mark_stale_
from passdeploy.commands.run_data import require_same_classes
from passdeploy.data.splits import load_data
from passdeploy.errors import CorruptArtifact, PassDeployError, RecipeError, RunError, UsageError
from passdeploy.export import Artifact, ExportSettings, Samples, export_artifacts
from passdeploy.export.drafts import DRAFTS
from passdeploy.export.exporter import preview_programs
from passdeploy.export.packaging import Packaging
from passdeploy.export.settings import require_possible
from passdeploy.export.trt_sidecar import sidecar_path
from passdeploy.models.diagnosis import image_errors
from passdeploy.report.write import renew_report
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import load_network, read_plan_document, recipe_of
from passdeploy.runs.numbering import LATEST, name_without_number
from passdeploy.runtime.events import Listener, StageFinished, Warned, silent
from passdeploy.training.losses import logits_of

EXPORTS = "export"  # folder of the exported files, in the run folder
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
    fresh: bool = False,
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
        fresh: make files again that are there and unchanged.
        allow_code: let the recipe name a model factory, which runs its module's code.
        listener: receives progress events and warnings.
    """
    settings, packaging = settings or ExportSettings(), packaging or Packaging()
    require_possible(settings)
    packaging.require_possible(settings)
    names = ("slim", "dense") if dense else ("slim",)
    with RunFolder.open(Path(run), write=True) as folder:
        settings = _with_gates(settings, folder)
        samples = samples_of(folder, settings, image_size, listener=listener)
        if settings.is_dry_run:
            previews = [
                {"network": name, **facts}
                for name in names
                for facts in preview_programs(
                    _load_classifier(folder, name, samples, allow_code), samples, settings, listener=listener
                )
            ]
            return Exported(folder.path, (), tuple(previews))
        try:
            written = [
                artifact
                for name in names
                for artifact in export_network(folder, name, settings, samples, allow_code, listener, fresh=fresh)
            ]
        except PassDeployError:  # files of before may now be beside newer ones that they were not made from
            _renew_records(folder, listener)
            raise
        networks = {
            prefix_of(name, settings): _load_classifier(folder, name, samples, allow_code)
            for name in names
            if packaging.bundle
        }
        run_name = name_without_number(folder.path.name)
        packages = packaging.write(
            folder.path, written, settings, samples, name=run_name, networks=networks, listener=listener
        )
        for artifact in packages:
            if artifact.path.is_relative_to(folder.path):
                folder.record_existing(artifact.path.relative_to(folder.path).as_posix(), artifact.kind)
        _renew_records(folder, listener)
        renew_report(folder, listener)
        return Exported(folder.path, (*written, *packages))


FILE_PREFIX = {"dense": "dense", "slim": "model"}  # network -> first part of the names of its exported files


def export_network(
    folder: RunFolder,
    name: str,
    settings: ExportSettings,
    samples: Samples,
    allow_code: bool,
    listener: Listener,
    *,
    fresh: bool = False,
    home: str = EXPORTS,
) -> list[Artifact]:
    """Export one network of a run into its folder `home`.

    Each file is recorded in the manifest and in `artifacts.json` of that folder once it is written. Files that are
    there and were made as it is asked for now are returned as they are, unless `fresh`.
    """
    _remove_drafts(folder.path / home)
    facts, settings = read_plan_document(folder), _with_gates(settings, folder)
    metadata: dict[str, Any] = {
        **{key: facts[key] for key in _INPUT_FACTS if key in facts},  # runs of earlier versions have fewer
        "image_shape": list(samples.image_shape),
        "network": name,
        "run": folder.path.name,
        "sha256": {file: folder.record_of(file)["sha256"] for file in (f"{name}.safetensors", "plan.json")},
    }
    prefix = prefix_of(name, settings)
    weights = {file: str(sha256) for file, sha256 in metadata["sha256"].items()}
    if ":" in facts["model"]:  # made by code of the user's
        weights["code"] = hash_code(load_network(folder, name, allow_code))
    made_from = {one: fingerprint(settings, one, weights, samples) for one in settings.precisions}
    made: dict[str, list[Artifact]] = {}
    records = _read_records(folder, home, listener)
    for precision in settings.precisions if not fresh else ():
        found = find_unchanged(
            folder,
            home,
            records,
            prefix,
            settings,
            precision,
            made_from[precision],
            len(samples.images),
        )
        if found is not None:
            made[precision] = found
            listener(StageFinished("export", ", ".join(one.path.name for one in found), 0.0, is_skipped=True))
    missing = tuple(precision for precision in settings.precisions if precision not in made)
    if missing:
        for artifact in export_artifacts(
            _load_classifier(folder, name, samples, allow_code),
            samples,
            folder.path / home,
            replace(settings, precisions=missing),
            metadata=metadata,
            prefix=prefix,
            replacing=lambda path: folder.unrecord(f"{home}/{path.name}"),
            listener=listener,
        ):
            folder.record_existing(f"{home}/{artifact.path.name}", artifact.kind)
            if artifact.kind == "engine":
                folder.record_existing(f"{home}/{sidecar_path(artifact.path).name}", "sidecar")
            records[artifact.path.name] = {"network": name, **artifact.to_json()}
            if artifact.kind == "onnx":
                records[artifact.path.name]["made_from"] = made_from[artifact.precision]
            folder.write_json(_records_name(home), records)
            made.setdefault(artifact.precision, []).append(artifact)
    return [artifact for precision in settings.precisions for artifact in made.get(precision, ())]


class _ScoresOnly(nn.Module):
    """A classifier that returns its scores and nothing else of what it computes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores (batch, classes) of images (batch, 3, height, width)."""
        return logits_of(self.network(images))


def _load_classifier(folder: RunFolder, name: str, samples: Samples, allow_code: bool) -> nn.Module:
    """Load a network of a run that returns its scores as one tensor, for images of the size of `samples`.

    Raises:
        UsageError: it does not take images of this size.
    """
    network = load_network(folder, name, allow_code)
    model, size = read_plan_document(folder)["model"], samples.image_shape[-1]
    with image_errors(network, model, size, advice="Leave --image-size out."), torch.no_grad():
        output = network(torch.zeros(1, *samples.image_shape))
    return network if isinstance(output, Tensor) else _ScoresOnly(network)


def _renew_records(folder: RunFolder, listener: Listener) -> None:
    """Drop the records of exported files that are gone, and mark what was made from earlier files."""
    if records := _read_records(folder, EXPORTS, listener):
        there = {name: record for name, record in records.items() if (folder.path / EXPORTS / name).is_file()}
        mark_stale_(folder, there, listener)
        folder.write_json(_records_name(EXPORTS), there)


def _with_gates(settings: ExportSettings, folder: RunFolder) -> ExportSettings:
    """Take the tolerance of fp32 files from the recipe of a run."""
    return replace(settings, fp32_tolerance=recipe_of(folder).gates.parity)


def _remove_drafts(exported: Path) -> None:
    """Remove folders that a killed export has left (files go when a run is opened); this process has the run's lock."""
    for left in exported.glob(f"{DRAFTS}*"):
        shutil.rmtree(left)


def prefix_of(name: str, settings: ExportSettings) -> str:
    """Return the first part of the names of a network's files: `model`, `dense`, `model-pixels`."""
    return FILE_PREFIX[name] + ("-pixels" if settings.takes_pixels else "")


def _records_name(home: str) -> str:
    return f"{home}/artifacts.json"


def _read_records(folder: RunFolder, home: str, listener: Listener) -> dict[str, Any]:
    """Read the records of the exported files; empty where there are none, or a user has deleted the file.

    A damaged file is removed, with a warning: what it told of is made again when it is exported again.
    """
    name = _records_name(home)
    if not folder.has(name) or not (folder.path / name).is_file():
        return {}
    try:
        records: dict[str, Any] = folder.read_json(name)
    except CorruptArtifact:
        listener(Warned(f"{folder.path / name} was damaged or edited: it is not used, and is written anew."))
        folder.remove(name)
        return {}
    return records


def samples_of(
    folder: RunFolder, settings: ExportSettings, image_size: int | None = None, *, listener: Listener = silent
) -> Samples:
    """Return images of the run's data to check on and to calibrate on, scaled to `image_size` if one is given.

    Raises:
        UsageError: the network has a visual prompt, which fits one image size only.
        RunError: the images are not here.
        DataError: the data has other classes than those that the network was trained on.
    """
    facts = read_plan_document(folder)
    if image_size is not None and facts["prompt"] and image_size != facts["image_shape"][1]:
        raise UsageError(
            f"the network of {folder.path.name} has a visual prompt of {facts['image_shape'][1]} pixels.\n"
            "Leave --image-size out; with prune.prompt.keep: false, networks take other sizes too."
        )
    size = {} if image_size is None else {"image_size": image_size}
    try:
        data = load_data(recipe_of(folder).data.model_copy(update=size))
    except RecipeError as error:
        raise RunError(
            f"the images of {folder.path.name} are not here: {str(error).splitlines()[0]}\n"
            "Files are compared and calibrated on them: type this where they are, or put them there."
        ) from error
    require_same_classes(folder, data.identity, listener)
    return Samples.of(data, settings)
