"""Benchmark of blocks: how many networks have some, and whether leaving them out is exact.

    python -m benchmarks.blocks zoo torchvision [NAME ...]
    python -m benchmarks.blocks zoo timm [NAME ...]
    python -m benchmarks.blocks random [--networks 500] [--first 0]

Of each network every block is left out alone, and ten random plans leave out blocks and cut channels together; the slim
network is compared with the masked one, in float64 where float32 leaves it open. Random networks have residual branches
of every form, see tests/random_networks.py. Results are added to benchmarks/results/blocks.json, and all of them are
written as tables to blocks.md. Exits with 4 if a slim network differs from the masked one by more than 1e-5 (relative),
or does not run.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.slimming_common import error_summary
from benchmarks.zoo import Entry, entries
from passdeploy import Plan, masked, slim
from passdeploy.channels.groups import ChannelMap
from passdeploy.grouping.find import map_channels
from passdeploy.models.cloning import deep_copy
from passdeploy.models.outputs import comparable_in
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions
from passdeploy.slimming.agreement import relative_error
from passdeploy.slimming.replay import DecisionLog
from tests.random_networks import BLOCK_TRAITS, describe, examine_blocks, network_of_seed

RESULTS = Path(__file__).parent / "results" / "blocks.json"
TOLERANCE = 1e-5
ROUNDING = 1e-3  # relative error: what rounding in float32 may amount to in a deep network
PLANS = 10  # random ones of each network


@click.group(help=__doc__.split("\n\n")[0] if __doc__ else None)
def main() -> None:
    """Find blocks and leave them out, in real or in random networks."""
    torch.set_num_threads(1)


@main.command()
@click.argument("library", type=click.Choice(["torchvision", "timm"]))
@click.argument("names", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def zoo(library: str, names: tuple[str, ...], out: Path) -> None:
    """Leave out blocks of the networks of LIBRARY: those with these NAMES, or those of the zoo."""
    for entry in [Entry(library, name) for name in names] or entries(library):
        row = examined(entry)
        print(f"{entry.key}: {json.dumps(row)}", flush=True)
        save(out, library, {entry.name: row})
    write_atomically(out.with_suffix(".md"), tables(read(out)))
    sys.exit(4 if any(row["failures"] for row in read(out)[library].values()) else 0)


@main.command("random")
@click.option("--networks", default=500, show_default=True, help="How many.")
@click.option("--first", default=0, show_default=True, help="Seed of the first one.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def random_networks(networks: int, first: int, out: Path) -> None:
    """Leave out blocks of random networks."""
    warnings.simplefilter("error")
    started, failures = time.perf_counter(), list[dict[str, Any]]()
    totals, forms, largest = Counter[str](), Counter[str](), 0.0
    for seed in range(first, first + networks):
        network = network_of_seed(seed, BLOCK_TRAITS)
        try:
            found = examine_blocks(network, seed)
        except Exception as error:  # any exception is a failure to report
            failures.append({"seed": seed, "problem": error_summary(error), "network": describe(network)})
            print(f"seed {seed}: {failures[-1]['problem']}\n{failures[-1]['network']}", flush=True)
            continue
        totals += Counter(blocks=found.blocks, prunable=found.prunable, with_blocks=int(found.prunable > 0))
        forms.update(found.substitutes)
        largest = max(largest, found.error)
    row = {
        "networks": networks,
        "first_seed": first,
        **totals,
        "substitutes": dict(forms),
        "max_rel_error": largest,
        "seconds": round(time.perf_counter() - started),
        "failures": failures,
    }
    print(json.dumps(row))
    save(out, "random", row)
    write_atomically(out.with_suffix(".md"), tables(read(out)))
    sys.exit(4 if failures else 0)


def examined(entry: Entry) -> dict[str, Any]:
    """Leave out the blocks of a network, one by one and in random plans; returns counts, errors and failures."""
    model, inputs = entry.build(), entry.inputs()
    started = time.process_time()
    try:
        channels = map_channels(model, inputs, with_blocks=True)
    except Exception as error:
        return {"blocks": 0, "prunable": 0, "failures": [error_summary(error)]}
    seconds = time.process_time() - started
    names = [block.name for block in channels.blocks if block.is_prunable]
    failures, largest, largest_alone, dense = list[str](), 0.0, 0.0, outputs_of(model, inputs)
    plans = [Plan({}, (name,)) for name in names]
    plans += [random_plan(channels, names, seed) for seed in range(PLANS)] if names else []
    for plan in plans:
        try:
            error, change = compared(model, channels, plan, inputs, dense)
            if TOLERANCE < error < ROUNDING:
                error = compared_in_float64(model, channels, plan, inputs)
        except Exception as fault:
            failures.append(f"{list(plan.skipped)}: {error_summary(fault)}")
            continue
        largest = max(largest, error)
        if not plan.kept:
            largest_alone = max(largest_alone, error)
        if not error <= TOLERANCE:
            failures.append(f"{list(plan.skipped)} and {len(plan.kept)} groups: differ by {error:.1e}")
        if not change:  # with random weights it may be small
            failures.append(f"{list(plan.skipped)}: without effect")
    without = Plan({}, tuple(names)).widths()
    kept = {kind: channels.costs.of(kind, without) / max(channels.costs.of(kind), 1) for kind in ("macs", "params")}
    reasons = Counter(_kind_of(block.reason) for block in channels.blocks if block.reason)
    return {
        "blocks": len(channels.blocks),
        "prunable": len(names),
        "macs_without": round(kept["macs"], 3),
        "params_without": round(kept["params"], 3),
        "substitutes": dict(Counter(one.by for block in channels.blocks for one in block.replacements)),
        "max_rel_error": largest,
        "max_rel_error_alone": largest_alone,
        "find_s": round(seconds, 1),
        "refused": dict(reasons),
        "failures": failures,
    }


def random_plan(channels: ChannelMap, names: list[str], seed: int) -> Plan:
    """Draw blocks to skip, at least one, and channels of every group to keep."""
    draw = Random(seed)
    skipped = [name for name in names if draw.random() < draw.choice((0.2, 0.5, 0.8))] or [draw.choice(names)]
    kept = {
        group.name: tuple(sorted(draw.sample(range(group.width), draw.randint(max(1, group.width // 4), group.width))))
        for group in channels.prunable
    }
    return Plan(kept, tuple(skipped))


def compared(
    model: nn.Module, channels: ChannelMap, plan: Plan, inputs: tuple[Any, ...], dense: list[Tensor]
) -> tuple[float, float]:
    """Return the relative errors of the slim network: towards the masked one, and towards the dense one."""
    decisions = DecisionLog()
    reference = masked(model, channels.groups, plan, channels.blocks).eval()
    with decisions.recording():
        expected = outputs_of(reference, inputs)
    del reference
    smaller = slim(
        model, channels.groups, plan, channels.blocks
    ).eval()  # it sorts, too: not while decisions are replayed
    with decisions.replaying():
        found = outputs_of(smaller, inputs)
    error, change = (
        max(relative_error(one, other) for one, other in zip(outputs, found, strict=True))
        for outputs in (expected, dense)
    )
    return error, change


def compared_in_float64(model: nn.Module, channels: ChannelMap, plan: Plan, inputs: tuple[Any, ...]) -> float:
    """Return the relative error of the slim network towards the masked one, both computed in float64."""
    precise = deep_copy(model).double()
    images = tuple(one.double() if isinstance(one, Tensor) and one.is_floating_point() else one for one in inputs)
    return compared(precise, channels, plan, images, outputs_of(precise, images))[0]


def outputs_of(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Run a network and list what can be compared of its outputs."""
    with torch.no_grad():
        return comparable_in(model(*inputs))


def _kind_of(reason: str) -> str:
    """Shorten a reason to what many have in common: without names of modules and lines of code."""
    return " ".join(word for word in reason.split() if "." not in word)


def read(path: Path) -> dict[str, Any]:
    """Read the results that are there."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return document


def save(path: Path, part: str, rows: dict[str, Any]) -> None:
    """Add rows to a part of the results."""
    document = read(path)
    document[part] = {**document.get(part, {}), **rows}
    document["versions"] = package_versions()
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def tables(document: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = ["# Blocks: found, and left out", ""]
    for library in ("torchvision", "timm"):
        rows = document.get(library, {})
        if not rows:
            continue
        some = sum(row["prunable"] > 0 for row in rows.values())
        wrong = sum(bool(row["failures"]) for row in rows.values())
        lines += [
            f"## {library}: {some} of {len(rows)} networks have blocks that may be skipped, {wrong} wrong",
            "",
            "| network | blocks | may go | MACs left | parameters left | error, alone | error, with widths | s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in sorted(rows.items()):
            cells = [row["blocks"], row["prunable"], *(f"{row.get(key, 1):.2f}" for key in _SHARES)]
            cells += [f"{row.get(key, 0):.0e}" for key in ("max_rel_error_alone", "max_rel_error")]
            lines.append(f"| {name} | {' | '.join(map(str, cells))} | {row.get('find_s', '')} |")
        lines.append("")
    if "random" in document:
        row = document["random"]
        lines += [
            f"## Random networks: {row['networks']}, {len(row['failures'])} wrong",
            "",
            f"{row.get('prunable', 0)} of {row.get('blocks', 0)} blocks may go, in {row.get('with_blocks', 0)} of the "
            f"networks; the largest error is {row['max_rel_error']:.0e} (float64).",
            "",
        ]
    return "\n".join(lines)


_SHARES = ("macs_without", "params_without")

if __name__ == "__main__":
    main()
