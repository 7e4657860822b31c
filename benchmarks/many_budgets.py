"""Benchmark of `prune.targets`: several budgets from one mask learning, against a mask learning for each.

    python -m benchmarks.many_budgets --cifar FOLDER --weights FILE [--seeds 0,1,2] [--images 320] [--set KEY=VALUE]

ResNet-20 is pruned as `resnet20-cifar10.yaml` says, on the first images of every class, with batches of 32 and two
passes each of mask learning and of fine-tuning, unless `--set` says otherwise. Seconds are those of both. A row that is
in the results is not made again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

import passdeploy
from passdeploy.commands.prune import RunResult
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions

RECIPE = "resnet20-cifar10.yaml"
DEFAULTS = ("data.batch_size=32", "prune.epochs=2", "finetune.epochs=2", "finetune.optimizer.lr=0.01")
RESULTS = Path(__file__).parent / "results" / "many_budgets.json"
OWN, SHARED = "its own", "one for all"


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--cifar", type=click.Path(path_type=Path, exists=True), required=True, help="Images by class.")
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True, help="Of the dense network.")
@click.option("--shares", default="0.5,0.3,0.15", show_default=True, help="Of the multiply-adds.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--images", default=320, show_default=True, help="Training images of every class; 0: all.")
@click.option("--set", "overrides", multiple=True, help="Of the recipe.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    cifar: Path, weights: Path, shares: str, seeds: str, images: int, overrides: tuple[str, ...], out: Path
) -> None:
    """Prune to every share both ways, and compare."""
    torch.set_num_threads(1)
    wanted = [float(share) for share in shares.split(",")]
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.is_file() else []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = _first_images(cifar.resolve(), folder / "images", images) if images else cifar.resolve()
        fixed = [
            *DEFAULTS,
            *overrides,
            f"data.root={root}",
            f"model.weights={weights.resolve()}",
            "gates.top1_drop=null",
        ]
        for seed in map(int, seeds.split(",")):
            key = {"seed": seed, "images": images, "set": [*DEFAULTS, *overrides]}
            for targets in (*([share] for share in wanted), wanted):
                learning = OWN if len(targets) == 1 else SHARED
                asked = {**key, "learning": learning, "targets": targets}
                if any(asked.items() <= row.items() for row in rows):
                    continue
                result = passdeploy.run(
                    RECIPE, out=folder / "runs", overrides=[*fixed, f"seed={seed}", f"prune.targets={targets}"]
                )
                rows += [{**asked, **_facts(each)} for each in (*result.larger, result)]
                document = {"versions": package_versions(), "rows": rows}
                write_atomically(out, json.dumps(document, indent=1) + "\n")
                write_atomically(out.with_suffix(".md"), "\n".join([*report(rows), ""]))
                print(json.dumps(rows[-len(targets) :]), flush=True)


def _first_images(source: Path, folder: Path, images: int) -> Path:
    """Make a folder of links to the first images of every class, and to all test images."""
    for kind in sorted((source / "train").iterdir()):
        (folder / "train" / kind.name).mkdir(parents=True)
        for image in sorted(kind.iterdir())[:images]:
            (folder / "train" / kind.name / image.name).symlink_to(image)
    (folder / "test").symlink_to(source / "test")
    return folder


def _facts(result: RunResult) -> dict[str, Any]:
    """Describe a finished run."""
    summary = result.summary
    steps = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    return {
        "share": summary["budget"]["requested"],
        "top1": summary["slim"]["top1"],
        "dense_top1": summary["dense"]["top1"],
        "macs": summary["budget"]["achieved"],
        "steps_before": summary.get("snapshot", {}).get("steps", 0),  # in the run that learned
        "learn_steps": sum(step["stage"] == "learn" for step in steps),
        "finetune_steps": sum(step["stage"] == "finetune" for step in steps),
        "seconds": summary["seconds"]["learn"] + summary["seconds"]["finetune"],
    }


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Write the table: the means over seeds, and the largest differences of single seeds."""
    cells: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cells[(row["images"], tuple(row["set"]), row["share"])][row["learning"]][row["seed"]] = row
    lines = [
        "# Several budgets from one mask learning, against a mask learning for each",
        "",
        "ResNet-20 on CIFAR-10 as JPEG (`benchmarks.many_budgets`); means over seeds, medians for the "
        "seconds. Steps are those of mask learning and of fine-tuning, in brackets those before the run of the "
        "smallest budget passed the larger one.",
        "",
        "| images | MACs | learning of its own | steps | s | one for all | steps | s | difference | of single seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (images, _, share), by_learning in cells.items():
        own, shared = by_learning[OWN], by_learning[SHARED]
        both = sorted(own.keys() & shared.keys())
        if not both:
            continue
        differences = [100 * (shared[seed]["top1"] - own[seed]["top1"]) for seed in both]
        texts = [_text([found[seed] for seed in both]) for found in (own, shared)]
        singles = " ".join(f"{difference:+.2f}" for difference in differences)
        count = 10 * images if images else "all"
        lines.append(f"| {count} | {share:.0%} | {texts[0]} | {texts[1]} | {mean(differences):+.2f} | {singles} |")
    return lines


def _text(rows: list[dict[str, Any]]) -> str:
    before = mean(row.get("steps_before", 0) for row in rows)
    steps = f"{mean(row['learn_steps'] for row in rows):.0f} + {mean(row['finetune_steps'] for row in rows):.0f}"
    if before:
        steps = f"({before:.0f}) + {steps}"
    return f"{mean(row['top1'] for row in rows):.2%} | {steps} | {median(row['seconds'] for row in rows):.0f}"


if __name__ == "__main__":
    main()
