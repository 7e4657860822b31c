"""Test of slimming with random networks: each is cut at random and compared with the masked one.

    python -m benchmarks.random_networks [--networks 2000] [--first 0] [--traits wrapped patched ...]

Writes benchmarks/results/random-networks.json. A failure is written as the smallest network that still fails, as Python
code that can be pasted into a test. Exits with 1 if any network failed. tests/random_networks.py draws and checks the
networks.
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

from tests.random_networks import (
    TRAITS,
    Examined,
    Network,
    describe,
    examine,
    network_of_seed,
    shrink,
)

RESULTS = Path(__file__).parent / "results" / "random-networks.json"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--networks", type=int, default=2000, help="how many")
    arguments.add_argument("--first", type=int, default=0, help="the seed of the first one")
    arguments.add_argument("--traits", nargs="*", default=TRAITS, choices=TRAITS, help="to draw from")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    options = arguments.parse_args()

    torch.set_num_threads(1)  # the networks are tiny
    warnings.simplefilter("error")
    start, failures = time.perf_counter(), list[dict[str, Any]]()
    shares, removed, errors = [], [], []
    for done, seed in enumerate(range(options.first, options.first + options.networks), start=1):
        network = network_of_seed(seed, options.traits)
        outcome = _examine(network, seed)
        if isinstance(outcome, str):
            failures.append(_smallest_failure(network, seed, outcome))
            print(f"\nseed {seed}: {failures[-1]['problem']}\n{failures[-1]['network']}", file=sys.stderr)
        else:
            shares.append(outcome.share)
            removed.append(outcome.removed)
            errors.append(outcome.error)
        if done % 20 == 0 or done == options.networks:
            seconds = time.perf_counter() - start
            end = "\n" if done == options.networks else ""
            print(
                f"\r{done} of {options.networks} networks, {len(failures)} failed, {seconds:.0f} s", end=end, flush=True
            )

    result = {
        "networks": options.networks,
        "first_seed": options.first,
        "traits": list(options.traits),
        "failed": len(failures),
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        "largest_error": max(errors, default=None),
        "prunable_share": _quartiles(shares),
        "removed_share_of_parameters": _quartiles(removed),
        "failures": failures,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    if shares:
        print(f"of the median network {median(shares):.0%} of the channels can be cut; largest error {max(errors):.0e}")
    return 1 if failures else 0


def _examine(network: Network, seed: int) -> Examined | str:
    """Cut a network and check the result; return its figures, or the text of the exception."""
    try:
        return examine(network, seed)
    except Exception as error:  # any exception is a failure to report
        return f"{type(error).__name__}: {error}"


def _smallest_failure(network: Network, seed: int, problem: str) -> dict[str, Any]:
    """Shrink a network to as few layers as possible that still fail with the same kind of error."""
    kind = problem.split()[:2]

    def fails(simpler: Network) -> bool:
        outcome = _examine(simpler, seed)
        return isinstance(outcome, str) and outcome.split()[:2] == kind

    small = shrink(network, fails)
    return {
        "seed": seed,
        "problem": str(_examine(small, seed)),
        "network": describe(small),
        "drawn": describe(network),
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    low, middle, high = quantiles(values, n=4)
    return {"quarter": round(low, 4), "median": round(middle, 4), "three_quarters": round(high, 4)}


if __name__ == "__main__":
    sys.exit(main())
