"""Are random networks slimmed exactly? Every one is cut at random and compared with the masked one.

    python -m benchmarks.random_networks [--networks 2000] [--first 0]

Writes benchmarks/results/random-networks.json; a failure is written as the smallest description that still fails,
which is Python: paste it into a test. Exits with 1 if any network failed. tests/random_networks.py draws and judges.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from tests.random_networks import Examined, Network, describe, examine, network_of_seed, shrink

RESULTS = Path(__file__).parent / "results" / "random-networks.json"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--networks", type=int, default=2000, help="how many")
    arguments.add_argument("--first", type=int, default=0, help="the seed of the first one")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    given = arguments.parse_args()

    torch.set_num_threads(1)  # the networks are tiny
    warnings.simplefilter("error")
    start, failures = time.perf_counter(), list[dict[str, Any]]()
    shares, removed, errors = [], [], []
    for done, seed in enumerate(range(given.first, given.first + given.networks), start=1):
        network = network_of_seed(seed)
        found = _examined(network, seed)
        if isinstance(found, str):
            failures.append(_smallest(network, seed, found))
            print(f"\nseed {seed}: {failures[-1]['problem']}\n{failures[-1]['network']}", file=sys.stderr)
        else:
            shares.append(found.share)
            removed.append(found.removed)
            errors.append(found.error)
        if done % 20 == 0 or done == given.networks:
            seconds = time.perf_counter() - start
            end = "\n" if done == given.networks else ""
            print(
                f"\r{done} of {given.networks} networks, {len(failures)} failed, {seconds:.0f} s", end=end, flush=True
            )

    result = {
        "networks": given.networks,
        "first_seed": given.first,
        "failed": len(failures),
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        "largest_error": max(errors, default=None),
        "prunable_share": _spread(shares),
        "removed_share_of_parameters": _spread(removed),
        "failures": failures,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    if shares:
        print(f"of the median network {median(shares):.0%} of the channels can be cut; largest error {max(errors):.0e}")
    return 1 if failures else 0


def _examined(network: Network, seed: int) -> Examined | str:
    """What the network is like, or what is wrong with how it is slimmed."""
    try:
        return examine(network, seed)
    except Exception as error:  # whatever it is, it is what we are looking for
        return f"{type(error).__name__}: {error}"


def _smallest(network: Network, seed: int, problem: str) -> dict[str, Any]:
    """The same kind of failure in as few layers as possible."""
    kind = problem.split()[:2]

    def fails(simpler: Network) -> bool:
        found = _examined(simpler, seed)
        return isinstance(found, str) and found.split()[:2] == kind

    small = shrink(network, fails)
    return {
        "seed": seed,
        "problem": str(_examined(small, seed)),
        "network": describe(small),
        "drawn": describe(network),
    }


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    low, middle, high = quantiles(values, n=4)
    return {"quarter": round(low, 4), "median": round(middle, 4), "three_quarters": round(high, 4)}


if __name__ == "__main__":
    sys.exit(main())
