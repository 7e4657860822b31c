"""Benchmark of export precisions: accuracy and error of exported networks against the PyTorch models.

    python -m benchmarks.export [--digits-run RUN] [--cifar CIFAR-FOLDER --weights RESNET20.safetensors]

MobileNetV2 on digits, dense and slim, comes from a run of the demo, which is made first unless it is given; ResNet-20
on CIFAR-10 takes its images and weights from the options. Every file is made as `passdeploy export` makes it,
calibrated on 256 training images, and compared on all test images. A column has the number of layers that had to stay
in float32.

Writes benchmarks/results/export.json and .md; exits with 1 if a row misses a limit.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from passdeploy.commands.prune import run
from passdeploy.data.splits import ImageData, Split, load_data
from passdeploy.errors import GateError
from passdeploy.export import Artifact, ExportSettings, Samples, export_artifacts
from passdeploy.export.settings import CALIBRATION_IMAGES
from passdeploy.models.build import build_model
from passdeploy.recipe import DataSpec, load_recipe
from passdeploy.runs.load import load
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions

RESULTS = Path(__file__).parent / "results" / "export.json"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Limits:
    """The limits of a precision on real images: largest relative error, agreement of the answers, top-1 lost."""

    rel_error: float | None
    agreement: float
    drop: float


LIMITS = {
    "fp32": Limits(1e-4, 0.999, 0.001),
    "fp16": Limits(None, 0.995, 0.005),
    "bf16": Limits(None, 0.98, 0.005),
    "int8": Limits(None, 0.98, 0.01),
}


@dataclass(frozen=True)
class Case:
    """A trained network with its data."""

    name: str
    model: nn.Module
    data: ImageData


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits-run", type=Path, help="a finished run of mobilenetv2.yaml; left out: makes one")
    parser.add_argument("--cifar", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--weights", type=Path, help="of passdeploy/resnet20_cifar")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if (options.cifar is None) != (options.weights is None):
        parser.error("--cifar and --weights go together")

    start, rows = perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        for case in _cases(options, Path(scratch)):
            for precision in PRECISIONS:
                rows.append(_measure_row(case, precision, Path(scratch) / "export"))
                print(_line(rows[-1]), flush=True)
    missed = sum(bool(row["missed"]) for row in rows)
    document = {
        "rows": rows,
        "missed": missed,
        "seconds": round(perf_counter() - start),
        "machine": f"{platform.machine()}, CPU, {torch.get_num_threads()} threads",
        "versions": package_versions(),
    }
    write_atomically(options.output, json.dumps(document, indent=1) + "\n")
    write_atomically(options.output.with_suffix(".md"), "\n".join([*_table(rows), ""]))
    print(f"{options.output}: {len(rows)} rows, {missed} miss what was promised")
    return 1 if missed else 0


def _cases(options: argparse.Namespace, scratch: Path) -> Iterator[Case]:
    recipe = load_recipe("mobilenetv2.yaml")
    folder = options.digits_run or run(recipe, out=scratch / "runs").path
    digits = load_data(recipe.data)
    for name in ("dense", "slim"):
        yield Case(f"MobileNetV2 {name}, digits", load(folder, name), digits)
    if options.cifar is not None:
        cifar = load_data(DataSpec(name="imagefolder", root=str(options.cifar), image_size=32, batch_size=64))
        model = build_model("passdeploy/resnet20_cifar", num_classes=cifar.num_classes, weights=str(options.weights))
        yield Case("ResNet-20, CIFAR-10", model, cifar)


def _measure_row(case: Case, precision: str, folder: Path) -> dict[str, Any]:
    """Export one file and compare it with the PyTorch model."""
    data = case.data
    images, labels = _all_images(data.test)
    calibration, _ = next(data.train.batches(CALIBRATION_IMAGES, epoch=0))
    samples = Samples(images, calibration, data.image_shape, data.mean, data.std, labels)
    row: dict[str, Any] = {"network": case.name, "precision": precision, "images": len(images)}
    try:
        (artifact,) = export_artifacts(case.model, samples, folder, ExportSettings(precisions=(precision,)))
    except GateError as error:
        return {**row, "missed": [str(error)]}
    return {**row, **_figures(artifact), "missed": _missed_limits(artifact)}


def _all_images(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    return next(split.batches(len(split), epoch=0))


def _figures(artifact: Artifact) -> dict[str, Any]:
    parity = artifact.facts["parity"]
    names = ["top1_agreement", "reference_top1", "top1", "top1_drop"]
    names += ["max_abs_error", "max_rel_error", "max_rel_error_real"]
    kept = artifact.facts.get("kept", [])
    return {**{name: parity[name] for name in names}, "kept": len(kept), "bytes": artifact.size_bytes}


def _missed_limits(artifact: Artifact) -> list[str]:
    """List the limits that a file misses, as text."""
    parity, limits = artifact.facts["parity"], LIMITS[artifact.precision]
    missed = []
    if limits.rel_error is not None and parity["max_rel_error"] > limits.rel_error:
        missed.append(f"error above {limits.rel_error}")
    if parity["top1_agreement"] < limits.agreement:
        missed.append(f"agreement below {limits.agreement}")
    if parity["top1_drop"] > limits.drop + 1e-9:
        missed.append(f"lost more than {limits.drop:.1%}")
    return missed


def _line(row: dict[str, Any]) -> str:
    if "top1" not in row:
        return f"| {row['network']} | {row['precision']} | {row['images']:,} | rejected: {row['missed'][0]} |"
    values = (
        row["network"],
        row["precision"],
        f"{row['images']:,}",
        f"{row['top1_agreement']:.2%}",
        f"{row['reference_top1']:.2%}",
        f"{row['top1']:.2%}",
        f"{100 * row['top1_drop']:+.2f}",
        f"{row['max_rel_error_real']:.1e}",
        f"{row['max_rel_error']:.1e}",
        str(row["kept"]),
        f"{row['bytes'] / 1e6:.2f}",
        ", ".join(row["missed"]) or "yes",
    )
    return f"| {' | '.join(values)} |"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "Exported files against the PyTorch models they were made of, on all test images, in ONNX Runtime (CPU); fp16",
        "and bf16 with every value rounded where it is stored. Errors are relative to the largest output; kept are the",
        "layers that had to stay in float32. Promised: fp32 an error of at most 1e-4; fp16 the same answer on 99.5 %",
        "of the images and at most 0.5 points lost; bf16 98 % and 0.5; int8 98 % and 1.",
        "",
        "| network | precision | images | same answer | top-1 PyTorch | top-1 | points lost | error, images "
        "| error, with noise | kept | MB | as promised |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
