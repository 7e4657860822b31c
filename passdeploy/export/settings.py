"""Settings of an export, the images it is checked with, and a check that this machine can carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from passdeploy.data.splits import ImageData, Split
from passdeploy.errors import UsageError, require
from passdeploy.export.artifact import BatchRange
from passdeploy.export.precision import LIMITS, QUANTISED_PRECISIONS, Limits, choose_opset, parse_precisions
from passdeploy.export.preprocessing import OnPixels
from passdeploy.export.quantise import Quantiser
from passdeploy.export.torch_trt import PROGRAM_PRECISIONS, compile_settings
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.export.trt_api import Flavour, load_trt
from passdeploy.export.trt_engine import EngineOptions

EXPORT_KINDS = ("onnx", "trt", "torch-trt")

CHECK_IMAGES = 512  # real images to compare on, enough to see a change of 0.5 % in agreement or accuracy
CHECK_IMAGES_FP32 = 64  # the same for fp32 alone, where any error shows on a few images
NOISE_IMAGES = 8  # where there are no real images to compare on
CALIBRATION_IMAGES = 256  # real images to calibrate quantisation on, and to rank layers with


@dataclass(frozen=True)
class ExportSettings:
    """Formats, precisions, batch sizes and options of an export."""

    kinds: tuple[str, ...] = ("onnx",)  # of `EXPORT_KINDS`; ONNX is always written, since engines are built from it
    precisions: tuple[str, ...] = ("fp32",)
    batch: tuple[int, ...] = (1, 8, 32)  # (min, opt, max)
    opset: int | None = None  # None: the default for the precision
    takes_pixels: bool = False  # True: normalisation inside the graph
    fp32_tolerance: float = LIMITS["fp32"].rel_error
    max_drop: float | None = None  # largest loss of top-1, and share of other answers; None: those of the precision
    quantiser: Quantiser = "ort"
    flavour: Flavour | None = None  # None: TensorRT for engines, and for programs whichever Torch-TensorRT is installed
    engine: EngineOptions = field(default_factory=EngineOptions)
    is_dry_run: bool = False  # tell what Torch-TensorRT would make, and write nothing

    @property
    def engine_flavour(self) -> Flavour:
        """The flavour of TensorRT that builds engines."""
        return self.flavour or "tensorrt"

    def limits(self, precision: str) -> Limits:
        """Return the largest differences from the model that a file of this precision may have.

        A file that may lose more accuracy than usual may give as many other answers.
        """
        limits = LIMITS[precision]
        if precision == "fp32":
            limits = replace(limits, rel_error=self.fp32_tolerance)
        if self.max_drop is None:
            return limits
        agreement = min(limits.top1_agreement, 1 - self.max_drop)
        return replace(limits, top1_drop=self.max_drop, top1_agreement=agreement)


@dataclass(frozen=True)
class Samples:
    """Normalised images to check and to calibrate on, (n, 3, height, width), and their normalisation."""

    images: Tensor  # to check on: real images that the model was not trained on; empty where there are none
    calibration: Tensor  # to calibrate on: other real images; empty where there are none
    image_shape: tuple[int, ...]  # (3, height, width)
    mean: Sequence[float]
    std: Sequence[float]
    labels: Tensor | None = None  # of `images`, (n,)

    @classmethod
    def of(cls, data: ImageData, settings: ExportSettings) -> Samples:
        """Take test images to check on and training images to calibrate on, as many as the precisions need."""
        has_conversion = set(settings.precisions) != {"fp32"}
        images, labels = _take_images(data.test, CHECK_IMAGES if has_conversion else CHECK_IMAGES_FP32)
        calibration, _ = _take_images(data.train, CALIBRATION_IMAGES if has_conversion else 1)
        return cls(images, calibration, data.image_shape, data.mean, data.std, labels)

    def as_graph_inputs(self, settings: ExportSettings) -> Samples:
        """Return the samples in the form the exported graphs accept: pixels, where the graphs normalise."""
        if not settings.takes_pixels:
            return self
        to_pixels = OnPixels(nn.Identity(), self.mean, self.std).pixels_of
        return replace(self, images=to_pixels(self.images), calibration=to_pixels(self.calibration))

    def noise(self, settings: ExportSettings) -> Tensor:
        """Make noise to compare on where there are no images, the same every time, in the form the graphs accept."""
        shape = (NOISE_IMAGES, *self.image_shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return OnPixels(nn.Identity(), self.mean, self.std).pixels_of(noise) if settings.takes_pixels else noise

    @classmethod
    def empty(cls, image_shape: tuple[int, ...], mean: Sequence[float], std: Sequence[float]) -> Samples:
        """Return samples without any images."""
        no_images = torch.empty(0, *image_shape)
        return cls(no_images, no_images, image_shape, mean, std)


def require_possible(settings: ExportSettings, samples: Samples | None = None) -> None:
    """Raise unless `settings` are valid and this machine can carry them out.

    Args:
        settings: of the export.
        samples: images of the export, where they are known already.

    Raises:
        UsageError: an unknown kind or precision, an invalid batch range, or int8 without images to calibrate on.
        MissingError: TensorRT, Torch-TensorRT or a quantiser is missing.
    """
    if unknown := sorted(set(settings.kinds) - set(EXPORT_KINDS)):
        raise UsageError(f"cannot export {', '.join(unknown)}: choose from {', '.join(EXPORT_KINDS)}.")
    BatchRange.of(settings.batch)
    for precision in parse_precisions(settings.precisions):
        choose_opset(precision, settings.opset)
        if precision in QUANTISED_PRECISIONS:
            uses_modelopt = precision == "fp8" or settings.quantiser == "modelopt"
            require("modelopt" if uses_modelopt else "onnxruntime", extra="quant" if uses_modelopt else "cpu")
            if samples is not None and len(samples.calibration) == 0:
                raise UsageError(
                    f"{precision} takes its ranges from real images, and there are none.\n"
                    "Give a folder of them with --images, or export a run, which knows its data."
                )
    if "trt" in settings.kinds:
        settings.engine.require_possible(settings.engine_flavour)
        load_trt(settings.engine_flavour)
    if "torch-trt" in settings.kinds:
        if unsupported := sorted(set(settings.precisions) - set(PROGRAM_PRECISIONS)):
            raise UsageError(
                f"Torch-TensorRT programs are {', '.join(PROGRAM_PRECISIONS)} here, not {', '.join(unsupported)}: "
                "it does not take the Q/DQ of our graphs.\n"
                f"Use --trt, which builds {unsupported[0]} engines from those; programs in a command of their own."
            )
        _, flavour = load_torch_trt(settings.flavour)
        compile_settings(settings.engine, flavour)


def _take_images(split: Split, count: int) -> tuple[Tensor, Tensor]:
    """Take up to `count` images of a split and their labels, always the same ones, from all classes."""
    images, labels = next(split.batches(max(1, min(count, len(split))), epoch=0))
    return images, labels
