"""Cross-check with NVIDIA's polygraphy: it builds engines from our files, and measures the same errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from passdeploy.export import Artifact, ExportSettings, Samples, export_artifacts
from passdeploy.export.ort_session import open_session
from passdeploy.export.parity import measure_parity
from passdeploy.export.reference import compute_reference

from .nets import SmallNet

pytestmark = pytest.mark.skipif(
    find_spec("polygraphy") is None or find_spec("tensorrt_rtx_bindings") is None,
    reason="polygraphy (extra dev) or TensorRT for RTX (extra rtx) is not installed",
)

SCRIPT = """
import json, sys
import numpy as np
import tensorrt_rtx_bindings
sys.modules["tensorrt_rtx"] = tensorrt_rtx_bindings  # what polygraphy calls it
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

G_LOGGER.module_severity = G_LOGGER.ERROR
images, logits, *paths = sys.argv[1:]
shapes = [(size, 3, 16, 16) for size in (1, 8, 32)]
found = {}
for path in paths:
    network = network_from_onnx_path(path, strongly_typed=True)
    config = CreateConfig(profiles=[Profile().add("images", *shapes)])
    engine = bytes(engine_bytes_from_network(network, config))
    runs = Comparator.run([OnnxrtRunner(SessionFromOnnx(path))], data_loader=[{"images": np.load(images)}])
    runs.add([{"logits": np.load(logits)}], runner_name="torch")
    compared = Comparator.compare_accuracy(runs, compare_func=SimpleCompareFunc(check_error_stat="max"))
    ((result,),) = compared[0].values()
    found[path] = {"engine_bytes": len(engine), "max_abs_error": float(result["logits"].max_absdiff)}
print(json.dumps(found))
"""


@pytest.mark.rtx
def test_polygraphy_builds_our_files_and_finds_the_error_we_find(net: SmallNet, images: Tensor, tmp_path: Path):
    import numpy as np

    samples = Samples(images, images, (3, 16, 16), (0.5,) * 3, (0.25,) * 3)
    settings = ExportSettings(precisions=("fp32", "fp16", "int8"))
    written: list[Artifact] = list(export_artifacts(net, samples, tmp_path, settings))
    with torch.no_grad():
        np.save(tmp_path / "images.npy", images.numpy())
        np.save(tmp_path / "logits.npy", net(images).numpy())
    arguments = [tmp_path / "images.npy", tmp_path / "logits.npy", *(artifact.path for artifact in written)]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    reference = compute_reference(net, images, batch_sizes=(len(images),))
    real = replace(reference, batches=tuple(batch for batch in reference.batches if batch.is_real))
    for artifact in written:
        result = results[str(artifact.path)]
        assert result["engine_bytes"] > 1000
        ours = measure_parity(open_session(artifact.path, threads=1), real).max_abs_error
        assert ours > 0
        assert result["max_abs_error"] == pytest.approx(ours, rel=1e-3, abs=1e-7), artifact.path.name
