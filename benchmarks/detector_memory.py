"""Memory that finding the channel groups of a detector takes, on an image of 600 pixels.

    python -m benchmarks.detector_memory [--pixels 600] [NAME ...]

Every network runs in a process of its own. Measured is the peak memory of the process in GiB after the network was
built, after one forward pass, and after its channel groups were found. Writes benchmarks/results/detector-memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torchvision.models import get_model

from passdeploy.grouping.find import map_channels
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions

RESULTS = Path(__file__).parent / "results" / "detector-memory.json"
NETWORKS = (
    *("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
    *("fcos_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"),
)


def measure(name: str, pixels: int) -> dict[str, Any]:
    """Measure the peak memory of this process after each step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = get_model(name, weights=None, weights_backbone=None, min_size=pixels, max_size=pixels).eval()
    results: dict[str, Any] = {"built_gib": _peak_gib()}
    image = torch.rand(3, pixels, pixels)
    with torch.no_grad():
        net([image])
    results["forward_gib"] = _peak_gib()
    start = time.process_time()
    channels = map_channels(net, [[image]])
    results |= {"groups_gib": _peak_gib(), "cpu_s": round(time.process_time() - start, 1)}
    return results | {"groups": len(channels.groups), "prunable": len(channels.prunable)}


def _peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("names", nargs="*", default=NETWORKS)
    arguments.add_argument("--pixels", type=int, default=600)
    arguments.add_argument("--alone", action="store_true", help="measure in this process, and print")
    options = arguments.parse_args()
    if options.alone:
        print(json.dumps(measure(options.names[0], options.pixels)))
        return 0
    results = {}
    for name in options.names:
        command = [sys.executable, "-m", "benchmarks.detector_memory", name, "--alone", "--pixels", str(options.pixels)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        results[name] = json.loads(answer.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
    document = {"pixels": options.pixels, "networks": results, "versions": package_versions()}
    write_atomically(RESULTS, json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
