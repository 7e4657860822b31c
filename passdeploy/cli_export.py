"""The options of `passdeploy export`, and what they ask for; the command itself is with the others in cli.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from passdeploy.commands.export_run import Exported
    from passdeploy.export import EngineOptions, ExportSettings
    from passdeploy.export.packaging import Packaging
    from passdeploy.runtime.events import Listener

Command = TypeVar("Command", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)
_OURS = "-"  # stands for the usual folder where --triton and --bundle are given without one

_OPTIONS = (
    click.option("--onnx", is_flag=True, help="Write ONNX; the default if nothing else is asked for."),
    click.option("--trt", is_flag=True, help="Also build TensorRT engines."),
    click.option("--torch-trt", is_flag=True, help="Also compile Torch-TensorRT programs (.pt2); needs a GPU."),
    click.option("--flavour", type=click.Choice(["tensorrt", "rtx"]), default="tensorrt", show_default=True,
                 help="tensorrt needs this machine's GPU; rtx (TensorRT for RTX) builds without one."),
    click.option("--precision", default="fp32", show_default=True, metavar="P,P,...",
                 help="fp32, fp16, bf16, int8, fp8 (with ModelOpt): one file each."),
    click.option("--max-drop", type=click.FloatRange(0, 1), metavar="SHARE",
                 help="Top-1 that a lower precision may cost, a fraction (0.005: half a point); layers that hurt stay "
                 "fp32. Left out: 0.005 for fp16 and bf16, 0.01 for int8 and fp8."),
    click.option("--quantiser", type=click.Choice(["ort", "modelopt"]), default="ort", show_default=True,
                 help="What makes int8: ONNX Runtime or NVIDIA ModelOpt."),
    click.option("--opset", type=int, help="ONNX operator set; left out: 20, for bf16 22."),
    click.option("--pixels", is_flag=True, help="Normalise inside the graph: it takes RGB pixels from 0 to 255."),
    click.option("--image-size", type=click.IntRange(min=1), help="Pixels, both ways; left out: the run's, or 224."),
    click.option("--model", help="Export a model by name, without a run: torchvision/NAME, timm/NAME, ..."),
    click.option("--weights", help="With --model: pretrained, or a .safetensors file."),
    click.option("--classes", type=click.IntRange(min=1), help="With --model: its outputs; left out: the weights'."),
    click.option("--images", type=_PATH, help="With --model: a folder of images, as data.root of a recipe."),
    click.option("--out", type=_PATH, help="With --model: where to write; left out: exports/NAME."),
    click.option("--triton", type=_PATH, is_flag=False, flag_value=_OURS, metavar="[DIR]",
                 help="Write a model repository for Triton; without DIR: triton, beside the exported files."),
    click.option("--bundle", type=_PATH, is_flag=False, flag_value=_OURS, metavar="[DIR]",
                 help="Instead of building engines here, write what the target needs to build them."),
    click.option("--from-bundle", type=_PATH, metavar="DIR", help="Build the engines of a bundle, on the target."),
    click.option("--check-engine", type=_PATH, metavar="FILE", help="Load an engine on this machine's GPU, no more."),
    click.option("--trust-engine", is_flag=True, help="Load an engine whose sidecar is missing or does not match."),
    click.option("--workspace-mb", type=click.IntRange(min=1), help="Scratch memory of TensorRT's builder."),
    click.option("--optimization-level", type=click.IntRange(0, 5), default=3, show_default=True,
                 help="TensorRT's: 0 builds fast, 5 makes the fastest engine."),
    click.option("--timing-cache", type=_PATH, metavar="FILE", help="Measurements of TensorRT, read and written."),
    click.option("--version-compatible", is_flag=True, help="Engines for later TensorRT releases too; slower."),
    click.option("--hardware-compatible", is_flag=True, help="Engines for Ampere and all later GPUs; slower."),
    click.option("--refittable", is_flag=True, help="Engines whose weights can be exchanged."),
    click.option("--weight-stripped", is_flag=True, help="Engines without weights, to be refitted on the target."),
)  # fmt: skip


def export_options(command: Command) -> Command:
    """All of them, as one argument `wanted`."""

    @wraps(command)
    def gathered(*arguments: Any, **given: Any) -> Any:
        wanted = ExportRequest(**{name: given.pop(name) for name in ExportRequest.__dataclass_fields__})
        return command(*arguments, wanted=wanted, **given)

    result: Any = gathered
    for option in reversed(_OPTIONS):
        result = option(result)
    return result  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ExportRequest:
    """What was typed after `passdeploy export`, but for the run and the batch."""

    onnx: bool
    trt: bool
    torch_trt: bool
    flavour: Any
    precision: str
    max_drop: float | None
    quantiser: Any
    opset: int | None
    pixels: bool
    image_size: int | None
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

    def engine(self) -> EngineOptions:
        """How to build engines."""
        from passdeploy.export import EngineOptions

        return EngineOptions(
            workspace_bytes=None if self.workspace_mb is None else self.workspace_mb * 2**20,
            optimization_level=self.optimization_level,
            timing_cache=self.timing_cache,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            refittable=self.refittable,
            weight_stripped=self.weight_stripped,
        )

    def settings(self, batch: tuple[int, ...]) -> ExportSettings:
        """What to export. A bundle is made in the place of engines."""
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
        )

    def packaging(self, exported: str) -> Packaging:
        """What to gather: into the folders that were named, as seen from here, or beside the files in `exported`."""
        from passdeploy.export.packaging import Packaging

        def folder(asked: Path | None, usual: str) -> Path | None:
            return Path(exported, usual) if str(asked) == _OURS else asked and asked.absolute()

        return Packaging(folder(self.triton, "triton"), folder(self.bundle, "bundle"))

    def carry_out(
        self, run_dir: Path, batch: tuple[int, ...], dense: bool, allow_code: bool, tell: Listener
    ) -> Exported:
        """Do what was asked for.

        Raises:
            click.UsageError: options that do not go together.
        """
        from passdeploy.commands.export_run import Exported, export_run

        if self.from_bundle is not None:
            from passdeploy.export.bundle import build_bundle

            flavour = self.flavour if "flavour" in _typed() else None
            return Exported(self.from_bundle, tuple(build_bundle(self.from_bundle, flavour=flavour, tell=tell)))
        settings = self.settings(batch)
        if self.model is not None:
            from passdeploy.commands.export_model import export_model

            return export_model(
                self.model, settings, weights=self.weights, classes=self.classes, image_size=self.image_size or 224,
                images=self.images, out=self.out, packaging=self.packaging(""), allow_code=allow_code, tell=tell,
            )  # fmt: skip
        return export_run(
            run_dir, settings, dense=dense, image_size=self.image_size, packaging=self.packaging("export"),
            allow_code=allow_code, tell=tell,
        )  # fmt: skip

    def next_step(self, run_option: str) -> str:
        """What to type when it is done."""
        if self.bundle is not None:
            return "copy the bundle to the target, and there: sh build.sh"
        if self.from_bundle is not None:
            return f"passdeploy export --check-engine {self.from_bundle}/NAME.engine"
        return f"passdeploy inspect {self.model}" if self.model is not None else f"passdeploy profile{run_option}"

    def require_sense(self) -> None:
        """No option was typed that would have no effect beside the others.

        Raises:
            click.UsageError: the first one that would.
        """
        typed = _typed() - {"as_json", "quiet", "allow_code"}
        builds = self.trt or self.bundle is not None
        for alone, others in (("check_engine", {"trust_engine"}), ("from_bundle", {"flavour"})):
            if alone in typed and (lost := typed - others - {alone}):
                raise click.UsageError(f"{_flag(min(lost))} does not go with {_flag(alone)}.")
        for names, has_effect, words in (
            (_OF_A_MODEL, self.model is not None, "goes with --model; a run knows its own."),
            (_OF_A_RUN, self.model is None, "goes with a run, not with --model."),
            (("trust_engine",), self.check_engine is not None, "goes with --check-engine."),
            (("flavour",), builds or self.from_bundle is not None, "says what engines are for: add --trt or --bundle."),
            (_OF_ENGINES, builds or self.torch_trt, "says how engines are built: add --trt or --bundle."),
            (("timing_cache",), self.bundle is None, "is of the machine that builds: leave it out of a bundle."),
            (
                ("quantiser",),
                any(kind in self.precision for kind in ("int8", "fp8")),
                "is for --precision int8 or fp8.",
            ),
        ):
            if not has_effect and (lost := typed.intersection(names)):
                raise click.UsageError(f"{_flag(min(lost))} {words}")


_OF_A_MODEL, _OF_A_RUN = ("weights", "classes", "images", "out"), ("run_dir", "dense")
_OF_ENGINES = (
    "workspace_mb", "optimization_level", "timing_cache", "version_compatible", "hardware_compatible", "refittable",
    "weight_stripped",
)  # fmt: skip


def _typed() -> set[str]:
    """The options that were typed, rather than left at their defaults."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {name for name in context.params if context.get_parameter_source(name) is not default}


def _flag(name: str) -> str:
    return "--" + {"run_dir": "run", "as_json": "json"}.get(name, name).replace("_", "-")


def check_engine(path: Path, trust_engine: bool) -> dict[str, Any]:
    """Load an engine here, and say what it is."""
    from passdeploy.export.trt_layer_precisions import count_engine_layers
    from passdeploy.export.trt_sidecar import load_engine

    trt, engine = load_engine(path, trust_engine=trust_engine)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"path": str(path), "tensorrt": trt.__version__, "census": count_engine_layers(text)}
