"""Do random networks go through ONNX and ONNX Runtime? Each is exported and compared at several batch sizes.

    python -m benchmarks.random_export [--networks 500] [--first 0]

Writes benchmarks/results/random-export.json; a failure is written as the smallest description that still fails, which
is Python: paste it into a test. Exits with 1 if any network failed.
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
    start, failures, errors = time.perf_counter(), list[dict[str, Any]](), list[float]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for done, seed in enumerate(range(given.first, given.first + given.networks), start=1):
            network = network_of_seed(seed)
            found = _judged(network, seed, folder)
            if isinstance(found, str):
                failures.append(_smallest(network, seed, found, folder))
                print(f"\nseed {seed}: {failures[-1]['problem']}\n{failures[-1]['network']}", file=sys.stderr)
            else:
                errors.append(found)
            end = "\n" if done == given.networks else ""
            shown = f"\r{done} of {given.networks} networks, {len(failures)} failed"
            print(f"{shown}, {time.perf_counter() - start:.0f} s", end=end, flush=True)

    result = {
        "networks": given.networks,
        "first_seed": given.first,
        "batch_sizes": list(BATCH),
        "failed": len(failures),
        "largest_error": max(errors, default=None),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        "failures": failures,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failures else 0


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
