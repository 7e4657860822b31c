"""Do random networks go through ONNX and ONNX Runtime? Each is exported and compared at several batch sizes.

    python -m benchmarks.random_export [--networks 500] [--first 0]

Writes benchmarks/results/random-export.json after every network, and goes on from there when it is called again. A
failure is written as the smallest description that still fails, which is Python: paste it into a test. Exits with 1 if
any network failed.
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
    given = arguments.parse_args()

    torch.set_num_threads(1)  # the networks are tiny
    result = _begun(given.output, given.first)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        while result["networks"] < given.networks:
            start, seed = time.perf_counter(), given.first + result["networks"]
            network = network_of_seed(seed)
            found = _judged(network, seed, folder)
            if isinstance(found, str):
                result["failures"].append(_smallest(network, seed, found, folder))
                print(f"\nseed {seed}: {result['failures'][-1]['problem']}\n{result['failures'][-1]['network']}")
            else:
                result["largest_error"] = max(found, result["largest_error"])
            result["networks"] += 1
            result["failed"] = len(result["failures"])
            result["seconds"] = round(result["seconds"] + time.perf_counter() - start, 1)
            write_atomically(given.output, json.dumps(result, indent=2) + "\n")
            shown = f"\r{result['networks']} of {given.networks} networks, {result['failed']} failed"
            print(f"{shown}, {result['seconds']:.0f} s", end="", flush=True)
    print()
    return 1 if result["failures"] else 0


def _begun(output: Path, first: int) -> dict[str, Any]:
    """The result so far: what an earlier call with the same first seed and packages wrote, or nothing."""
    versions = {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
    fresh = {
        "networks": 0, "first_seed": first, "batch_sizes": list(BATCH), "failed": 0, "largest_error": 0.0,
        "seconds": 0.0, "versions": versions, "failures": [],
    }  # fmt: skip
    if not output.is_file():
        return fresh
    earlier: dict[str, Any] = json.loads(output.read_text())
    return earlier if (earlier["first_seed"], earlier["versions"]) == (first, versions) else fresh


def _judged(network: Network, seed: int, folder: Path) -> float | str:
    """The largest relative error, or what went wrong."""
    try:
        return export_and_compare(network, seed, folder).max_rel_error
    except Exception as error:  # whatever it is, it is what we are looking for
        return f"{type(error).__name__}: {error}"


def _smallest(network: Network, seed: int, problem: str, folder: Path) -> dict[str, Any]:
    """The same kind of failure in as few layers as possible."""
    kind = problem.split(":")[0]

    def fails(simpler: Network) -> bool:
        found = _judged(simpler, seed, folder)
        return isinstance(found, str) and found.split(":")[0] == kind

    small = shrink(network, fails, tries=40)
    return {
        "seed": seed,
        "problem": str(_judged(small, seed, folder)),
        "network": describe(small),
        "drawn": describe(network),
    }


if __name__ == "__main__":
    sys.exit(main())
