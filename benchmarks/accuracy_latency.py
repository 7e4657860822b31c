"""Latency of the networks of `accuracy.py` over the dense one: ONNX Runtime, batch 8, one thread.

    python -m benchmarks.accuracy_latency --shares 0.85,0.7,0.1,0.05 [--rows benchmarks/results/accuracy.json]

Adds `latency`, slim over dense, to the rows of these budgets. The weights are random, since latency does not depend on
them. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from benchmarks.accuracy_report import report
from benchmarks.accuracy_settings import Workload
from benchmarks.latency_rows import measure_pair
from passdeploy.grouping.find import map_channels
from passdeploy.latency.resized_networks import make_sampler
from passdeploy.models.build import build_model
from passdeploy.profiling.interleaved import TimeBudget
from passdeploy.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
LATENCY_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=lambda text: [float(part) for part in text.split(",")], required=True)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense = build_model("passdeploy/resnet20_cifar", num_classes=10)
    images = torch.randn(LATENCY_BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sampler = make_sampler("ort", dense, map_channels(dense, images[:1]), images, threads=1)
    document = json.loads(options.rows.read_text())
    known: dict[str, float] = {}
    for row in document["rows"]:
        if row["share"] not in options.shares or row["method"].startswith("torch-pruning"):
            continue
        key = json.dumps(row["widths"], sort_keys=True)
        if key not in known:
            slim = partial(sampler.runner, row["widths"], "slim")
            took = measure_pair(partial(sampler.runner, {}, "dense"), slim, TimeBudget(seconds=2.0))
            known[key] = took["slim_ms"] / took["dense_ms"]
            print(
                f"{row['setting']} {row['share']:.0%} seed {row['seed']} {row['method']}: {known[key]:.1%}", flush=True
            )
        row["latency"] = known[key]
    write_atomically(options.rows, json.dumps(document, indent=1) + "\n")
    write_atomically(options.rows.with_suffix(".md"), report(document["rows"], Workload(**document["size"])))


if __name__ == "__main__":
    main()
