"""Networks of packages that people bring along: ultralytics, transformers, segmentation_models_pytorch and rfdetr.

None of them is a dependency; a network whose package is not installed is skipped with that reason. Nothing is
downloaded: configurations are small ones made from the classes of configurations, and weights are random.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hf_configurations import HF_NETWORKS
from benchmarks.zoo import randomise_
from passdeploy.models.chosen_outputs import OutputChoice
from passdeploy.runtime import seeds

Built = tuple[nn.Module, OutputChoice | None]  # a network, and its outputs that count
FAMILIES = ("ultralytics", "rfdetr", "hf", "smp")

YOLO = (
    *("yolov5n", "yolov5n6", "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls", "yolov8n-p2"),
    *("yolov9t", "yolov9s", "yolov9c", "yolov9c-seg", "yolov9e", "yolov10n", "yolov10s"),
    *("yolo11n", "yolo11s", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls"),
    *("yolo12n", "yolo12n-seg", "yolo12n-pose", "yolo12n-obb", "yolo12n-cls"),
    *("yolo26n", "yolo26s", "yolo26n-seg", "yolo26n-pose", "yolo26n-obb", "yolo26n-cls"),
    *("rtdetr-l", "rtdetr-resnet50"),
)
SMP_ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet"),
    "Segformer",
)
SMP_ENCODERS = ("resnet18", "efficientnet-b0", "mobilenet_v2", "densenet121", "mit_b0")
# The decoders take every level of the encoder; a transformer has none at full resolution, a DenseNet no dilation.
SMP_UNSUPPORTED = {("UnetPlusPlus", "mit_b0"), ("Linknet", "mit_b0"), ("DeepLabV3", "mit_b0"), ("PAN", "mit_b0")}
SMP_UNSUPPORTED |= {("DeepLabV3Plus", "mit_b0"), *((name, "densenet121") for name in ("PAN", "DeepLabV3"))}
SMP_UNSUPPORTED |= {("DeepLabV3Plus", "densenet121")}
SMP_REPLACED = {"mit_b0": "timm-regnetx_002", "densenet121": "timm-resnest14d"}  # encoders that fit instead


class MissingPackage(Exception):
    """The package of a network is not installed, or lacks what is asked for."""


@dataclass(frozen=True)
class Guest:
    """A network of a package that may not be installed.

    Args:
        family: the package, one of FAMILIES.
        name: of the network, or of its class.
    """

    family: str
    name: str

    @property
    def key(self) -> str:
        """The family and the name, such as `hf/DetrForObjectDetection`."""
        return f"{self.family}/{self.name}"

    def build(self) -> tuple[nn.Module, OutputChoice | None]:
        """Build the network in evaluation mode, and say which of its outputs count: those that are read after training.

        Its weights are random, differ everywhere and are always the same.

        Raises:
            MissingPackage: its package, or the class in it, is not there.
        """
        torch.manual_seed(0)
        network, outputs = _BUILDERS[self.family](self.name)
        return randomise_(network).eval(), outputs

    def inputs(self) -> tuple[Tensor, ...]:
        """Return its positional arguments, random and always the same."""
        draws = seeds.generator("input", self.key)
        return tuple(torch.rand(shape, generator=draws) for shape in _SHAPES[self.family](self.name))


def guests() -> list[Guest]:
    """List all networks."""
    names: dict[str, Sequence[str]] = {
        "ultralytics": YOLO,
        "rfdetr": ("RFDETRNano", "RFDETRSegNano"),
        "hf": tuple(HF_NETWORKS),
        "smp": [f"{each}-{_encoder_of(each, encoder)}" for each in SMP_ARCHITECTURES for encoder in SMP_ENCODERS],
    }
    return [Guest(family, name) for family in FAMILIES for name in names[family]]


def _encoder_of(architecture: str, encoder: str) -> str:
    return SMP_REPLACED[encoder] if (architecture, encoder) in SMP_UNSUPPORTED else encoder


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackage(f"not installed: {error}") from error


# Ultralytics


def _ultralytics(name: str) -> Built:
    tasks = _import("ultralytics.nn.tasks")
    classes = {"seg": "SegmentationModel", "pose": "PoseModel", "obb": "OBBModel", "cls": "ClassificationModel"}
    kind = classes.get(name.rpartition("-")[2], "DetectionModel")
    model_class = getattr(tasks, "RTDETRDetectionModel" if name.startswith("rtdetr") else kind)
    try:
        model = model_class(f"{name}.yaml", verbose=False)
    except FileNotFoundError as error:
        raise MissingPackage(f"this version has no {name}.yaml") from error
    return model.float(), _predictions


def _predictions(outputs: Any) -> Any:
    """Return what Ultralytics decodes: its networks return the raw maps of the head and of the neck besides."""
    if not isinstance(outputs, tuple):
        return outputs
    first = outputs[0]
    return [leaf for leaf in first if isinstance(leaf, Tensor)] if isinstance(first, tuple) else first


# Hugging Face


def _hf(name: str) -> Built:
    transformers = _import("transformers")
    network = HF_NETWORKS[name]
    if not hasattr(transformers, name):
        raise MissingPackage(f"this version has no {name}")
    model_class = getattr(transformers, name)
    model = model_class(_configuration(transformers, model_class.config_class, network.options))
    return model, network.outputs


def _configuration(transformers: Any, config_class: Any, options: Mapping[str, Any]) -> Any:
    """Build a configuration; an option that is itself a pair of a class and options becomes a configuration."""
    values = {
        name: _configuration(transformers, getattr(transformers, value[0]), value[1])
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)
        else value
        for name, value in options.items()
    }
    return config_class(**values)


# segmentation_models_pytorch and rfdetr


def _smp(name: str) -> Built:
    smp = _import("segmentation_models_pytorch")
    architecture, _, encoder = name.partition("-")
    return getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None, classes=3), None


def _rfdetr(name: str) -> Built:
    rfdetr = _import("rfdetr")
    if not hasattr(rfdetr, name):
        raise MissingPackage(f"this version has no {name}")
    network = getattr(rfdetr, name)(pretrain_weights=None, device="cpu").model.model
    names = ("pred_logits", "pred_boxes", *(("pred_masks",) if "Seg" in name else ()))
    return network, names


def _rfdetr_shapes(name: str) -> list[tuple[int, ...]]:
    return [(1, 3, 384, 384)] if name == "RFDETRNano" else [(1, 3, 312, 312)]


_BUILDERS: dict[str, Callable[[str], Built]] = {
    "ultralytics": _ultralytics,
    "hf": _hf,
    "smp": _smp,
    "rfdetr": _rfdetr,
}
_SHAPES: dict[str, Callable[[str], Sequence[tuple[int, ...]]]] = {
    "ultralytics": lambda name: [(1, 3, 128, 128)],
    "hf": lambda name: [HF_NETWORKS[name].shape],
    "smp": lambda name: [(1, 3, 128, 128) if name.startswith("PAN") else (1, 3, 64, 64)],
    "rfdetr": _rfdetr_shapes,
}
