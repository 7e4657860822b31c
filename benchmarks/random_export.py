"""Test of the ONNX export with random networks: each is compared in ONNX Runtime at several batch sizes.

    python -m benchmarks.random_export [--networks 500] [--first 0]

Writes benchmarks/results/random-export.json after every network, and continues from it when called again. A failure is
written as the smallest network that still fails, as Python code that can be pasted into a test. Exits with 1 if any
network failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from passdeploy.runtime.files import write_atomically
from tests.exported_networks import BATCH, export_and_compare
from tests.random_networks import Network, describe, network_of_seed, shrink

RESULTS = Path(__file__).parent / "results" / "random-export.json"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--networks", type=int, default=500, help="how many")
    arguments.add_argument("--first", type=int, default=0, help="the seed of the first one")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    options = arguments.parse_args()

    torch.set_num_threads(1)  # the networks are tiny
    result = _earlier_result(options.output, options.first)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        while result["networks"] < options.networks:
            start, seed = time.perf_counter(), options.first + result["networks"]
            network = network_of_seed(seed, traits=())
            outcome = _export_error(network, seed, folder)
            if isinstance(outcome, str):
                result["failures"].append(_smallest_failure(network, seed, outcome, folder))
                print(f"\nseed {seed}: {result['failures'][-1]['problem']}\n{result['failures'][-1]['network']}")
            else:
                result["largest_error"] = max(outcome, result["largest_error"])
            result["networks"] += 1
            result["failed"] = len(result["failures"])
            result["seconds"] = round(result["seconds"] + time.perf_counter() - start, 1)
            write_atomically(options.output, json.dumps(result, indent=2) + "\n")
            shown = f"\r{result['networks']} of {options.networks} networks, {result['failed']} failed"
            print(f"{shown}, {result['seconds']:.0f} s", end="", flush=True)
    print()
    return 1 if result["failures"] else 0


def _earlier_result(output: Path, first: int) -> dict[str, Any]:
    """Read the result of an earlier call with the same first seed and package versions, or return an empty one."""
    versions = {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
    fresh = {
        "networks": 0,
        "first_seed": first,
        "batch_sizes": list(BATCH),
        "failed": 0,
        "largest_error": 0.0,
        "seconds": 0.0,
        "versions": versions,
        "failures": [],
    }
    if not output.is_file():
        return fresh
    earlier: dict[str, Any] = json.loads(output.read_text())
    return earlier if (earlier["first_seed"], earlier["versions"]) == (first, versions) else fresh


def _export_error(network: Network, seed: int, folder: Path) -> float | str:
    """Export a network and return its largest relative error, or the text of the exception."""
    try:
        return export_and_compare(network, seed, folder).max_rel_error
    except Exception as error:  # any exception is a failure to report
        return f"{type(error).__name__}: {error}"


def _smallest_failure(network: Network, seed: int, problem: str, folder: Path) -> dict[str, Any]:
    """Shrink a network to as few layers as possible that still fail with the same kind of error."""
    kind = problem.split(":")[0]

    def fails(simpler: Network) -> bool:
        outcome = _export_error(simpler, seed, folder)
        return isinstance(outcome, str) and outcome.split(":")[0] == kind

    small = shrink(network, fails, tries=40)
    return {
        "seed": seed,
        "problem": str(_export_error(small, seed, folder)),
        "network": describe(small),
        "drawn": describe(network),
    }


if __name__ == "__main__":
    sys.exit(main())
