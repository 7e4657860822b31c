"""A run as its files describe it, made without training, with a class whose name is markup."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from passdeploy.models.prompt import PROMPT_KEY
from passdeploy.recipe import parse_recipe
from passdeploy.report.pictures import encode_sample
from passdeploy.report.run_facts import SAMPLE
from passdeploy.runs.folder import RunFolder

RECIPE = "model: {name: torchvision/resnet18}\ndata: {name: digits, image_size: 32}\nprune: {target: {macs: 0.5}}\n"
NASTY = "<script>alert('7')</script>"
MEASURED: dict[str, Any] = {"backend": "ort", "device": "cpu", "precision": "fp32", "batch": 8, "threads": 1}
MEASURED |= {"options": [], "n": 2000, "ci95_rel": 0.01, "notes": []}
ROWS: list[dict[str, Any]] = [
    {"model": "dense", **MEASURED, "median_ms": 4.0, "speedup": 1.0, "speedup_ci": [1, 1]},
    {"model": "slim", **MEASURED, "median_ms": 2.0, "speedup": 2.0, "speedup_ci": [1.9, 2.1]},
]
GROUPS = [
    {"name": "layer1.0.conv1", "width": 64, "kept": 24, "macs_saved": 0.3, "params_saved": 0.1},
    {"name": "layer2.0.conv1", "width": 128, "kept": 128, "macs_saved": 0.0, "params_saved": 0.0},
]
LAYER = {
    "dense_ms": 1.0,
    "slim_ms": 0.5,
    "dense_channels": [64, 64],
    "slim_channels": [24, 64],
    "group": "layer1.0.conv1",
}
LAYERS = [{**LAYER, "name": "layer1.0.conv1", "why": ""}, {**LAYER, "name": "layer1.0.conv2", "why": "a reason"}]

MakeRun = Callable[..., Path]


def summary_with(**changes: Any) -> dict[str, Any]:
    """Return a summary; dense and slim are merged, every other key is replaced."""
    summary: dict[str, Any] = {
        "recipe": "made",
        "model": "torchvision/resnet18",
        "method": "pass",
        "seed": 0,
        "dense": {"top1": 0.95, "params": 11_200_000, "macs": 1_800_000_000},
        "slim": {"top1": 0.945, "top1_before_finetune": 0.9, "params": 6_000_000, "macs": 900_000_000},
        "prompt": {"keep": True, "top1_with": 0.945, "top1_without": 0.94},
        "budget": {"kind": "macs", "requested": 0.5, "achieved": 0.5},
        "equivalence": {"max_rel_error": 2.6e-7, "input_shapes": []},
        "groups": GROUPS,
        "blocks": [],
        "images": {"train": {NASTY: 5000, "eight": 5000}, "test": {NASTY: 5000, "eight": 5000}},
        "latency": ROWS,
        "seconds": {"dense": 100.0, "learn": 60.0},
        "versions": {"passdeploy": "0.1.0", "torch": "2.14"},
        "environment": {"deterministic": True, "device": "cpu", "cpu": "Imaginary CPU"},
    }
    for key, value in changes.items():
        summary[key] = {**summary[key], **value} if key in ("dense", "slim") else value
    return summary


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        name: str = "made", *, profile: dict[str, Any] | None = None, exports: bool = False, **changes: Any
    ) -> Path:
        with RunFolder.create(tmp_path / "runs", name) as folder:
            folder.write_text("recipe.resolved.yaml", parse_recipe(RECIPE, "made", name=name).to_yaml(), kind="recipe")
            folder.write_json("summary.json", summary_with(**changes), kind="summary")
            groups = {group["name"]: {"width": group["width"], "kept": list(range(group["kept"]))} for group in GROUPS}
            classes = [NASTY, "eight"]
            plan = {"groups": groups, "classes": classes, "mean": [0.5] * 3, "std": [0.25] * 3}
            folder.write_json("plan.json", plan, kind="plan")
            scores = {f"scores.{group['name']}": torch.rand(group["width"]) for group in GROUPS}
            folder.write_tensors("scores.safetensors", {**scores, PROMPT_KEY: torch.rand(1, 3, 32, 32)}, kind="scores")
            with folder.adding(SAMPLE, "sample") as draft:
                draft.write_bytes(encode_sample(np.random.default_rng(0).random((32, 32, 3))))
            if profile is not None:
                folder.write_json("profile.json", profile, kind="profile")
            if exports:
                parity = {"max_rel_error": 1e-6, "top1_agreement": 1.0, "top1": 0.945, "reference_top1": 0.945}
                facts = {"opset": 20, "parity": {**parity, "real_images": 512}}
                record = {"kind": "onnx", "precision": "fp32", "size_bytes": 24_000_000, "facts": facts}
                folder.write_json("export/artifacts.json", {"model.onnx": record})
                (folder.path / "export" / "model.onnx").touch()
            lines = [
                {"stage": stage, "step": step, "total": 400, metric: 1 / step}
                for stage, metric in (("dense", "loss"), ("learn", "loss"), ("learn", "budget"), ("finetune", "loss"))
                for step in range(1, 401)
            ]
            (folder.path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "fine')
        return folder.path

    return make
