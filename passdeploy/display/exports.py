"""The table of exported files: size, what they are made for, and how they compare with PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from passdeploy.display.listing import Footnotes, Listing
from passdeploy.display.units import megabytes
from passdeploy.errors import UNKNOWN, percent

_PACKAGES = ("triton", "bundle", "sidecar")
_PYTORCH = "the PyTorch model"  # that files are compared with, as in export/reference.py, which imports torch


def exports_table(artifacts: Iterable[Mapping[str, Any]]) -> Listing:
    """Build the table of exported files.

    Args:
        artifacts: each with `name`, and the fields of `Artifact.to_json`; files of bundles and Triton are counted in a
            note.
    """
    notes, rows, packaged, counts = Footnotes(), [], dict[str, int](), set[int]()
    for artifact in artifacts:
        facts = artifact["facts"]
        if artifact["kind"] in _PACKAGES:
            packaged[artifact["kind"]] = packaged.get(artifact["kind"], 0) + 1
            continue
        parity = facts.get("parity") or {}
        error = parity.get("max_rel_error")
        counts |= {parity["real_images"]} if parity.get("top1") is not None else set()
        rows.append(
            (
                str(artifact["name"]),
                str(artifact["precision"]),
                megabytes(artifact["size_bytes"]),
                made_as(artifact),
                UNKNOWN if error is None else f"{error:.0e}",
                _accuracy_text(parity),
                notes.numbers_of(_notes_of(artifact)),
            )
        )
    under = [*notes.lines()]
    if rows:
        images = ", ".join(str(count) for count in sorted(counts)) or "no"
        under.insert(
            0,
            "error: largest difference from PyTorch, relative to its largest output; "
            f"top-1 on {images} images, with the change from PyTorch in points",
        )
    under += [f"{count} files of a {kind} folder" for kind, count in packaged.items()]
    headings = ("file", "precision", "size", "made as", "error", "top-1", "note")
    return Listing(headings, tuple(rows), notes=tuple(under), left=frozenset({0, 1, 3}))


def made_as(artifact: Mapping[str, Any]) -> str:
    """Name the operator set of an ONNX file, or the TensorRT (TRT) or TensorRT for RTX of an engine or program."""
    facts = artifact["facts"]
    if artifact["kind"] == "onnx":
        return f"opset {facts.get('opset', UNKNOWN)}"
    if artifact["kind"] == "engine":
        flavour = "RTX" if facts.get("flavour") == "rtx" else "TRT"
        return f"{flavour} {'.'.join(str(facts.get('tensorrt', '')).split('.')[:2])}".strip()
    if artifact["kind"] == "program":
        return "Torch-TRT RTX" if facts.get("flavour") == "rtx" else "Torch-TRT"
    return str(artifact["kind"])


def preview_lines(previews: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe a dry run: for each network and precision its engines, and what stays in PyTorch."""
    lines = []
    for facts in previews:
        what = f"{facts['network']} {facts['precision']}"
        counts = ", ".join(f"{count} {name}" for name, count in facts["census"]["products"].items())
        lines.append(
            f"{what}: {_engines(facts['engines'])}, {facts['operators']} operators, {percent(facts['coverage'])} of "
            f"them in engines; convolutions and products: {counts}"
        )
        if facts["kept_modules"] or facts["beyond_range"]:
            lines.append(f"{what}: stay fp32: {', '.join((*facts['kept_modules'], *facts['beyond_range']))}")
        if facts["torch_operations"]:
            lines.append(
                f"{what}: {facts['torch_operations']} operators stay in PyTorch, {facts['switches']} switches: "
                + ", ".join(facts["torch_lines"])
            )
        if "engines_with_fixed_batch" in facts:
            lines.append(f"{what}: with a fixed batch (--batch N,N,N) {_engines(facts['engines_with_fixed_batch'])}")
    return lines


def _engines(count: int) -> str:
    return "1 engine" if count == 1 else f"{count} engines"


def _accuracy_text(parity: Mapping[str, Any]) -> str:
    """Write top-1 and its change from PyTorch on the same images: `98.83 % +0.00`."""
    if parity.get("top1") is None:
        return UNKNOWN
    change = 100 * (parity["top1"] - parity["reference_top1"])
    return f"{percent(parity['top1'], 2)} {change:+.2f}"


def _notes_of(artifact: Mapping[str, Any]) -> list[str]:
    """Return what should be known of a file: layers that stayed fp32, and what was not compared."""
    facts, texts = artifact["facts"], [str(artifact["stale"])] if artifact.get("stale") else []
    if kept := facts.get("kept_modules") or facts.get("kept"):
        texts.append(f"{len(kept)} layer{'s' if len(kept) > 1 else ''} kept in fp32: {', '.join(kept)}")
    parity = facts.get("parity")
    if parity is None:
        is_engine = artifact["kind"] == "engine"
        texts.append(
            "not compared: it runs on a GPU; its ONNX file was compared" if is_engine else "not compared with PyTorch"
        )
        return texts
    compared_with = parity.get("compared_with", _PYTORCH)
    if compared_with != _PYTORCH:
        texts.append(f"compared with {compared_with} instead of {_PYTORCH}, from which it may differ more")
    if parity.get("top1") is None:
        is_real = bool(parity.get("real_images"))
        texts.append("accuracy was not compared: no labels" if is_real else "compared on noise only: give real images")
    return texts
