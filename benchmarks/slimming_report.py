"""Report of `slimming.py`: tables for the terminal and for `results/slimming.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.zoo import ZOOS

ROUNDED = ("regnet_y_400mf", "resnext50_32x4d", "efficientnet_b0")  # the rows of `round_to=8`
TWO_THIRDS = 2 / 3  # of the parameters are left


def summary(models: Mapping[str, Mapping[str, Any]], rounded: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Summarise the results in rows of title, torch-pruning's figure and passdeploy's."""
    rows_of_table: list[tuple[str, str, str]] = []

    def add_row(title: str, theirs: str, ours: str) -> None:
        rows_of_table.append((title, theirs, ours))

    def results_of(*zoos: str, side: str) -> list[dict[str, Any]]:
        return [result[side] for key, result in models.items() if key.split("/")[0] in zoos and side in result]

    def ratio(part: int, rows: Sequence[Any]) -> str:
        return f"{part} of {len(rows)}" if rows else "–"

    def runs(rows: Sequence[Mapping[str, Any]]) -> int:
        return sum(row["status"] in ("ok", "exact", "inexact", "unjudged") for row in rows)

    def exact(rows: Sequence[Mapping[str, Any]]) -> int:
        return sum(row["status"] == "exact" for row in rows)

    other = ("segmentation", "detection", "video")
    for title, zoos in (("torchvision classifiers", ("torchvision",)), ("segmentation, detection, video", other)):
        ours, theirs = results_of(*zoos, side="ours"), results_of(*zoos, side="torch_pruning")
        add_row(f"{title}: slimmed and running", ratio(runs(theirs), theirs), ratio(runs(ours), ours))
        add_row(f"{title}: of these exact", "not judged", ratio(exact(ours), ours))
    ours, theirs = results_of("timm", side="ours"), results_of("timm", side="torch_pruning")
    third = sum(row["status"] == "exact" and row["params_kept"] <= 2 / 3 for row in ours)
    add_row("timm: slimmed and running", ratio(runs(theirs), theirs), ratio(runs(ours), ours))
    add_row("timm: exact, and a third or more of the parameters cut", "", ratio(third, ours))
    wrong = sum(row["status"] == "inexact" for row in ours)
    add_row("timm: wrong / no result in time", "", f"{wrong} / {sum(r['status'] == 'timeout' for r in ours)}")

    everything = results_of(*ZOOS, side="ours")
    shares = [row["prunable_share"] for row in everything if "prunable_share" in row]
    if shares:
        add_row("share of channels that may be cut, median", "", f"{median(shares):.1%}")
    times = [
        (result["ours"]["groups_s"] + result["ours"]["slim_s"]) / result["torch_pruning"]["slim_s"]
        for result in models.values()
        if result.get("torch_pruning", {}).get("status") == "ok" and "slim_s" in result.get("ours", {})
    ]
    if times:
        add_row("time over torch-pruning's, median / worst", "1", f"{median(times):.2f} / {max(times):.2f}")
    for side, cells in (("torch_pruning_rounded", []), ("ours_rounded", [])):
        for name in ROUNDED:
            row = rounded.get(f"torchvision/{name}", {}).get(side)
            cells.append(str(len(row["uncut"])) if row and "uncut" in row else "–")
        rounded = {**rounded, side: ", ".join(cells)}
    add_row(
        "widths in multiples of 8: layers left uncut in " + ", ".join(ROUNDED),
        rounded["torch_pruning_rounded"],
        rounded["ours_rounded"],
    )
    for check in ("counts", "numbers", "trains", "rebuilds"):
        rows = [row for row in everything if check in row]
        add_row(f"slim network: {check}", "", ratio(sum(row[check] is True for row in rows), rows))
    return rows_of_table


def details(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build a table with one row for every network."""
    table = Table("network")
    for heading in ("ours", "error", "groups s", "slim s", "params", "MACs", "prunable", "theirs", "s"):
        table.add_column(heading, justify="right")
    table.add_column("failed, or stays because", overflow="fold", max_width=70)
    for key, result in models.items():
        ours, theirs = result.get("ours", {}), result.get("torch_pruning", {})
        failures = [
            f"{check}: {ours[check]}"
            for check in ("counts", "numbers", "trains", "rebuilds")
            if ours.get(check, True) is not True
        ]
        reasons = [f"{size} x {reason}" for reason, size in ours.get("reasons", []) if "model's output" not in reason]
        note = ours.get("error") or "; ".join(failures) or "; ".join(reasons[:1])
        table.add_row(
            key,
            _status(ours.get("status")),
            _number(ours.get("rel_error"), ".0e"),
            _number(ours.get("groups_s"), ".1f"),
            _number(ours.get("slim_s"), ".1f"),
            _number(ours.get("params_kept"), ".0%"),
            _number(ours.get("macs_kept"), ".0%"),
            _number(ours.get("prunable_share"), ".0%"),
            _status(theirs.get("status")),
            _number(theirs.get("slim_s"), ".1f"),
            note,
        )
    return table


def _status(status: str | None) -> str:
    colour = {"exact": "green", "ok": "green", "inexact": "red bold", "error": "red"}.get(status or "", "yellow")
    return f"[{colour}]{status}[/]" if status else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def summary_table(models: Mapping[str, Mapping[str, Any]], rounded: Mapping[str, Any]) -> Table:
    """Build the table of `summary` for the terminal."""
    table = Table("", title="half of every group's channels cut at random", title_justify="left")
    table.add_column("torch-pruning", justify="right")
    table.add_column("passdeploy", justify="right")
    for row in summary(models, rounded):
        table.add_row(*row)
    return table


def markdown(document: Mapping[str, Any]) -> str:
    """Build a page with the summary, and with every network that was cut little or gave no exact result."""
    models, made = document["models"], document["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in made["versions"].items())
    commits = sorted({row["commit"] for result in models.values() for row in result.values() if "commit" in row})
    lines = [
        "# Slimming the model zoos",
        "",
        "Half of the channels of every prunable group cut at random, random weights, one process of one thread for",
        f"each network, at most {made['limit_s']:.0f} s of CPU time for groups and slimming. `slimming.json` has every",
        "network; `python benchmarks/slimming.py` makes both files.",
        "",
        f"Measured with {versions}" + (f", at commit {', '.join(commits)}." if commits else "."),
        "",
        "| | torch-pruning | passdeploy |",
        "|---|---|---|",
        *(f"| {title} | {theirs} | {ours} |" for title, theirs, ours in summary(models, document["rounded"])),
        "",
        "## Networks that kept more than two thirds of their parameters, or gave no exact result",
        "",
        "| network | | parameters kept | what must stay, or what failed |",
        "|---|---|---|---|",
    ]
    for key, result in models.items():
        row = result.get("ours", {})
        if row and (row["status"] != "exact" or row["params_kept"] > TWO_THIRDS):
            kept = _number(row.get("params_kept"), ".2f")
            lines.append(f"| {key} | {row['status']} | {kept} | {row.get('error') or _reasons(row)} |")
    return "\n".join(lines) + "\n"


def _reasons(row: Mapping[str, Any]) -> str:
    stays = [f"{size} channels: {reason}" for reason, size in row.get("reasons", []) if "model's output" not in reason]
    return "; ".join(stays[:3]).replace("|", "\\|")
