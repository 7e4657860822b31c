"""Benchmark of networks that people bring along: detectors, Hugging Face models, segmentation networks.

    pip install ultralytics transformers segmentation-models-pytorch rfdetr
    python -m benchmarks.guests

None of these packages is a dependency of passdeploy; networks of a package that is not installed are skipped, and the
table says so. Nothing is downloaded. Of detectors only the predictions count as outputs, not the feature maps.

Every network runs in a process of its own, on one thread, with random weights (`guest_networks.py`). It is cut to one
half of every width and then to random widths, and each time the slim network is compared with the masked one by
`verify`, at a second image and batch size as well where the network takes one. `seconds` are the CPU seconds of
`find_groups`.

Results are kept in a JSON file with a table beside it, and a second call measures the missing ones.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.guest_networks import FAMILIES, Guest, MissingPackage, guests
from benchmarks.slimming_common import error_summary
from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.errors import EquivalenceError
from passdeploy.grouping.find import map_channels
from passdeploy.models.chosen_outputs import OutputChoice
from passdeploy.runtime import seeds
from passdeploy.runtime.files import write_atomically
from passdeploy.slimming.verify import check_equivalence

TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-9  # for what float32 is too coarse for: many layers, random weights
MAX_REASONS = 3


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--only", "pattern", default="*", help="Networks whose key matches, as in a shell: 'hf/*'.")
@click.option("--limit-s", default=600.0, show_default=True, help="Seconds for one network.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path(__file__).parent / "results" / "guests.json",
    help="Where results are kept.",
)
@click.option("--fresh", is_flag=True, help="Measure again what the file has already.")
def main(pattern: str, limit_s: float, out: Path, fresh: bool) -> None:
    """Measure the networks that have no result yet; the module docstring describes how."""
    rows: dict[str, Any] = json.loads(out.read_text())["networks"] if out.exists() else {}
    for guest in guests():
        if not fnmatchcase(guest.key, pattern) or (guest.key in rows and not fresh):
            continue
        rows[guest.key] = _in_process(guest, limit_s)
        ordered = {known.key: rows[known.key] for known in guests() if known.key in rows}
        document = {"environment": _environment(), "networks": ordered}
        write_atomically(out, json.dumps(document, indent=1) + "\n")
        write_atomically(out.with_suffix(".md"), markdown(document))
        row = rows[guest.key]
        click.echo(f"{guest.key}: {row['status']} {row.get('seconds', '')} {row.get('error', '')}")
    click.echo(f"wrote {out}")


def _in_process(guest: Guest, limit_s: float) -> dict[str, Any]:
    """Measure a network in a process of its own, forked from one that has imported the packages and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.guest_networks", "benchmarks.guest_imports"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(guest, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(limit_s):
            result: dict[str, Any] = ours.recv()
            return result
        return {"status": "timeout", "error": f"no result after {limit_s:.0f} s"}
    except EOFError:
        process.join()
        return {"status": "error", "error": f"the process died with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _child(guest: Guest, pipe: Connection) -> None:
    pipe.send(_measure(guest))


def _measure(guest: Guest) -> dict[str, Any]:
    """Find the groups of one network, cut it twice, and describe the outcome."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        (model, outputs), inputs = guest.build(), guest.inputs()
    except MissingPackage as error:
        return {"status": "skipped", "error": str(error)}
    try:
        untouched = copy.deepcopy(model)  # what a network keeps of a run in float32 does not suit one in float64
        start = time.process_time()
        channels = map_channels(model, inputs, outputs=outputs)
        row: dict[str, Any] = {"seconds": round(time.process_time() - start, 2)}
    except Exception as error:
        return {"status": "error", "error": error_summary(error)}
    row |= _described(channels)
    if not channels.prunable:
        return row | {"status": "protected"}
    for kind, plan in (("half", half(channels.prunable)), ("random", random_widths(channels.prunable, guest.key))):
        try:
            row[kind] = _compared(untouched, channels, plan, inputs, outputs)
        except EquivalenceError as error:
            return row | {"status": "WRONG", "error": f"{kind}: {str(error).splitlines()[0][:300]}"}
        except Exception as error:
            return row | {"status": "error", "error": f"{kind}: {error_summary(error)}"}
    return row | {"status": "exact"}


def _compared(
    untouched: torch.nn.Module, channels: ChannelMap, plan: Plan, inputs: Sequence[Any], outputs: OutputChoice | None
) -> dict[str, Any]:
    """Compare slim and masked network in float32, and in float64 where that is too coarse."""
    costs, widths = channels.costs, plan.widths()
    row = {f"{kind}_gone": round(1 - costs.of(kind, widths) / costs.of(kind), 3) for kind in ("params", "macs")}
    try:
        found = check_equivalence(
            copy.deepcopy(untouched), channels.groups, plan, inputs, tolerance=TOLERANCE, outputs=outputs
        )
        precision = "float32"
    except EquivalenceError:
        wide_model, wide = copy.deepcopy(untouched).double(), [tensor.double() for tensor in inputs]
        found = check_equivalence(wide_model, channels.groups, plan, wide, tolerance=FLOAT64_TOLERANCE, outputs=outputs)
        precision = "float64"
    return {**row, "rel_error": found.max_rel_error, "precision": precision, "sizes": found.input_shapes}


def half(groups: Sequence[ChannelGroup]) -> Plan:
    """Keep the first half of the channels of every group."""
    return Plan({group.name: tuple(range(max(group.width // 2, 1))) for group in groups})


def random_widths(groups: Sequence[ChannelGroup], key: str) -> Plan:
    """Keep a random number of random channels of every group."""
    kept = {}
    for group in groups:
        draws = seeds.generator("guests", key, group.name)
        width = int(torch.randint(1, group.width + 1, (), generator=draws))
        kept[group.name] = tuple(sorted(torch.randperm(group.width, generator=draws)[:width].tolist()))
    return Plan(kept)


def _described(channels: ChannelMap) -> dict[str, Any]:
    """Count channels that may be removed and those that must stay, with the most frequent reasons."""
    stay = [group for group in channels.groups if not group.is_prunable and "the model's output" not in group.reason]
    reasons = Counter[str]()
    for group in stay:
        reasons[group.reason] += group.width
    return {
        "prunable_channels": sum(group.width for group in channels.prunable),
        "protected_channels": sum(group.width for group in stay),
        "reasons": dict(reasons.most_common(MAX_REASONS)),
    }


def _environment() -> dict[str, str]:
    found = {"cores": str(os.cpu_count()), "load average": f"{os.getloadavg()[1]:.0f}"}
    for package in ("torch", "ultralytics", "transformers", "segmentation-models-pytorch", "rfdetr"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def markdown(document: dict[str, Any]) -> str:
    """Write the tables: a summary by family, and one row a network."""
    rows: dict[str, Any] = document["networks"]
    versions = ", ".join(f"{name} {number}" for name, number in document["environment"].items())
    lines = [
        "# Networks that people bring along",
        "",
        f"Written by `python -m benchmarks.guests`; {versions}; random weights, one CPU thread. Half: every width that",
        "may be cut is halved. Exact: slim and masked network agree at one half and at random widths, at a second",
        "image size as well where the network takes one.",
        "",
        "| family | networks | exact | protected as a whole | skipped | wrong | error or timeout "
        "| cut by a third of the MACs or more | slowest find_groups, CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        own = [row for key, row in rows.items() if key.startswith(f"{family}/")]
        by = Counter(row["status"] for row in own)
        third = sum(row.get("half", {}).get("macs_gone", 0) >= 1 / 3 for row in own)
        slowest = max((row.get("seconds", 0) for row in own), default=0)
        lines.append(
            f"| {family} | {len(own)} | {by['exact']} | {by['protected']} | {by['skipped']} | {by['WRONG']} "
            f"| {by['error'] + by['timeout']} | {third} | {slowest:.1f} |"
        )
    lines += [
        "",
        "| network | | find_groups, s | params gone | MACs gone | error | sizes | what stays, and why |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(key, row) for key, row in rows.items()]
    return "\n".join(lines) + "\n"


def _line(key: str, row: dict[str, Any]) -> str:
    half, other = row.get("half", {}), row.get("random", {})
    errors = [cut["rel_error"] for cut in (half, other) if cut]
    sizes = " and ".join("x".join(map(str, shapes[0])) for shapes in half.get("sizes", []))
    why = "; ".join(f"{width}: {reason}" for reason, width in row.get("reasons", {}).items()).replace("|", "\\|")
    return (
        f"| {key} | {row['status']} | {row.get('seconds', '')} | {_percent(half, 'params')} | {_percent(half, 'macs')} "
        f"| {f'{max(errors):.0e}' if errors else ''} | {sizes} | {row.get('error', '') or why} |"
    )


def _percent(half: dict[str, Any], kind: str) -> str:
    return f"{half[f'{kind}_gone']:.0%}" if half else ""


if __name__ == "__main__":
    main()
