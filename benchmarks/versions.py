"""Benchmark of supported versions: the channel groups of a hundred networks, with one set of packages and with another.

    .venv-floor/bin/python -m benchmarks.versions write floor.json
    .venv/bin/python -m benchmarks.versions write newest.json
    .venv/bin/python -m benchmarks.versions compare floor.json newest.json --out benchmarks/results/versions.json

Of every group its name, its width, the tensors that it cuts, and whether it is prunable or why not are written down; of
a network that fails, the error. Lines of code are left out of the reasons: torchvision and timm have other ones in each
release. The networks are those of `benchmarks/zoo.py` with at most `--millions` of parameters that both releases have.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.zoo import ZOOS, Entry, entries
from passdeploy import ChannelGroup, find_groups
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions

_LINE = re.compile(r":\d+\b")  # after the name of a file
SLIMMING = Path(__file__).parent / "results" / "slimming.json"
FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(help=__doc__.split("\n\n")[0] if __doc__ else None)
def main() -> None:
    """Write down channel groups, or compare two files of them."""


@main.command()
@click.argument("out", type=FILE)
@click.option("--zoo", type=click.Choice([*ZOOS, "all"]), default="all", show_default=True)
@click.option("--millions", default=30.0, show_default=True, help="Parameters of the largest network.")
def write(out: Path, zoo: str, millions: float) -> None:
    """Write the channel groups of the networks, found with the packages installed here, to OUT."""
    torch.set_num_threads(1)
    started = time.process_time()
    chosen = [entry for entry in entries(zoo) if parameters_of(entry) <= millions * 1e6]
    networks = {entry.key: found for entry in chosen if (found := describe(entry)) is not None}
    document = {"versions": package_versions(), "cpu_s": round(time.process_time() - started), "networks": networks}
    write_atomically(out, json.dumps(document, indent=1) + "\n")
    print(f"{len(networks)} networks in {document['cpu_s']} s: {out}")


@main.command()
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@click.option("--out", type=FILE, help="Where to write the summary.")
def compare(first: Path, second: Path, out: Path | None) -> None:
    """Compare the groups in two files, network by network; exit code 4 where one differs."""
    documents = [json.loads(file.read_text()) for file in (first, second)]
    one, other = (document["networks"] for document in documents)
    both = sorted(one.keys() & other.keys())
    different = {key: difference(one[key], other[key]) for key in both if one[key] != other[key]}
    summary = {
        "versions": [document["versions"] for document in documents],
        "networks": len(both),
        "groups": sum(len(one[key]) for key in both),
        "prunable": sum(group["prunable"] for key in both for group in one[key].values()),
        "identical": len(both) - len(different),
        "different": different,
        "only_in_one": sorted(one.keys() ^ other.keys()),
    }
    text = json.dumps(summary, indent=1) + "\n"
    print(text, end="")
    if out is not None:
        write_atomically(out, text)
    raise SystemExit(4 if different else 0)


def parameters_of(entry: Entry) -> float:
    """Look up the parameters of a network in the results of `benchmarks/slimming.py`; infinite where it has none."""
    results = json.loads(SLIMMING.read_text())["models"]
    return results[entry.key]["ours"]["params"] if entry.key in results else float("inf")


def describe(entry: Entry) -> dict[str, Any] | None:
    """Find the groups of a network: name -> width, whether it is prunable, the reason if not, and what it cuts.

    None if this release cannot build the network.
    """
    try:
        model, inputs = entry.build(), entry.inputs()
    except Exception as error:
        print(f"{entry.key}: not in this release, {error}")
        return None
    try:
        groups = find_groups(model, inputs)
    except Exception as error:
        return {"error": {"width": 0, "prunable": False, "reason": f"{type(error).__name__}: {error}"}}
    return {
        group.name: {
            "width": group.width,
            "prunable": group.is_prunable,
            "reason": _LINE.sub("", group.reason),
            "cuts": _cuts(group),
        }
        for group in groups
    }


def _cuts(group: ChannelGroup) -> str:
    """Return the number of slots and a checksum of their tensors, dimensions and indices."""
    parts = sorted(f"{slot.tensor} {slot.dim} {slot.index.tolist()}" for slot in group.slots)
    return f"{len(parts)} {zlib.crc32(' '.join(parts).encode()):08x}"


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the groups that two descriptions of a network do not share: name -> the two descriptions."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: [one.get(name), other.get(name)] for name in names}


if __name__ == "__main__":
    main()
