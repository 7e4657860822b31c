"""Export of any network by name, without a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passdeploy.commands.export_run import Exported
from passdeploy.data.splits import ImageData, load_data
from passdeploy.errors import UsageError
from passdeploy.export import ExportSettings, Samples, export_artifacts
from passdeploy.export.exporter import preview_programs
from passdeploy.export.packaging import Packaging
from passdeploy.export.settings import require_possible
from passdeploy.models.build import build_model, comes_trained, published_classes
from passdeploy.models.classifier import find_classifier
from passdeploy.models.diagnosis import image_errors
from passdeploy.models.published_input import published_input
from passdeploy.models.weights import PRETRAINED, classifier_rows
from passdeploy.recipe import DataSpec, PreprocessingSpec
from passdeploy.runtime.events import Listener, Warned, silent
from passdeploy.runtime.files import expanded, require_writable, sha256_of

IMAGENET_CLASSES = 1000
_USUAL_SIZE = 224


def export_model(
    name: str,
    settings: ExportSettings | None = None,
    *,
    weights: str | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    images: Path | None = None,
    out: Path | None = None,
    packaging: Packaging | None = None,
    allow_code: bool = False,
    listener: Listener = silent,
) -> Exported:
    """Build a network, export it, and check what was exported.

    Args:
        name: torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory.
        settings: what to export; None: ONNX in fp32.
        weights: pretrained, a file of weights, or None for random ones.
        classes: outputs of the network; None: as many as `weights` are for.
        image_size: height and width of its input in pixels; None: that of pretrained weights, otherwise 224.
        images: folder of real images, as `data.root` of an imagefolder recipe; None: compare on noise only.
        out: folder to write to; None: `exports/NAME`.
        packaging: a Triton repository or a bundle to write as well; its folders are relative to `out`.
        allow_code: import the module of a factory.
        listener: receives progress events and warnings.

    Raises:
        UsageError: the network does not take images of this size, or does not give one score per class.
    """
    settings, packaging = settings or ExportSettings(), packaging or Packaging()
    require_possible(settings)
    packaging.require_possible(settings)
    short_name = name.rpartition("/")[2].replace(":", ".")
    folder = out or Path("exports") / short_name
    require_writable(folder)
    outputs = classes or _count_classes(name, weights, allow_code)
    published = published_input(name) if weights == PRETRAINED else None
    preprocessing = published.preprocessing if published else PreprocessingSpec()
    image_size = image_size or (published.image_size if published else _USUAL_SIZE)
    model = build_model(name, num_classes=outputs, weights=weights, allow_code=allow_code, listener=listener)
    _check_output(model, name, outputs, image_size)
    metadata: dict[str, Any] = {
        "model": name,
        "classes": [str(label) for label in range(outputs)],
        "image_shape": [3, image_size, image_size],
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "preprocessing": preprocessing.model_dump(mode="json", include={"interpolation", "crop"}),
        "network": "dense",
        "run": None,
    }
    if weights not in (None, PRETRAINED):
        metadata["sha256"] = {Path(str(weights)).name: sha256_of(expanded(str(weights)))}
    if weights is None:
        listener(Warned(f"{name} has random weights: name trained ones with --weights."))
    elif not comes_trained(name, num_classes=outputs, weights=weights):
        listener(Warned(f"the last layer of {name} has random weights: the pretrained ones have other classes."))
    samples = Samples.empty((3, image_size, image_size), preprocessing.mean, preprocessing.std)
    if images is not None:
        spec = DataSpec(name="imagefolder", root=str(images), image_size=image_size, preprocessing=preprocessing)
        data = load_data(spec)
        samples = _samples_of(data, settings, outputs)
        if samples.labels is not None:
            metadata["classes"] = list(data.classes)
        else:
            listener(
                Warned(f"{images} has {data.num_classes} classes, the network {outputs}: accuracy is not compared.")
            )
    if settings.is_dry_run:
        previews = preview_programs(model, samples, settings, listener=listener)
        return Exported(folder, (), tuple({"network": name, **facts} for facts in previews))
    prefix = "model-pixels" if settings.takes_pixels else "model"
    written = list(
        export_artifacts(model, samples, folder, settings, metadata=metadata, prefix=prefix, listener=listener)
    )
    packages = packaging.write(
        folder, written, settings, samples, name=short_name, networks={prefix: model}, listener=listener
    )
    return Exported(folder, (*written, *packages))


def _samples_of(data: ImageData, settings: ExportSettings, outputs: int) -> Samples:
    """Return images to check on; with labels only if the folder has as many classes as the network."""
    samples = Samples.of(data, settings)
    return samples if data.num_classes == outputs else replace(samples, labels=None)


def _count_classes(name: str, weights: str | None, allow_code: bool) -> int:
    """Return the number of classes of a weights file: the rows of its final classifier, or 1000 if they are unknown."""
    path = expanded(str(weights))
    if weights == PRETRAINED:
        return _count_published_classes(name)
    if weights is None or not path.is_file():
        return IMAGENET_CLASSES
    classifier = find_classifier(
        build_model(name, num_classes=IMAGENET_CLASSES, allow_code=allow_code), IMAGENET_CLASSES
    )
    return (classifier_rows(path, classifier) if classifier else None) or IMAGENET_CLASSES


def _count_published_classes(name: str) -> int:
    """Return the number of classes of pretrained weights, or 1000 if the library does not say.

    Raises:
        UsageError: they have no classifier.
    """
    try:
        known = published_classes(name)
    except (ValueError, KeyError, RuntimeError):  # no such network, as building it will say
        known = None
    if known == 0:
        raise UsageError(
            f"the pretrained weights of {name} have no classifier, so that its scores would be random.\n"
            "Name other weights; or say with --classes how many, for a network that is yet to be trained."
        )
    return known or IMAGENET_CLASSES


def _check_output(model: nn.Module, name: str, outputs: int, image_size: int) -> None:
    """Run one image through the network and check the shape of its output.

    Raises:
        UsageError: the network fails on images of this size, or its output is not (1, `outputs`).
    """
    with image_errors(model, name, image_size, advice="Choose another --image-size."), torch.no_grad():
        output = model(torch.zeros(1, 3, image_size, image_size))
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != (1, outputs):
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise UsageError(f"{name} answers with {shape}, not with one score for each of {outputs} classes.")
