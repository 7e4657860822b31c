"""Options of `passdeploy export`, their conversion to export settings, and a check for options without effect.

The command itself is in cli.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passdeploy.cli_completion import complete_precisions
from passdeploy.cli_numbers import FiniteRange
from passdeploy.cli_typed import flag_of, gathered, reject_ineffective, typed_command, typed_options
from passdeploy.errors import UsageError

if TYPE_CHECKING:
    from passdeploy.commands.export_run import Exported
    from passdeploy.export import Artifact, EngineOptions, ExportSettings
    from passdeploy.export.packaging import Packaging
    from passdeploy.runtime.events import Listener

_PATH = click.Path(path_type=Path)
_DEFAULT_FOLDER = "-"  # value of --triton and --bundle when they are given without a folder

_OPTIONS = (
    click.option("--onnx", is_flag=True, help="Write ONNX; this is always done."),
    click.option("--trt", is_flag=True, help="Also build TensorRT engines."),
    click.option("--torch-trt", is_flag=True, help="Also compile Torch-TensorRT programs (.pt2); needs a GPU."),
    click.option(
        "--dry-run",
        is_flag=True,
        help="With --torch-trt: show the engines it would make and what would stay in PyTorch; write nothing.",
    ),
    click.option(
        "--flavour",
        type=click.Choice(["tensorrt", "rtx"]),
        help="tensorrt (default) needs this machine's GPU; rtx (TensorRT for RTX) builds engines without one. For "
        "--torch-trt the default is what is installed.",
    ),
    click.option(
        "--precision",
        default="fp32",
        shell_complete=complete_precisions,
        show_default=True,
        metavar="P,P,...",
        help="fp32, fp16, bf16, int8, fp8 (with ModelOpt): one file each.",
    ),
    click.option(
        "--max-drop",
        type=FiniteRange(0, 1),
        metavar="SHARE",
        help="Largest loss of top-1, a fraction (0.005: half a point); layers that lose more stay fp32. Default: 0.001 "
        "for fp32, 0.005 for fp16 and bf16, 0.01 for int8 and fp8. A larger one lets as many answers differ.",
    ),
    click.option(
        "--quantiser",
        type=click.Choice(["ort", "modelopt"]),
        default="ort",
        show_default=True,
        help="Quantiser for int8: ONNX Runtime or NVIDIA ModelOpt.",
    ),
    click.option("--opset", type=int, help="ONNX operator set; default: 20, for bf16 22."),
    click.option(
        "--pixels", is_flag=True, help="Normalise inside the graph, which then accepts RGB pixels from 0 to 255."
    ),
    click.option(
        "--image-size",
        type=click.IntRange(min=1),
        help="Height and width in pixels; default: the run's, that of pretrained weights, or 224.",
    ),
    click.option("--fresh", is_flag=True, help="Make files again that are there and have not changed."),
    click.option("--model", help="Export a model by name, without a run: torchvision/NAME, timm/NAME, ..."),
    click.option("--weights", help="With --model: pretrained, or a .safetensors, .pt or .pth file."),
    click.option(
        "--classes", type=click.IntRange(min=1), help="With --model: number of outputs; default: that of the weights."
    ),
    click.option("--images", type=_PATH, help="With --model: a folder of images, as data.root of a recipe."),
    click.option("--out", type=_PATH, help="With --model: the folder to write to; default: exports/NAME."),
    click.option(
        "--triton",
        type=_PATH,
        is_flag=False,
        flag_value=_DEFAULT_FOLDER,
        metavar="[DIR]",
        help="Write a model repository for Triton; without DIR: triton, beside the exported files.",
    ),
    click.option(
        "--bundle",
        type=_PATH,
        is_flag=False,
        flag_value=_DEFAULT_FOLDER,
        metavar="[DIR]",
        help="Instead of building engines here, write what the target needs to build them.",
    ),
    click.option("--from-bundle", type=_PATH, metavar="DIR", help="Build the engines of a bundle, on the target."),
    click.option("--check-engine", type=_PATH, metavar="FILE", help="Only load an engine on this machine's GPU."),
    click.option(
        "--trust-engine",
        is_flag=True,
        help="Load an engine whose sidecar is missing or does not match, and run the host code of version-compatible "
        "ones.",
    ),
    click.option("--workspace-mb", type=click.IntRange(min=1), help="Scratch memory of TensorRT's builder."),
    click.option(
        "--optimization-level",
        type=click.IntRange(0, 5),
        default=3,
        show_default=True,
        help="TensorRT's: 0 builds fast, 5 makes the fastest engine.",
    ),
    click.option("--timing-cache", type=_PATH, metavar="FILE", help="TensorRT's kernel timings, read and written."),
    click.option("--version-compatible", is_flag=True, help="Engines for later TensorRT releases too; slower."),
    click.option("--hardware-compatible", is_flag=True, help="Engines for Ampere and all later GPUs; slower."),
    click.option("--refittable", is_flag=True, help="Engines whose weights can be replaced."),
    click.option(
        "--weight-stripped", is_flag=True, help="Engines without weights, read from the ONNX file beside them."
    ),
    click.option(
        "--tf32/--no-tf32",
        default=True,
        show_default=True,
        help="Products of float32 numbers with 10 bits of mantissa.",
    ),
)


def export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets them as one argument `request`."""
    result = gathered(command, ExportRequest, "request")
    for option in reversed(_OPTIONS):
        result = option(result)
    return result


@dataclass(frozen=True)
class ExportRequest:
    """The options of `passdeploy export` as typed, except the run, the batch sizes and `--dense`."""

    onnx: bool
    trt: bool
    torch_trt: bool
    dry_run: bool
    flavour: Any
    precision: str
    max_drop: float | None
    quantiser: Any
    opset: int | None
    pixels: bool
    image_size: int | None
    fresh: bool
    model: str | None
    weights: str | None
    classes: int | None
    images: Path | None
    out: Path | None
    triton: Path | None
    bundle: Path | None
    from_bundle: Path | None
    check_engine: Path | None
    trust_engine: bool
    workspace_mb: int | None
    optimization_level: int
    timing_cache: Path | None
    version_compatible: bool
    hardware_compatible: bool
    refittable: bool
    weight_stripped: bool
    tf32: bool

    def engine(self) -> EngineOptions:
        """Return the options of TensorRT's builder."""
        from passdeploy.export import EngineOptions

        return EngineOptions(
            workspace_bytes=None if self.workspace_mb is None else self.workspace_mb * 2**20,
            optimization_level=self.optimization_level,
            timing_cache=self.timing_cache,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            refittable=self.refittable,
            weight_stripped=self.weight_stripped,
            tf32=self.tf32,
        )

    def settings(self, batch: tuple[int, ...]) -> ExportSettings:
        """Return the settings of the export; with --bundle, no engines are built here."""
        from passdeploy.export import ExportSettings
        from passdeploy.export.precision import parse_precisions

        kinds = ["onnx"]
        kinds += ["trt"] if self.trt and self.bundle is None else []
        kinds += ["torch-trt"] if self.torch_trt else []
        return ExportSettings(
            kinds=tuple(kinds),
            precisions=parse_precisions([part.strip() for part in self.precision.split(",")]),
            batch=batch,
            opset=self.opset,
            takes_pixels=self.pixels,
            max_drop=self.max_drop,
            quantiser=self.quantiser,
            flavour=self.flavour,
            engine=self.engine(),
            is_dry_run=self.dry_run,
        )

    def packaging(self, exported: str) -> Packaging:
        """Return the folders of --triton and --bundle: absolute ones where they are named, else inside `exported`."""
        from passdeploy.export.packaging import Packaging

        def folder(option: Path | None, default: str) -> Path | None:
            return Path(exported, default) if str(option) == _DEFAULT_FOLDER else option and option.absolute()

        return Packaging(folder(self.triton, "triton"), folder(self.bundle, "bundle"))

    def run(self, run_dir: Path, batch: tuple[int, ...], dense: bool, allow_code: bool, listener: Listener) -> Exported:
        """Export a run or a model, or build the engines of a bundle.

        Args:
            run_dir: the run folder, for an export without --model.
            batch: (min, opt, max).
            dense: export the dense network of the run too.
            allow_code: import the module of a model factory.
            listener: receives progress events and warnings.
        """
        from passdeploy.commands.export_run import Exported, export_run

        if self.from_bundle is not None:
            from passdeploy.export.bundle import build_bundle

            built = build_bundle(self.from_bundle, flavour=self.flavour, listener=listener)
            return Exported(self.from_bundle, tuple(built))
        settings = self.settings(batch)
        if self.model is not None:
            from passdeploy.commands.export_model import export_model

            return export_model(
                self.model,
                settings,
                weights=self.weights,
                classes=self.classes,
                image_size=self.image_size,
                images=self.images,
                out=self.out,
                packaging=self.packaging(""),
                allow_code=allow_code,
                listener=listener,
            )
        return export_run(
            run_dir,
            settings,
            dense=dense,
            image_size=self.image_size,
            packaging=self.packaging("export"),
            fresh=self.fresh,
            allow_code=allow_code,
            listener=listener,
        )

    def next_step(self, run_option: str, allow_code: bool, artifacts: Sequence[Artifact]) -> str:
        """Return the command to type after this export of `artifacts`; `run_option` is what names the run in it."""
        if self.bundle is not None:
            return "copy the bundle to the target, and there: sh build.sh"
        if self.from_bundle is not None:
            return typed_command("export", "--check-engine", str(artifacts[0].path))
        if self.dry_run:
            return "the same command without --dry-run"
        if self.model is not None:
            return typed_command("inspect", self.model, allow_code=allow_code)
        return f"passdeploy profile{run_option}"

    def reject_ineffective_options(self) -> None:
        """Raise if an option was typed that has no effect with the others.

        Raises:
            UsageError: names the first such option.
        """
        typed = typed_options() - {"as_json", "quiet", "allow_code"}
        builds = self.trt or self.bundle is not None
        for alone, others in (("check_engine", {"trust_engine"}), ("from_bundle", {"flavour"})):
            if alone in typed and (ineffective := typed - others - {alone}):
                raise UsageError(f"{flag_of(min(ineffective))} does not go with {flag_of(alone)}.")
        quantised = [precision for precision in ("int8", "fp8") if precision in self.precision]
        if "quantiser" in typed and self.quantiser == "ort" and quantised == ["fp8"]:
            raise UsageError("--quantiser ort is for int8; fp8 is always quantised by ModelOpt.")
        reject_ineffective(
            (
                (_MODEL_OPTIONS, self.model is not None, "goes with --model; a run knows its own."),
                (_RUN_OPTIONS, self.model is None, "goes with a run, not with --model."),
                (("trust_engine",), self.check_engine is not None, "goes with --check-engine."),
                (
                    ("flavour",),
                    builds or self.torch_trt or self.from_bundle is not None,
                    "says what engines are for: add --trt or --bundle.",
                ),
                (("dry_run",), self.torch_trt and not builds, "goes with --torch-trt, without --trt and --bundle."),
                (("triton", "fresh", "opset"), not self.dry_run, "is of files, which a --dry-run does not write."),
                (_ENGINE_OPTIONS, builds or self.torch_trt, "says how engines are built: add --trt or --bundle."),
                (("timing_cache",), self.bundle is None, "is of the machine that builds: leave it out of a bundle."),
                (("quantiser",), bool(quantised), "is for --precision int8 or fp8."),
            )
        )


_MODEL_OPTIONS = ("weights", "classes", "images", "out")
_RUN_OPTIONS = ("run_dir", "dense", "fresh")
_ENGINE_OPTIONS = (
    "workspace_mb",
    "optimization_level",
    "timing_cache",
    "version_compatible",
    "hardware_compatible",
    "refittable",
    "weight_stripped",
    "tf32",
)


def check_engine(path: Path, trust_engine: bool, listener: Listener) -> dict[str, Any]:
    """Load an engine on this machine's GPU, and return its TensorRT version and layer-precision counts."""
    from passdeploy.export.trt_layer_precisions import count_engine_layers
    from passdeploy.export.trt_sidecar import load_engine

    trt, engine = load_engine(path, trust_engine=trust_engine, listener=listener)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"path": str(path), "tensorrt": trt.__version__, "census": count_engine_layers(text)}
