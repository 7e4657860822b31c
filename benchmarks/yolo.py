"""Benchmark of a YOLO pruned in its own trainer: accuracy and latency against the dense one that was trained as long.

    python -m benchmarks.yolo [--images 512] [--size 128] [--pretrain 30] [--epochs 2] [--steps 64] [--out FOLDER]

Needs Ultralytics (AGPL-3.0) and ONNX Runtime; run it alone on a quiet machine. YOLO11n is trained on drawn squares and
circles. One copy of it is pruned to half of its multiply-adds, with `--steps` steps of mask learning, and trained for
`--epochs`. The other one stays dense and is trained for as many epochs, and for as many more as mask learning takes
batches. Both are compared by the mAP50 of unseen images, and as ONNX files in turns, with one image and one thread.

Writes yolo.json into the folder; exits with 1 if the slim network lost more than 3 points or is not 1.4 times as fast.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from examples.yolo import write_shapes
from passdeploy.profiling.candidates import Candidate
from passdeploy.profiling.pair import profile_pair
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions
from passdeploy.trainers.yolo import prune_yolo

RESULTS = Path(__file__).parent / "results"
LARGEST_DROP, LEAST_SPEEDUP = 0.03, 1.4
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="of training, and as many of validation")
    parser.add_argument("--size", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--pretrain", type=int, default=30, help="epochs before pruning")
    parser.add_argument("--epochs", type=int, default=2, help="of the slim network")
    parser.add_argument("--steps", type=int, default=64, help="of mask learning")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring latencies")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    out = options.out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = compare(options)
    write_atomically(out / "yolo.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["is_met"] else 1)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Train, prune and measure in the current folder."""
    from ultralytics import YOLO

    data = str(write_shapes(Path("shapes"), options.images, options.size))
    common = {
        "imgsz": options.size,
        "batch": BATCH,
        "workers": 0,
        "plots": False,
        "device": "cpu",
        "project": str(Path("runs").absolute()),
        "exist_ok": True,
        "verbose": False,
    }
    start = YOLO("yolo11n.yaml")
    start.train(data=data, epochs=options.pretrain, name="start", **common)
    start.save("start.pt")

    began = perf_counter()
    slim = YOLO("start.pt")
    train = {"epochs": options.epochs, "name": "slim", **common}
    pruned = prune_yolo(slim, data, target={"macs": 0.5}, train=train, steps=options.steps)
    seconds = perf_counter() - began

    more = math.ceil(options.steps / math.ceil(options.images / BATCH))
    dense = YOLO("start.pt")
    dense.train(data=data, epochs=options.epochs + more, name="dense", **common)

    scores = {
        name: float(yolo.val(data=data, name=f"val-{name}", **common).box.map50)
        for name, yolo in (("start", YOLO("start.pt")), ("dense", dense), ("slim", slim))
    }
    files = {}
    for name, yolo in (("dense", dense), ("slim", slim)):
        yolo.save(f"{name}.pt")
        files[name] = Path(YOLO(f"{name}.pt").export(format="onnx", imgsz=options.size)).absolute()
    profile = profile_pair(
        *(Candidate(name, onnx=file) for name, file in files.items()),
        image_shape=(3, options.size, options.size),
        backends=("ort",),
        batches=(1,),
        threads=1,
        seconds=options.seconds,
    )
    dense_row, slim_row = profile.rows
    drop = scores["dense"] - scores["slim"]
    return {
        "model": "yolo11n",
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "dense_epochs": options.pretrain + options.epochs + more,
        "macs": [pruned.before.macs, pruned.after.macs],
        "params": [pruned.before.params, pruned.after.params],
        "max_rel_error": pruned.equivalence.max_rel_error,
        "map50": scores,
        "drop": drop,
        "median_ms": [dense_row.median_ms, slim_row.median_ms],
        "speedup": slim_row.speedup,
        "speedup_ci": list(slim_row.speedup_ci),
        "prune_and_train_s": seconds,
        "is_met": drop <= LARGEST_DROP and slim_row.speedup >= LEAST_SPEEDUP,
        "environment": dict(profile.environment),
        "versions": package_versions(),
    }


if __name__ == "__main__":
    main()
