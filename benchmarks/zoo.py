"""Networks that the benchmarks cut: names, builders with random weights, and example inputs.

Nothing is downloaded. Inputs are small: convolutional networks get 128 pixels; networks that are built for a fixed
size get that size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.runtime import seeds

SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
DETECTION = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")

ZOOS = ("torchvision", "segmentation", "detection", "video", "timm")


@dataclass(frozen=True)
class Entry:
    """A network of the zoo."""

    zoo: str
    name: str

    @property
    def key(self) -> str:
        """The zoo and the name, such as `timm/resnet18`."""
        return f"{self.zoo}/{self.name}"

    def build(self) -> nn.Module:
        """Build the network in evaluation mode, with random weights that differ everywhere and are always the same."""
        torch.manual_seed(0)
        return randomise_(self.construct())

    def construct(self) -> nn.Module:
        """Call the network's factory; its weights are those that the factory draws."""
        return _BUILDERS[self.zoo](self.name)

    def inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Return positional arguments for the network, random and always the same."""
        shape = _SHAPES[self.zoo](self.name)
        images = torch.randn(batch, *shape, generator=seeds.generator("input", self.key))
        return (list(images.sigmoid()),) if self.zoo == "detection" else (images,)

    def training_inputs(self) -> tuple[Any, ...]:
        """Return positional arguments for training; detectors also get boxes."""
        inputs = self.inputs(batch=2)
        return (*inputs, [_detection_target(image) for image in inputs[0]]) if self.zoo == "detection" else inputs

    @property
    def classes(self) -> int:
        """The number of outputs of the last layer."""
        return {"segmentation": 21, "detection": 91, "video": 400}.get(self.zoo, 1000)


def entries(zoo: str) -> list[Entry]:
    """List the networks of one zoo, or of `all`."""
    if zoo == "all":
        return [entry for name in ZOOS for entry in entries(name)]
    return [Entry(zoo, name) for name in _NAMES[zoo]()]


def _torchvision_names() -> Sequence[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _timm_names() -> Sequence[str]:
    from benchmarks.timm_models import EXTRA, SMALLEST

    return [*SMALLEST, *(name for name in EXTRA if name not in SMALLEST)]


_NAMES: dict[str, Callable[[], Sequence[str]]] = {
    "torchvision": _torchvision_names,
    "segmentation": lambda: SEGMENTATION,
    "detection": lambda: DETECTION,
    "video": lambda: VIDEO,
    "timm": _timm_names,
}


# Building


def _torchvision(name: str) -> nn.Module:
    import torchvision

    plain = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **plain)
    return model


def _dense_prediction(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return model


def _detector(name: str) -> nn.Module:
    """Build a detector for small images that keeps every box, since random weights give low scores."""
    import torchvision

    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if "rcnn" in name:
        options |= {"box_score_thresh": 0.0, "box_detections_per_img": 10, "rpn_post_nms_top_n_test": 50}
        options |= {"min_size": 256, "max_size": 256}
    elif name.startswith("ssd"):
        options |= {"score_thresh": 0.0}
    else:
        options |= {"score_thresh": 0.0, "min_size": 256, "max_size": 256}
    model: nn.Module = torchvision.models.get_model(name, **options)
    return model


def _timm(name: str) -> nn.Module:
    """Build a network of timm; one without classes gets a head, or its feature stream would be its output."""
    import timm

    from benchmarks.timm_models import OPTIONS

    headless = {} if timm.models.get_pretrained_cfg(name).num_classes else {"num_classes": 1000}
    model: nn.Module = timm.create_model(name, pretrained=False, **headless, **OPTIONS.get(name, {}))
    return model


_BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _torchvision,
    "segmentation": _dense_prediction,
    "detection": _detector,
    "video": _torchvision,
    "timm": _timm,
}


def _torchvision_shape(name: str) -> tuple[int, ...]:
    if name == "inception_v3":
        return 3, 299, 299
    return (3, 224, 224) if name.startswith(("vit", "swin", "maxvit")) else (3, 128, 128)


def _timm_shape(name: str) -> tuple[int, ...]:
    import timm

    from benchmarks.timm_models import SIZE

    channels, *size = timm.models.get_pretrained_cfg(name).input_size
    return (channels, SIZE[name], SIZE[name]) if name in SIZE else (channels, *size)


_SHAPES: dict[str, Callable[[str], tuple[int, ...]]] = {
    "torchvision": _torchvision_shape,
    "segmentation": lambda name: (3, 128, 128),
    "detection": lambda name: (3, 300, 300) if name.startswith("ssd300") else (3, 256, 256),
    "video": lambda name: (3, 16, 224, 224) if name == "s3d" else (3, 8, 64, 64),
    "timm": _timm_shape,
}


def _detection_target(image: Tensor) -> dict[str, Tensor]:
    boxes = torch.tensor([[16.0, 16.0, 96.0, 112.0], [60.0, 40.0, 200.0, 180.0]])
    masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
    masks[:, 50:90, 65:90] = 1
    points = torch.rand(2, 17, 1, generator=seeds.generator("points")) * 70 + 40
    keypoints = torch.cat([points, points, torch.ones_like(points)], 2)  # (boxes, points, x y visible)
    return {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": keypoints}


# Weights


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Replace all constant parameters by random ones: zeros and ones would hide a wrongly cut channel.

    Freshly built networks start many scales at 1, shifts at 0 and residual gates at 0 or 1e-6. Here every batch norm
    gets random statistics, and every constant shift (a bias) and every constant scale gets random values.
    """
    draw = seeds.generator("zoo", seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), Tensor):  # batch norms of any class, frozen ones too
                module.running_mean.uniform_(-0.3, 0.3, generator=draw)
                module.running_var.uniform_(0.5, 1.5, generator=draw)
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name.startswith("running_") or not tensor.is_floating_point() or tensor.numel() == 0:
                    continue
                learns = isinstance(tensor, nn.Parameter) or isinstance(getattr(module, "running_var", None), Tensor)
                if learns and bool((tensor == tensor.reshape(-1)[0]).all()):
                    is_shift = "bias" in name or "beta" in name
                    low, high = (-0.3, 0.3) if is_shift else (0.5, 1.5)
                    if tensor.ndim > 1 and min(tensor.shape) > 1 and not is_shift:  # a matrix that starts at zero
                        low, high = -0.1, 0.1
                    tensor.uniform_(low, high, generator=draw)
    return model.eval()
